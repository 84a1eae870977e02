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

// Files outnumber the descriptors that a process may have. A file has one while it is used, and keeps it until others
// need it: docs/engine.md, Open files.

const (
	leastDescriptors = 4
	mostDescriptors  = 16384

	// patience is how long an operation waits for a descriptor when the process, or the system, has no more and all of
	// ours are in use; each is in use for one system call, or one read on a ring.
	patience = 30 * time.Second
	retryIn  = 2 * time.Millisecond
)

// descriptor is an open file and the number of its users, of which the file itself is one.
type descriptor struct {
	*os.File
	refs atomic.Int32
	used atomic.Bool // since the hand of the clock last passed
}

// acquire takes a reference; false: the descriptor is closed, or about to be.
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

// table holds the files that have a descriptor that can be closed when another file needs it. The choice is a clock's:
// of those not in use, one that was not used since the hand passed it last.
type table struct {
	limit int // how many files have one, as long as others than those in use can be closed

	mu   sync.Mutex // guards the fields below, and file.at; taken under file.mu, and takes others' file.mu only by TryLock
	open []*file
	hand int
}

// descriptorLimit leaves most of what the process may have to others: sockets, devices, rings. (Go raises the soft limit
// to the hard one when the process starts.)
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

// remove does nothing for a file that is not in the table.
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

// evict closes a descriptor that nobody uses; false: there is none. Of a file that was written to, what was written is
// made durable before, so that a failure to do so is not forgotten with the descriptor; a hasty caller leaves such
// files alone.
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
		d.refs.Store(1) // it stays open, and Sync returns the error
		f.pinned.Store(true)
		return t.evict(hasty)
	}
	f.desc.Store(nil)
	_ = d.Close() // everything in it is durable
	return true
}

// choose takes a file out of the table, with its lock held and nobody using its descriptor; nil: there is none.
func (t *table) choose(suits func(*file) bool) (*file, *descriptor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for range 2 * len(t.open) { // once round to forget what was used, once to find
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

// with calls open, which needs a descriptor, and closes others if there is none left. A hasty caller does not wait
// where all are in use.
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
