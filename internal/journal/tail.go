package journal

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/storage"
)

// Tail reads the journal of a store from the oldest entry on, and goes on with what is added meanwhile. It needs no
// owner, takes no lock and changes nothing.
type Tail struct {
	in      *storage.Folder
	f       *os.File // nil: no file has been found yet
	st      unix.Stat_t
	r       *bufio.Reader
	line    []byte // the beginning of a line whose end is not there yet
	long    bool   // that line is too long, and is passed over
	left    bool   // the file is no longer the present one: its next end is its last
	skipped int
	leftOut int64
}

// NewTail returns a tail of the journal in a folder. Its Close closes the folder.
func NewTail(in *storage.Folder) *Tail {
	return &Tail{in: in, r: bufio.NewReaderSize(nil, 64<<10)}
}

// Close closes the file and the folder.
func (t *Tail) Close() error { return errors.Join(t.closeFile(), t.in.Close()) }

func (t *Tail) closeFile() error {
	if t.f == nil {
		return nil
	}
	return t.f.Close()
}

// Skipped returns how many lines were passed over because they are no entries: a crash has cut them off, or somebody else
// has changed the file.
func (t *Tail) Skipped() int { return t.skipped }

// LeftOut returns how many bytes were left out at the beginning of files that are far larger than a journal's: somebody
// else has made them.
func (t *Tail) LeftOut() int64 { return t.leftOut }

// Next returns the next entry, or io.EOF if there is none at present; it may be called again then.
func (t *Tail) Next() (Entry, error) {
	for {
		line, err := t.nextLine()
		if err == io.EOF {
			var more bool
			if more, err = t.goOn(); more {
				continue
			}
			err = cmp.Or(err, io.EOF)
		}
		if err != nil {
			return Entry{}, err
		}
		var e Entry
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber() // in the details
		if d.Decode(&e) == nil && e.Kind != "" {
			if e.Names == nil {
				e.Names = []string{}
			}
			return e, nil
		}
		t.skipped++
	}
}

// nextLine returns the next whole line of the file, or io.EOF.
func (t *Tail) nextLine() ([]byte, error) {
	if t.f == nil {
		return nil, io.EOF
	}
	for {
		part, err := t.r.ReadSlice('\n')
		if !t.long {
			t.line = append(t.line, part...)
		}
		if len(t.line) > maxLine {
			t.line, t.long = nil, true
		}
		if err == bufio.ErrBufferFull {
			continue
		}
		if err != nil {
			return nil, err
		}
		line := t.line
		t.line, t.long = t.line[:0], false
		return line, nil
	}
}

// goOn looks for what to read where the file ends. It reports whether there may be something.
func (t *Tail) goOn() (bool, error) {
	switch {
	case t.f == nil:
		opened, err := t.open(OldFileName)
		if err == nil && !opened {
			opened, err = t.open(FileName)
		}
		return opened, err
	case t.left: // all of it has been read
		if next, err := t.is(OldFileName); err != nil || next {
			return t.open(FileName)
		}
		return t.open(OldFileName) // since then there was more than one
	}
	present, err := t.is(FileName)
	if err != nil || present {
		return false, err
	}
	// Nothing is appended to it any more, but the last lines may have come after its end was met.
	t.left = true
	return true, nil
}

// is reports whether the open file has the name.
func (t *Tail) is(name string) (bool, error) {
	st, err := t.in.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && st.Dev == t.st.Dev && st.Ino == t.st.Ino, err
}

// open goes on with another file. It reports whether that exists.
func (t *Tail) open(name string) (bool, error) {
	f, err := t.in.Open(name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, errors.Join(err, f.Close())
	}
	if err := t.closeFile(); err != nil {
		return false, errors.Join(err, f.Close())
	}
	if len(t.line) > 0 || t.long {
		t.skipped++
	}
	t.f, t.st, t.line, t.long, t.left = f, st, t.line[:0], false, false
	t.r.Reset(f)
	if st.Size <= MaxBytes+maxLine {
		return true, nil
	}
	skip := st.Size - MaxBytes
	if _, err := f.Seek(skip, io.SeekStart); err != nil {
		return false, err
	}
	t.leftOut += skip
	for err = bufio.ErrBufferFull; err == bufio.ErrBufferFull; { // the line there has no beginning
		_, err = t.r.ReadSlice('\n')
	}
	if err != nil && err != io.EOF {
		return false, err
	}
	return true, nil
}
