package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

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

// left is how the last owner left the table.
type left struct {
	checkpoint uint64 // the record up to which the table had the log, as that owner knew, in any boot; 0: not known
	verified   bool   // the table is as an owner in this boot left it, and that owner had verified it
	durable    bool   // it is verified, and no commit was under way
}

// readNote reads the note.
func readNote(at place) (l left) {
	text, err := at.in.Read(at.name + VerifiedSuffix)
	if err != nil {
		return l
	}
	var was verified
	if json.Unmarshal(bytes.TrimSpace(text), &was) != nil {
		return l
	}
	l.checkpoint = was.Checkpoint
	now, err := stateOf(at)
	if err != nil || now.Boot == "" {
		return l
	}
	now.Checkpoint = was.Checkpoint
	// The owner was killed in a commit, which leaves the state before it or after it.
	if was.Writing && now.Size >= was.Size {
		now.Size, now.Changed, now.Writing = was.Size, was.Changed, true
	}
	l.verified = now == was
	l.durable = l.verified && !was.Writing
	return l
}

// NotedCheckpoint returns the checkpoint that a table had at its last commit, as far as its last owner noted, or 0.
func NotedCheckpoint(in *storage.Folder, name string) uint64 {
	return readNote(place{in, name}).checkpoint
}

// settle makes the table durable as it is read. A process that was killed in a commit may have left a meta page that is
// not on the disk. The next commit would write over pages that the meta page on the disk refers to, and a new note would
// name a checkpoint that a power cut still takes.
func settle(at place, o Options) error {
	if o.Sync == nil {
		if o.NoSync {
			return nil
		}
		o.Sync = Sync
	}
	f, err := at.in.Open(at.name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the table: %w", err)
	}
	defer f.Close()
	if err := o.Sync(f); err != nil {
		return fmt.Errorf("open the table: make it durable: %w", err)
	}
	return nil
}

// Sync makes durable what other processes have written to a file, and makes what is read of it from now on come from
// the disk. If a sync of such a process has failed, the page cache may call clean what is not on the disk. That is no
// error of a later sync.
func Sync(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return os.NewSyscallError("fadvise", unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
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
