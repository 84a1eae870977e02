// Package crashfs is the double of the engine's file layer that loses power: it
// keeps files in memory, knows what has been made durable and in which order
// the rest was done, and makes images of what a power loss would leave. It can
// also fail operations and run out of space.
//
// It is stricter than most file systems: a file's content does not make its
// name durable, and operations on different files, sectors of one write, and
// the directory's operations reach the disk in any order.
package crashfs

import (
	"fmt"
	"io/fs"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vdisk/vdisk/internal/storage"
)

// Op is a kind of operation that can be made to fail.
type Op uint8

// The kinds of operations.
const (
	OpCreate Op = iota
	OpOpen
	OpRemove
	OpWrite
	OpTruncate
	OpSync
	OpSyncDir
	opCount
)

var opNames = [opCount]string{"create", "open", "remove", "write", "truncate", "sync", "syncdir"}

// String returns the operation's name.
func (o Op) String() string { return opNames[o] }

// dirOp is a change of the directory that is not durable: a creation, or (node
// is nil) a removal.
type dirOp struct {
	seq  uint64
	name string
	node *inode
}

func (d *dirOp) apply(names map[string]*inode) {
	if d.node == nil {
		delete(names, d.name)
	} else {
		names[d.name] = d.node
	}
}

type fault struct {
	at  int // the operation's count at which it strikes
	err error
}

// FS is a storage.FS in memory. It may be used concurrently.
type FS struct {
	mu       sync.Mutex        // guards all below, and every inode
	names    map[string]*inode // what the directory shows
	durable  map[string]*inode // what a power loss leaves at least
	dirOps   []dirOp           // what makes names of durable, in order
	seq      uint64            // of the last operation
	capacity int64
	used     int64 // reserved by the inodes in names
	taken    int64 // by what is not in this directory
	handles  int
	counts   [opCount]int
	faults   [opCount][]fault
	onSync   func(name string)
	aside    []string // names
}

var _ storage.FS = (*FS)(nil)

// New returns an empty directory without a limit.
func New() *FS {
	return &FS{names: map[string]*inode{}, durable: map[string]*inode{}, capacity: math.MaxInt64}
}

// SetCapacity limits the bytes that files may reserve, those there are included.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.capacity = bytes
}

// Take takes bytes of the capacity, as a file that is in another directory, or gives them back (n < 0). It fails as a
// reservation does.
func (f *FS) Take(n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > f.capacity-f.used-f.taken {
		return noSpace(syscall.ENOSPC)
	}
	f.taken += n
	return nil
}

// OnSync has fn called before and after each File.Sync, with the file's name,
// and each SyncDir, with ".". fn may use the FS, but not sync.
func (f *FS) OnSync(fn func(name string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onSync = fn
}

// FailAt makes the nth operation of a kind from now (1 is the next) fail with
// err. A write that fails has written its first half, in whole sectors. What a
// failed Sync covered is never durable for certain, even if a later one succeeds.
func (f *FS) FailAt(op Op, nth int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[op] = append(f.faults[op], fault{f.counts[op] + nth, err})
}

// Count returns how many operations of a kind there were, failed ones included.
func (f *FS) Count(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[op]
}

// Handles returns how many files are open.
func (f *FS) Handles() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.handles
}

// begin counts an operation and returns the error it is to fail with. The lock
// is held.
func (f *FS) begin(op Op) error {
	f.counts[op]++
	for _, ft := range f.faults[op] {
		if ft.at == f.counts[op] {
			return noSpace(ft.err)
		}
	}
	return nil
}

func noSpace(err error) error {
	if err == syscall.ENOSPC || err == syscall.EDQUOT {
		return fmt.Errorf("%w: %w", storage.ErrNoSpace, err)
	}
	return err
}

func (f *FS) next() uint64 {
	f.seq++
	return f.seq
}

// reserve counts an inode's space up to size. The lock is held.
func (f *FS) reserve(n *inode, size int64) error {
	more := size - n.reserved
	if more <= 0 || n.unlinked {
		return nil
	}
	if more > f.capacity-f.used-f.taken {
		return noSpace(syscall.ENOSPC)
	}
	n.reserved = size
	f.used += more
	return nil
}

func pathError(op Op, name string, err error) error {
	return &fs.PathError{Op: op.String(), Path: name, Err: err}
}

// Create implements storage.FS.
func (f *FS) Create(name string, size int64) (storage.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(OpCreate); err != nil {
		return nil, pathError(OpCreate, name, err)
	}
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || size < 0 {
		return nil, pathError(OpCreate, name, fs.ErrInvalid)
	}
	if f.names[name] != nil {
		return nil, pathError(OpCreate, name, fs.ErrExist)
	}
	n := newInode(newContent(), 0)
	if err := f.reserve(n, size); err != nil {
		return nil, pathError(OpCreate, name, err)
	}
	f.changeDir(name, n)
	if size > 0 {
		n.change(op{seq: f.next(), off: size})
	}
	return f.handle(name, n), nil
}

func (f *FS) changeDir(name string, n *inode) {
	d := dirOp{seq: f.next(), name: name, node: n}
	d.apply(f.names)
	f.dirOps = append(f.dirOps, d)
}

func (f *FS) handle(name string, n *inode) *file {
	f.handles++
	return &file{fs: f, name: name, node: n}
}

// Open implements storage.FS.
func (f *FS) Open(name string) (storage.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(OpOpen); err != nil {
		return nil, pathError(OpOpen, name, err)
	}
	n := f.names[name]
	if n == nil {
		return nil, pathError(OpOpen, name, fs.ErrNotExist)
	}
	return f.handle(name, n), nil
}

// Remove implements storage.FS. The file's space is free at once.
func (f *FS) Remove(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.begin(OpRemove); err != nil {
		return pathError(OpRemove, name, err)
	}
	n := f.names[name]
	if n == nil {
		return pathError(OpRemove, name, fs.ErrNotExist)
	}
	f.changeDir(name, nil)
	f.used -= n.reserved
	n.unlinked = true
	return nil
}

// SetAside implements storage.FS. What is set aside is not part of the directory: Aside tells its names.
func (f *FS) SetAside(name, as string) error {
	if err := f.Remove(name); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aside = append(f.aside, as)
	return nil
}

// PruneAside implements storage.FS.
func (f *FS) PruneAside(prefix string, keep int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	slices.Sort(f.aside)
	n := 0
	for _, name := range f.aside {
		if strings.HasPrefix(name, prefix) {
			n++
		}
	}
	f.aside = slices.DeleteFunc(f.aside, func(name string) bool {
		if !strings.HasPrefix(name, prefix) {
			return false
		}
		n--
		return n >= keep
	})
	return nil
}

// Aside returns the names of what was set aside.
func (f *FS) Aside() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.aside)
}

// List implements storage.FS.
func (f *FS) List() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.names)), nil
}

// SyncDir implements storage.FS.
func (f *FS) SyncDir() error {
	return f.sync(OpSyncDir, ".", func(err error) {
		if err == nil {
			f.durable, f.dirOps = maps.Clone(f.names), nil
		}
	})
}

// sync calls the hook, and finish with the lock held and the error to fail with.
func (f *FS) sync(op Op, name string, finish func(err error)) error {
	f.mu.Lock()
	hook := f.onSync
	f.mu.Unlock()
	if hook != nil {
		hook(name)
		defer hook(name)
	}
	f.mu.Lock()
	defer f.mu.Unlock() // before the hook is called again
	err := f.begin(op)
	finish(err)
	if err != nil {
		return pathError(op, name, err)
	}
	return nil
}

// Overwrites implements storage.FS.
func (f *FS) Overwrites() bool { return true }

// Free implements storage.FS.
func (f *FS) Free() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(0, f.capacity-f.used-f.taken), nil
}

// Close implements storage.FS. It does nothing.
func (f *FS) Close() error { return nil }
