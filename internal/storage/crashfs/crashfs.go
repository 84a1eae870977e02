// Package crashfs is a double of the engine's file layer that can lose power. It keeps files in memory, knows what has
// been made durable and in which order everything else was done, and makes images of what a power loss would leave. It
// can also make operations fail, and run out of space.
//
// It is stricter than most file systems: syncing a file's content does not make its name durable, and operations on
// different files, the sectors of one write, and the operations of the directory reach the disk in any order.
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
	OpRead
	opCount
)

var opNames = [opCount]string{"create", "open", "remove", "write", "truncate", "sync", "syncdir", "read"}

// String returns the operation's name.
func (o Op) String() string { return opNames[o] }

// dirOp is a change of the directory that is not durable yet: a creation, or a removal if node is nil.
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
	at  int // count of the operation that fails
	err error
}

// FS is a storage.FS in memory. It may be used concurrently.
type FS struct {
	mu       sync.Mutex        // guards all fields below, and every inode
	names    map[string]*inode // what the directory shows
	durable  map[string]*inode // the least that a power loss leaves
	dirOps   []dirOp           // the changes that turn durable into names, in order
	seq      uint64            // number of the last operation
	capacity int64
	used     int64 // bytes reserved by the inodes in names
	taken    int64 // bytes taken by files outside this directory
	handles  int
	counts   [opCount]int
	faults   [opCount][]fault
	total    int   // operations of all kinds
	failed   int   // operations that FailAt or GoneAt made fail
	goneAt   int   // the disk is gone from this operation on; 0: it stays
	gone     error // the error of each of them
	onSync   func(name string)
	aside    []string // names of the files that were set aside
}

var _ storage.FS = (*FS)(nil)

// New returns an empty directory without a limit.
func New() *FS {
	return &FS{names: map[string]*inode{}, durable: map[string]*inode{}, capacity: math.MaxInt64}
}

// SetCapacity limits the bytes that files may reserve, including those that exist already.
func (f *FS) SetCapacity(bytes int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.capacity = bytes
}

// Take takes n bytes of the capacity, like a file in another directory, or gives them back if n < 0. It fails with
// ENOSPC if there is less room, as a reservation does.
func (f *FS) Take(n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > f.capacity-f.used-f.taken {
		return noSpace(syscall.ENOSPC)
	}
	f.taken += n
	return nil
}

// OnSync makes the FS call fn before and after each File.Sync, with the file's name, and before and after each SyncDir,
// with ".". fn may use the FS, but must not sync.
func (f *FS) OnSync(fn func(name string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.onSync = fn
}

// FailAt makes the nth operation of a kind from now on (1 is the next) fail with err. A failing write still writes its
// first half, in whole sectors. What a failed Sync covered is never durable for certain, even if a later Sync succeeds.
func (f *FS) FailAt(op Op, nth int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[op] = append(f.faults[op], fault{f.counts[op] + nth, err})
}

// GoneAt makes every operation fail with err from the nth of all kinds on (1 is the next), as if the disk was pulled out.
func (f *FS) GoneAt(nth int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.goneAt, f.gone = f.total+nth, err
}

// Total returns the number of operations of all kinds so far, including failed ones.
func (f *FS) Total() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.total
}

// Count returns the number of operations of a kind so far, including failed ones.
func (f *FS) Count(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[op]
}

// Failed returns the number of operations that failed because of FailAt or GoneAt.
func (f *FS) Failed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}

// Handles returns the number of open files.
func (f *FS) Handles() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.handles
}

// begin counts an operation, and returns the error with which it must fail, or nil. The caller holds the lock.
func (f *FS) begin(op Op) error {
	f.counts[op]++
	f.total++
	if f.goneAt > 0 && f.total >= f.goneAt {
		f.failed++
		return noSpace(f.gone)
	}
	for _, ft := range f.faults[op] {
		if ft.at == f.counts[op] {
			f.failed++
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

// reserve makes the space that an inode has reserved at least size. The caller holds the lock.
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

// Remove implements storage.FS. The file's space becomes free at once.
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

// SetAside implements storage.FS. Files that were set aside are not part of the directory; Aside returns their names.
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

// Aside returns the names of the files that were set aside.
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

// sync calls the hook, then finish with the injected error or nil, with the lock held, and then the hook again.
func (f *FS) sync(op Op, name string, finish func(err error)) error {
	f.mu.Lock()
	hook := f.onSync
	f.mu.Unlock()
	if hook != nil {
		hook(name)
		defer hook(name)
	}
	f.mu.Lock()
	defer f.mu.Unlock() // released before the hook is called again
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
