package metadata

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// ErrUnwritten is matched by the error of an Update or a Grow for which there was no room. No sync has failed, and the
// state on the disk is the one before, so the Update can be tried again. After any other error of a commit, nobody
// knows what is on the disk, and another Update could write over pages of the last durable state.
var ErrUnwritten = errors.New("metadata: no room for the table")

const (
	growLeast = 64 << 10 // the smallest step in bytes by which the file grows
	growMost  = 64 << 20 // the largest step, unless the caller asks for more

	// releaseTries is how often an Update that finds no room waits for short readers. They keep pages that an earlier
	// Update gave up from being used again.
	releaseTries = 6
)

// room is the space of the table's file. On its own, bbolt grows the file as a hole, and learns that the disk is full
// when it writes, or in a sync, after which nobody knows what is on the disk. So the blocks are allocated here before
// bbolt writes anything, and bbolt stays within them (DB.MaxSize).
//
// Nothing is synced here. A sync could take the error of a commit under way, which uses the same descriptor. The commit
// that first writes behind the old end syncs the size with its pages, before its meta page.
type room struct {
	f        *os.File // the file that bbolt uses
	allocate func(f *os.File, from, to int64) error
	free     atomic.Int64 // bytes of pages that the next Update can use
	used     atomic.Int64 // bytes of pages in use

	mu   sync.Mutex // guards size and end
	size int64      // size of the file in bytes, as far as it is allocated
	end  int64      // where the pages ended as of the last commit
}

// Allocate gives a file blocks of its own from one size in bytes up to another, which becomes its size. If the file
// system cannot allocate, it only sets the size.
func Allocate(f *os.File, from, to int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, from, to-from)
		switch {
		case err == unix.EINTR:
		case err == unix.EOPNOTSUPP:
			return f.Truncate(to)
		case err != nil:
			return &fs.PathError{Op: "allocate", Path: f.Name(), Err: err}
		default:
			return nil
		}
	}
}

// initRoom finds out the size of the file.
func (d *DB) initRoom(f *os.File, o Options) error {
	d.b.AllocSize = 0 // so that bbolt asks for exactly the size that it needs: DB.grow
	r := &d.room
	r.f, r.allocate = f, o.Allocate
	if r.allocate == nil {
		r.allocate = Allocate
	}
	size, err := sizeOf(f)
	if err != nil {
		return err
	}
	r.size = size
	return d.measure()
}

// fillRoom allocates what older programs left as a hole behind the pages, as far as there is room. updating is held.
func (d *DB) fillRoom() error {
	pages, err := d.pages()
	if err != nil {
		return err
	}
	r := &d.room
	r.mu.Lock()
	if r.size > pages && Allocate(r.f, pages, r.size) != nil {
		r.size = pages
	}
	r.mu.Unlock()
	return d.measure()
}

func sizeOf(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("open the table: %w", err)
	}
	return info.Size(), nil
}

// pages returns the size in bytes of the table's pages, in use and free.
func (d *DB) pages() (n int64, err error) {
	err = d.View(func(tx *Tx) error { n = tx.tx.Size(); return nil })
	return n, err
}

// measure finds out how much room there is. No Update may run.
func (d *DB) measure() error {
	end, err := d.pages()
	if err != nil {
		return err
	}
	st := d.b.Stats()
	free := int64(st.FreePageN+st.PendingPageN) * int64(d.b.Info().PageSize)
	r := &d.room
	r.mu.Lock()
	defer r.mu.Unlock()
	r.end = end
	r.used.Store(end - free)
	r.free.Store(free + max(0, r.size-end))
	return nil
}

// Room returns how many bytes of pages the next Update can use without growing the file, and how many bytes of pages
// are in use. Pages that only a reader keeps from being used count as room. During an Update, Room does not know yet
// what that Update takes.
func (d *DB) Room() (free, used int64) { return d.room.free.Load(), d.room.used.Load() }

// Size returns the size of the table's file in bytes.
func (d *DB) Size() int64 {
	d.room.mu.Lock()
	defer d.room.mu.Unlock()
	return d.room.size
}

// Grow allocates n more bytes for the file, or a little more. Its errors match ErrUnwritten.
func (d *DB) Grow(n int64) (err error) {
	d.noting.Lock()
	defer d.noting.Unlock()
	if d.note != nil && d.note.begin() != nil {
		d.unverify()
	}
	err = d.grow(n)
	if d.note != nil && d.note.end() != nil {
		d.unverify()
	}
	return err
}

// grow is Grow without the note.
func (d *DB) grow(n int64) error {
	r := &d.room
	r.mu.Lock()
	defer r.mu.Unlock()
	size := (r.size + n + growLeast - 1) / growLeast * growLeast
	if err := r.allocate(r.f, r.size, size); err != nil {
		return fmt.Errorf("%w: from %d to %d bytes: %w", ErrUnwritten, r.size, size, err)
	}
	r.free.Add(size - max(r.size, r.end))
	r.size = size
	return nil
}

// commit runs fn in a transaction and commits it. bbolt finds that it comes to the end of the file before it writes.
// Then the file grows, and fn runs again.
func (d *DB) commit(fn func(*bbolt.Tx) error) error {
	if d.failed != nil {
		return d.failed
	}
	step := min(max(d.Size()/16, growLeast), growMost)
	for tries := 0; ; {
		d.b.MaxSize = int(d.Size())
		var failed error
		err := d.b.Update(func(tx *bbolt.Tx) error { failed = fn(tx); return failed })
		if err == nil || failed != nil {
			return err
		}
		if !errors.Is(err, berrors.ErrMaxSizeReached) {
			if err = unwritten(err); !errors.Is(err, ErrUnwritten) {
				d.failed = err
			}
			return err
		}
		err = d.grow(step)
		step = min(2*step, max(growMost, step))
		if err == nil {
			continue
		}
		if d.b.Stats().PendingPageN == 0 || tries == releaseTries {
			return err
		}
		time.Sleep(time.Millisecond << tries)
		tries++
	}
}

// unwritten marks the error of a write for which there was no room. On file systems that write elsewhere when they
// overwrite, allocated blocks are not enough. bbolt syncs nothing after such an error.
func unwritten(err error) error {
	var write *fs.PathError
	if !errors.As(err, &write) || write.Op != "write" {
		return err
	}
	if IsFull(err) {
		return fmt.Errorf("%w: %w", ErrUnwritten, err)
	}
	return err
}

// IsFull reports whether err says that there is no room on the file system, or none for this user or this file.
func IsFull(err error) bool {
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT, unix.EFBIG} {
		if errors.Is(err, full) {
			return true
		}
	}
	return false
}
