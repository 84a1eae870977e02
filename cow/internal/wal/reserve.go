package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"github.com/vdisk/vdisk/internal/storage"
)

const (
	// ReserveName is the name of the file in the store's folder. Older programs leave the file alone.
	ReserveName = "reserve"

	ReserveLeast = 8 << 20 // the size that the file should have in a small store
	reserveMost  = Spare
	ReserveStep  = 1 << 20 // by how much it grows at least, and what a commit takes of it at a time

	// ElbowRoom is left free for small files: the owner's record, the file of devices, and the like.
	ElbowRoom = 1 << 20
)

// ReserveFile is a file of allocated blocks, for the time when the file system has none left: other programs fill the
// disk, too. Operations that have to go on then take blocks from it, some at a time, by making the file shorter first.
// See docs/reclaim.md, A full disk.
type ReserveFile struct {
	fs storage.FS

	mu   sync.Mutex
	file storage.File // nil: there is no file
	size int64
	want int64
	not  bool // the file system cannot allocate blocks in advance
}

// Open opens the file that the last owner left, if there is one, and allocates its blocks again.
func (r *ReserveFile) Open(fsys storage.FS) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fs, r.want = fsys, ReserveLeast
	f, err := fsys.Open(ReserveName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil {
		// A copy of a store may have a file of holes, since nothing was ever written to it. If the blocks are there
		// already, this takes none.
		if err = f.Allocate(size); errors.Is(err, errors.ErrUnsupported) {
			r.not, size = true, 0
			err = f.Truncate(0)
		}
	}
	if err != nil && !errors.Is(err, storage.ErrNoSpace) { // some report it even if the blocks are there
		return errors.Join(err, f.Close())
	}
	r.file, r.size = f, size
	return nil
}

// Close closes the file. Its blocks stay allocated.
func (r *ReserveFile) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file, r.size = nil, 0
	return err
}

// Bytes returns the size of the file.
func (r *ReserveFile) Bytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.size
}

// Wanted returns the size that the file should have.
func (r *ReserveFile) Wanted() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.want
}

// Give gives up to n bytes back to the file system, for the caller to take. It returns false if nothing is left.
func (r *ReserveFile) Give(n int64) bool {
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

// Fill lets the reserve grow to the size that a store with used bytes of chunk files should have, as far as there is
// room.
func (r *ReserveFile) Fill(used int64) error {
	free, err := r.fs.Free()
	if err != nil {
		return fmt.Errorf("free space of the store: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.want = min(max(used/16, ReserveLeast), reserveMost, (free+r.size)/8)
	r.want -= r.want % ReserveStep
	more := min(r.want-r.size, free-ElbowRoom)
	more -= more % ReserveStep
	if more <= 0 || r.not {
		return nil
	}
	if r.file == nil {
		if r.file, err = r.fs.Create(ReserveName, 0); err != nil {
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
	case errors.Is(err, storage.ErrNoSpace): // another program took the room first
		return nil
	}
	return err
}
