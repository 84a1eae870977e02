package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"

	"github.com/vdisk/vdisk/internal/storage"
)

// To go over all pages at every opening would make it as slow as the table is large. Who has them verified and keeps
// the table open reads pages without looking at them as a whole again, however long, and however often they
// come from the disk anew. To open the table again in the same boot is no different, as long as nobody else has
// written to the file meanwhile. So the owner leaves a note of how the file is when it has written to it.

// VerifiedSuffix is appended to the table's name for the file with the note. It is not synced: it means
// nothing to another boot.
const VerifiedSuffix = ".verified"

// verified says of which file, in which state, in which boot, the pages hang together. ctime changes with
// every write (inode(7)), and the system sets it.
type verified struct {
	Boot    string `json:"boot"`
	Dev     uint64 `json:"dev"`
	Ino     uint64 `json:"ino"`
	Size    int64  `json:"size"`
	Changed int64  `json:"ctime"`
	Writing bool   `json:"writing"` // size and ctime are being changed by a commit

	Checkpoint uint64 `json:"checkpoint,omitempty"` // record as of which the table is, or of an earlier commit
}

// note is the open file of a verified. nil: there is none.
type note struct {
	f    *os.File
	at   place
	last verified
}

const noteSize = 256 // always, so that one write replaces all of it

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

// readNote reads the note: as of which record the last owner knew the table to be (0: that is not known), in whatever
// boot; and whether the table is as an owner of this boot has left it, which had it verified.
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
	if was.Writing && now.Size >= was.Size { // the owner was killed in a commit, which leaves the state before it or after it
		now.Size, now.Changed, now.Writing = was.Size, was.Changed, true
	}
	return was.Checkpoint, now == was
}

// newNote says that the table, which this process has open now, is verified, and as of which record it is.
func newNote(at place, checkpoint uint64) *note {
	v, err := stateOf(at)
	if err != nil {
		return nil
	}
	v.Checkpoint = checkpoint
	f, err := at.in.Open(at.name+VerifiedSuffix, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return nil // then the next opening takes longer
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

// begin comes before a commit.
func (n *note) begin() error {
	n.last.Writing = true
	return n.write(n.last)
}

// end comes after one that has succeeded.
func (n *note) end() error {
	v, err := stateOf(n.at)
	if err != nil {
		return err
	}
	v.Checkpoint = n.last.Checkpoint
	n.last = v
	return n.write(v)
}

// drop takes the note away for good.
func (n *note) drop() {
	_ = n.f.Truncate(0) // if this fails too, ctime tells
	_ = n.at.in.Remove(n.at.name + VerifiedSuffix)
	_ = n.f.Close()
}

func (n *note) close() error { return n.f.Close() }
