package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// reserveName is the file's name in the store's folder, where older programs leave it alone.
	reserveName = "reserve"

	reserveLeast = 8 << 20
	reserveMost  = spare
	reserveStep  = 1 << 20

	// elbowRoom is what is left free for small files: the owner's and the devices' records, and the like.
	elbowRoom = 1 << 20
)

// reserve is a file of blocks that the file system has given already, for when it has no others: others fill it, too.
// What has to go on then takes blocks from it a part at a time, by making the file shorter first. docs/reclaim.md,
// A full disk.
type reserve struct {
	fs storage.FS

	mu   sync.Mutex
	file storage.File // nil: there is none
	size int64
	want int64
	not  bool // the file system cannot allocate
}

// open finds the file as the last owner left it.
func (r *reserve) open(fsys storage.FS) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fs, r.want = fsys, reserveLeast
	f, err := fsys.Open(reserveName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil {
		// A copy of a store may have a file of holes: nothing was ever written to it. Where the blocks are there, this
		// takes none.
		if err = f.Allocate(size); errors.Is(err, errors.ErrUnsupported) {
			r.not, size = true, 0
			err = f.Truncate(0)
		}
	}
	if err != nil && !errors.Is(err, storage.ErrNoSpace) { // which some file systems say also where the blocks are there
		return errors.Join(err, f.Close())
	}
	r.file, r.size = f, size
	return nil
}

func (r *reserve) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file, r.size = nil, 0
	return err
}

// bytes is what the file has.
func (r *reserve) bytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.size
}

// wanted is what it should have.
func (r *reserve) wanted() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.want
}

// give gives up to n bytes back to the file system, for the caller to take; false: there is nothing left.
func (r *reserve) give(n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size == 0 {
		return false
	}
	size := max(0, r.size-n)
	if err := r.file.Truncate(size); err != nil {
		return false
	}
	r.size = size
	return true
}

// fill makes the reserve what a store should have whose chunk files take so much, as far as there is room.
func (r *reserve) fill(used int64) error {
	free, err := r.fs.Free()
	if err != nil {
		return fmt.Errorf("free space of the store: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.want = min(max(used/16, reserveLeast), reserveMost, (free+r.size)/8)
	r.want -= r.want % reserveStep
	more := min(r.want-r.size, free-elbowRoom)
	more -= more % reserveStep
	if more <= 0 || r.not {
		return nil
	}
	if r.file == nil {
		if r.file, err = r.fs.Create(reserveName, 0); err != nil {
			return fmt.Errorf("make the reserve: %w", err)
		}
	}
	err = r.file.Allocate(r.size + more)
	switch {
	case err == nil:
		r.size += more
	case errors.Is(err, errors.ErrUnsupported):
		r.not = true
		return nil
	case errors.Is(err, storage.ErrNoSpace): // somebody else was faster
		return nil
	}
	return err
}
