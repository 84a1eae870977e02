package storage

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// There may be more open files than the process may have descriptors. A file has a descriptor while it is used, and
// keeps it until another file needs it: docs/engine.md, Open files.

const (
	leastDescriptors = 4
	mostDescriptors  = 16384

	// patience is how long an operation waits for a descriptor if the process or the system has no more and all of ours
	// are in use. Each is in use for only one system call, or one read on a ring.
	patience = 30 * time.Second
	retryIn  = 2 * time.Millisecond
)

// descriptor is an open file and the number of its users. The file itself counts as one.
type descriptor struct {
	*os.File
	refs atomic.Int32
	used atomic.Bool // used since the hand of the clock last passed
}

// acquire takes a reference. It returns false if the descriptor is closed, or about to be closed.
func (d *descriptor) acquire() bool {
	for {
		n := d.refs.Load()
		if n == 0 {
			return false
		}
		if d.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (d *descriptor) release() error {
	if d.refs.Add(-1) == 0 {
		return d.Close()
	}
	return nil
}

// table holds the files whose descriptor can be closed when another file needs one. A clock chooses among the
// descriptors that are not in use: it takes one that was not used since the hand last passed it.
type table struct {
	limit int // files that have a descriptor, as long as one that is not in use can be closed

	// mu guards the fields below, and file.at. It is taken while file.mu is held. While mu is held, the file.mu of
	// other files is taken only by TryLock.
	mu   sync.Mutex
	open []*file
	hand int
}

// descriptorLimit leaves most of the process's descriptors to other uses: sockets, devices, rings. (Go raises the soft
// limit to the hard one when the process starts.)
func descriptorLimit() int {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return leastDescriptors
	}
	return int(max(leastDescriptors, min(lim.Cur/4, mostDescriptors)))
}

func (t *table) full() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.open) >= t.limit
}

func (t *table) add(f *file) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f.at = len(t.open)
	t.open = append(t.open, f)
}

// remove removes a file from the table. It does nothing if the file is not in the table.
func (t *table) remove(f *file) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removeLocked(f)
}

func (t *table) removeLocked(f *file) {
	if f.at < 0 {
		return
	}
	last := len(t.open) - 1
	t.open[f.at] = t.open[last]
	t.open[f.at].at = f.at
	t.open[last] = nil
	t.open = t.open[:last]
	f.at = -1
}

// evict closes a descriptor that is not in use, and returns false if there is none. If its file was written to, evict
// first makes the writes durable, so that a failure to do so is not forgotten with the descriptor. If hasty is true, it
// leaves such files alone.
func (t *table) evict(hasty bool) bool {
	f, d := t.choose(func(f *file) bool { return f.clean() })
	if f == nil && !hasty {
		f, d = t.choose(func(*file) bool { return true })
	}
	if f == nil {
		return false
	}
	defer f.mu.Unlock()
	if err := f.syncTo(d); err != nil {
		d.refs.Store(1) // the descriptor stays open, and Sync returns the error
		f.pinned.Store(true)
		return t.evict(hasty)
	}
	f.desc.Store(nil)
	_ = d.Close() // everything written through it is durable
	return true
}

// choose removes a file from the table, and returns it with its lock held and its descriptor not in use; nil if there
// is none.
func (t *table) choose(suits func(*file) bool) (*file, *descriptor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range 2 * len(t.open) { // one round to clear the used flags, one to find a file
		if t.hand >= len(t.open) {
			t.hand = 0
		}
		f := t.open[t.hand]
		if !f.mu.TryLock() {
			t.hand++
			continue
		}
		d := f.desc.Load()
		if suits(f) && !d.used.Swap(false) && d.refs.CompareAndSwap(1, 0) {
			t.removeLocked(f)
			return f, d
		}
		f.mu.Unlock()
		t.hand++
	}
	return nil, nil
}

// tooMany reports whether err says that the process or the system has no more descriptors.
func tooMany(err error) bool { return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) }

// with calls open, which needs a descriptor. If there is none left, with closes another one and tries again. If all are
// in use, it waits for up to patience; a hasty caller gets the error at once.
func (t *table) with(hasty bool, open func() error) error {
	var until time.Time
	for {
		err := open()
		if !tooMany(err) {
			return err
		}
		if t.evict(hasty) {
			continue
		}
		if hasty {
			return err
		}
		now := time.Now()
		if until.IsZero() {
			until = now.Add(patience)
		}
		if now.After(until) {
			return fmt.Errorf("%w (waited %v for one; raise the limit of open files: ulimit -n)", err, patience)
		}
		time.Sleep(retryIn)
	}
}
