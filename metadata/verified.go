package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"

	"github.com/vdisk/vdisk/internal/storage"
)

// Reading all pages at every opening would take longer the larger the table is. A process that has verified the pages
// and keeps the table open does not verify them again, however long it lives, and however often they come from the disk
// again. Opening the table again in the same boot is no different, as long as nobody else has written to the file
// meanwhile. So the owner leaves a note of the state of the file each time after it has written to it.

// VerifiedSuffix is appended to the table's name for the name of the note's file. The note is not synced, because it
// proves nothing in another boot.
const VerifiedSuffix = ".verified"

// verified is the content of the note: which file, in which state, in which boot, has verified pages. The system sets
// the ctime, and changes it with every write (inode(7)).
type verified struct {
	Boot    string `json:"boot"`
	Dev     uint64 `json:"dev"`
	Ino     uint64 `json:"ino"`
	Size    int64  `json:"size"`
	Changed int64  `json:"ctime"`
	Writing bool   `json:"writing"` // a commit is changing size and ctime

	// Checkpoint is the number of the record up to which the table has the log, or had it at an earlier commit.
	Checkpoint uint64 `json:"checkpoint,omitempty"`
}

// note is an open note file. A nil note is none.
type note struct {
	f    *os.File
	at   place
	last verified
}

const noteSize = 256 // constant, so that one write replaces the whole note

// stateOf describes the table's file as it is now.
func stateOf(at place) (v verified, err error) {
	st, err := at.in.Lstat(at.name)
	if err != nil {
		return v, err
	}
	v = verified{Dev: st.Dev, Ino: st.Ino, Size: st.Size, Changed: st.Ctim.Nano()}
	v.Boot, err = storage.BootID()
	return v, err
}

// readNote reads the note. checkpoint is the record up to which the table had the log, as the last owner knew, in any
// boot, or 0 if that is not known. isVerified reports whether the table is as an owner in this boot left it, and that
// owner had verified it.
func readNote(at place) (checkpoint uint64, isVerified bool) {
	text, err := at.in.Read(at.name + VerifiedSuffix)
	if err != nil {
		return 0, false
	}
	var was verified
	if json.Unmarshal(bytes.TrimSpace(text), &was) != nil {
		return 0, false
	}
	now, err := stateOf(at)
	if err != nil || now.Boot == "" {
		return was.Checkpoint, false
	}
	now.Checkpoint = was.Checkpoint
	// The owner was killed in a commit, which leaves the state before it or after it.
	if was.Writing && now.Size >= was.Size {
		now.Size, now.Changed, now.Writing = was.Size, was.Changed, true
	}
	return was.Checkpoint, now == was
}

// newNote leaves a note that the table, which this process has open, is verified, and has the log up to the record
// checkpoint. It returns nil if that fails.
func newNote(at place, checkpoint uint64) *note {
	v, err := stateOf(at)
	if err != nil {
		return nil
	}
	v.Checkpoint = checkpoint
	f, err := at.in.Open(at.name+VerifiedSuffix, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return nil // the next opening then takes longer
	}
	n := &note{f: f, at: at, last: v}
	if n.write(v) != nil || f.Truncate(noteSize) != nil {
		n.drop()
		return nil
	}
	return n
}

func (n *note) write(v verified) error {
	text, err := json.Marshal(v)
	if err != nil || len(text) >= noteSize {
		return errors.Join(err, fs.ErrInvalid)
	}
	line := bytes.Repeat([]byte{' '}, noteSize)
	copy(line, text)
	line[noteSize-1] = '\n'
	_, err = n.f.WriteAt(line, 0)
	return err
}

// begin notes that a commit is about to begin.
func (n *note) begin() error {
	n.last.Writing = true
	return n.write(n.last)
}

// end notes the state of the file after a commit that has succeeded.
func (n *note) end() error {
	v, err := stateOf(n.at)
	if err != nil {
		return err
	}
	v.Checkpoint = n.last.Checkpoint
	n.last = v
	return n.write(v)
}

// drop removes the note for good.
func (n *note) drop() {
	_ = n.f.Truncate(0) // if this fails too, the ctime shows it
	_ = n.at.in.Remove(n.at.name + VerifiedSuffix)
	_ = n.f.Close()
}

func (n *note) close() error { return n.f.Close() }
