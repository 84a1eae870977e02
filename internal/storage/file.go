package storage

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// file is a file of a dir. It has a descriptor while it is used, and keeps it until another file needs it.
type file struct {
	d    *dir
	name string
	desc atomic.Pointer[descriptor]

	wrote  atomic.Uint64 // counts writes and truncations
	synced atomic.Uint64 // the part of wrote that is durable

	mu     sync.Mutex // guards opening and closing, and the fields below
	failed error      // error of a sync that no caller had asked for
	closed bool
	pinned atomic.Bool // keeps its descriptor: its name is going, or its data may not be on the disk
	at     int         // index in the table of descriptors; -1: not in it; guarded by table.mu
}

func (f *file) path() string { return f.d.in.Join(f.name) }

// clean reports whether everything written is durable.
func (f *file) clean() bool { return f.synced.Load() == f.wrote.Load() }

// use returns the descriptor, opening the file if it has none. The caller must release the descriptor.
func (f *file) use() (*descriptor, error) { return f.useIf(false) }

// useIf is like use, but a hasty caller gets an error instead of waiting for other files' descriptors.
func (f *file) useIf(hasty bool) (*descriptor, error) {
	if d := f.desc.Load(); d != nil && d.acquire() {
		if !d.used.Load() {
			d.used.Store(true)
		}
		return d, nil
	}
	return f.open(hasty)
}

func (f *file) open(hasty bool) (*descriptor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, &fs.PathError{Op: "use", Path: f.path(), Err: fs.ErrClosed}
	}
	d, err := f.openLocked(hasty)
	if err == nil && !d.acquire() { // cannot happen: the file's own reference is given up only under mu
		err = &fs.PathError{Op: "use", Path: f.path(), Err: fs.ErrClosed}
	}
	return d, err
}

// openLocked returns the descriptor, opening the file if it has none. It takes no reference. The caller holds mu.
func (f *file) openLocked(hasty bool) (*descriptor, error) {
	if d := f.desc.Load(); d != nil {
		return d, nil
	}
	fd, err := f.d.openFile(f.name, 0, hasty)
	if err != nil {
		return nil, err
	}
	return f.has(fd), nil
}

// has gives the file a descriptor. The caller holds mu, or nobody else knows the file yet.
func (f *file) has(fd *os.File) *descriptor {
	d := &descriptor{File: fd}
	d.refs.Store(1)
	d.used.Store(true)
	f.desc.Store(d)
	f.d.files.add(f)
	return d
}

// pin gives the file a descriptor that it keeps until Close, so that it stays usable without its name.
func (f *file) pin() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		if _, err := f.openLocked(false); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f.d.files.remove(f)
	}
	f.pinned.Store(true)
	return nil
}

func (f *file) Close() error {
	f.d.forget(f)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.path(), Err: fs.ErrClosed}
	}
	f.closed = true
	f.d.files.remove(f)
	d := f.desc.Swap(nil)
	if d == nil {
		return nil
	}
	return d.release()
}

func (f *file) Hold() (fd int, ok bool) {
	d, err := f.useIf(true)
	if err != nil {
		return -1, false // ReadAt will return the error
	}
	return int(d.Fd()), true
}

func (f *file) Release() {
	if d := f.desc.Load(); d != nil { // a held descriptor stays the file's until Close
		_ = d.release()
	}
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	d, err := f.use()
	if err != nil {
		return 0, err
	}
	n, err := d.ReadAt(p, off)
	_ = d.release()
	return n, err
}

func (f *file) TryReadAt(p []byte, off int64) bool {
	d, err := f.useIf(true)
	if err != nil {
		return false
	}
	// Since Linux 5.9, the kernel begins to read what is not in memory.
	n, err := unix.Preadv2(int(d.Fd()), [][]byte{p}, off, unix.RWF_NOWAIT)
	if err == unix.EOPNOTSUPP { // tmpfs has everything in memory; other file systems cannot tell
		n, err = d.ReadAt(p, off)
	}
	_ = d.release()
	return err == nil && n == len(p)
}

func (f *file) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.change(func(d *descriptor) (err error) { n, err = d.WriteAt(p, off); return err })
	return n, noSpace(err)
}

func (f *file) Allocate(size int64) error {
	if size == 0 { // every file has that size, and fallocate(2) refuses 0
		return nil
	}
	return noSpace(f.change(func(d *descriptor) error {
		info, err := d.Stat()
		if err != nil {
			return err
		}
		err = Retry(func() error { return unix.Fallocate(int(d.Fd()), 0, 0, size) })
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EOPNOTSUPP):
			return errors.ErrUnsupported
		}
		// The call may have allocated a part.
		return errors.Join(&fs.PathError{Op: "allocate", Path: d.Name(), Err: err}, d.Truncate(info.Size()))
	}))
}

func (f *file) Truncate(size int64) error {
	return noSpace(f.change(func(d *descriptor) error { return d.Truncate(size) }))
}

// change calls do, which makes a change that Sync has to make durable.
func (f *file) change(do func(*descriptor) error) error {
	d, err := f.use()
	if err != nil {
		return err
	}
	err = do(d)
	// Count after the change: a sync that began before the change ended may not include all of it, and must not count
	// for it. And count before the release: while the descriptor is in use, it cannot be closed as one whose writes are
	// all durable.
	f.wrote.Add(1)
	_ = d.release()
	return err
}

func (f *file) Sync() error {
	// Sync even if this process has not written to the file: an earlier process may have.
	d, err := f.use()
	if err != nil {
		return err
	}
	defer func() { _ = d.release() }()
	// Check failed while the descriptor is in use, which keeps evict from syncing and closing it. The system reports a
	// failure only once, and may have reported it to evict.
	f.mu.Lock()
	failed := f.failed
	f.mu.Unlock()
	if failed != nil {
		return failed
	}
	return f.fdatasync(d)
}

// syncTo makes durable what is not durable yet, before d is closed, and keeps the error in failed. The caller holds mu.
func (f *file) syncTo(d *descriptor) error {
	if f.clean() {
		return nil
	}
	f.failed = f.fdatasync(d)
	return f.failed
}

func (f *file) fdatasync(d *descriptor) error {
	wrote := f.wrote.Load()
	if err := Retry(func() error { return unix.Fdatasync(int(d.Fd())) }); err != nil {
		return &fs.PathError{Op: "fdatasync", Path: f.path(), Err: noSpace(err)}
	}
	for was := f.synced.Load(); was < wrote && !f.synced.CompareAndSwap(was, wrote); {
		was = f.synced.Load()
	}
	return nil
}

func (f *file) StartWrite(off, n int64) {
	d, err := f.use()
	if err != nil {
		return // Sync will find and report the error
	}
	_ = unix.SyncFileRange(int(d.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
	_ = d.release()
}

func (f *file) Size() (int64, error) {
	d, err := f.use()
	if err != nil {
		return 0, err
	}
	info, err := d.Stat()
	_ = d.release()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
