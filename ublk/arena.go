package ublk

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// arena is the buffer memory of all CopyUser queues of the process. Queues hold chunks of it only while they have
// requests. A chunk is locked, and as large as the largest request of the queues that take it.
//
// The arena maps a chunk when a queue needs one and none is free, up to limit. A chunk that a queue gives back stays
// mapped for the next queue. Every trimEvery, the arena unmaps as many chunks as have been free the whole time, except
// a reserve.
//
// The reserve is mapped before the first device is made. So a queue that needs memory when the machine has none gets
// some in the end: queues are served in the order in which they began to wait, and while any queue waits, every other
// one gives back its chunks as soon as its requests are done.
type arena struct {
	wanted atomic.Bool // some queue waits

	mu      sync.Mutex // guards the fields below; never held over a call that can wait for I/O of a device
	limit   int        // the most that mapped may be; only the reserve may exceed it
	mapped  int        // bytes
	classes map[int]*chunkClass
	waiting []waiter
	grants  []grant
	trim    *time.Timer // runs trimRoutine; nil before the first arm
	armed   bool        // trim is about to run
}

// chunkClass holds the chunks of one size.
type chunkClass struct {
	devices int
	locked  bool // every chunk that was mapped could be locked
	mapped  int  // free, lent or granted
	free    [][]byte
	low     int // the fewest chunks that were free at any time since trim was last started
}

// waiter is a queue that needs a chunk and has none.
type waiter struct {
	q    *queue
	size int
}

// grant is a chunk for a queue that waited. The queue has not taken it yet.
type grant struct {
	q     *queue
	chunk []byte
}

const (
	reserveChunks = 2 // per class; one would do, but then all queues could end up waiting for it
	trimEvery     = time.Second
	// arenaShare is the part of the machine's memory that the arena may have by default: an eighth.
	arenaShare = 8
)

func newArena(limit int) *arena { return &arena{limit: limit, classes: map[int]*chunkClass{}} }

// buffers is the process's arena.
var buffers = sync.OnceValue(func() *arena {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return newArena(256 << 20)
	}
	return newArena(int(info.Totalram * uint64(info.Unit) / arenaShare))
})

// SetBufferLimit bounds the buffer memory of all CopyUser devices of the process together. The default is an eighth of
// the machine's memory. Requests that need more wait until others end. For each maximum request size
// (Options.MaxIOBytes) in use, two buffers are always there.
func SetBufferLimit(bytes int64) {
	a := buffers()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.limit = int(bytes)
}

// join must be called before a device is made whose pools take chunks of the size. It maps the reserve. locked reports
// whether chunks can be locked.
func (a *arena) join(size int) (locked bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.classes[size]
	if c == nil {
		c = &chunkClass{locked: true}
		a.classes[size] = c
	}
	if c.devices == 0 {
		for len(c.free) < reserveChunks {
			chunk, err := a.mapChunk(c, size)
			if err != nil {
				a.unmap(c, size, len(c.free))
				return false, err
			}
			c.free = append(c.free, chunk)
		}
	}
	c.devices++
	return c.locked, nil
}

// leave is called at the end of a device that has joined.
func (a *arena) leave(size int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.classes[size]
	if c.devices--; c.devices == 0 {
		a.unmap(c, size, len(c.free))
		c.locked = true
	}
}

// take lends q a chunk, or returns nil. If wait is set, q is then woken when there is a chunk for it, and is served
// before the queues that begin to wait later.
func (a *arena) take(size int, q *queue, wait bool) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := slices.IndexFunc(a.grants, func(g grant) bool { return g.q == q }); i >= 0 {
		chunk := a.grants[i].chunk
		a.grants = slices.Delete(a.grants, i, i+1)
		return chunk
	}
	if len(a.waiting) == 0 {
		if chunk := a.find(size); chunk != nil {
			return chunk
		}
	}
	if wait && !slices.Contains(a.waiting, waiter{q, size}) {
		a.waiting = append(a.waiting, waiter{q, size})
		a.wanted.Store(true)
	}
	return nil
}

// find returns a free chunk, or maps one if the limit permits it. Otherwise it returns nil. a.mu is held.
func (a *arena) find(size int) []byte {
	c := a.classes[size]
	if n := len(c.free) - 1; n >= 0 {
		chunk := c.free[n]
		c.free = c.free[:n]
		c.low = min(c.low, n)
		return chunk
	}
	if a.mapped+size > a.limit && c.mapped >= reserveChunks {
		return nil
	}
	chunk, err := a.mapChunk(c, size)
	if err != nil {
		return nil // as at the limit: chunks are lent, at least the reserve, and come back
	}
	return chunk
}

// put takes a chunk back, and wakes the queue that has waited longest if there is now a chunk for it.
func (a *arena) put(chunk []byte) {
	if q := a.pass(chunk); q != nil {
		q.granted.Store(true)
		q.wake()
	}
}

// pass is put without the waking: it returns the queue to wake, or nil.
func (a *arena) pass(chunk []byte) *queue {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.classes[len(chunk)]
	c.free = append(c.free, chunk)
	if len(c.free) > reserveChunks && !a.armed {
		a.arm()
	}
	if len(a.waiting) == 0 {
		return nil
	}
	w := a.waiting[0]
	if w.size != len(chunk) && a.mapped+w.size > a.limit && len(c.free) > reserveChunks {
		a.unmap(c, len(chunk), 1) // this makes room for the waiter's size, though maybe not enough yet
	}
	got := a.find(w.size)
	if got == nil {
		return nil
	}
	a.grants = append(a.grants, grant{w.q, got})
	a.stopWaiting(w.q)
	return w.q
}

// stopWaiting removes q from the waiting queues. a.mu is held.
func (a *arena) stopWaiting(q *queue) {
	a.waiting = slices.DeleteFunc(a.waiting, func(w waiter) bool { return w.q == q })
	a.wanted.Store(len(a.waiting) > 0)
}

// forget is called at the end of a queue. It takes back the queue's grant, if there is one.
func (a *arena) forget(q *queue) {
	a.mu.Lock()
	a.stopWaiting(q)
	var chunk []byte
	if i := slices.IndexFunc(a.grants, func(g grant) bool { return g.q == q }); i >= 0 {
		chunk = a.grants[i].chunk
		a.grants = slices.Delete(a.grants, i, i+1)
	}
	a.mu.Unlock()
	if chunk != nil {
		a.put(chunk)
	}
}

// arm schedules trimRoutine. a.mu is held.
func (a *arena) arm() {
	a.armed = true
	for _, c := range a.classes {
		c.low = len(c.free)
	}
	if a.trim == nil {
		a.trim = time.AfterFunc(trimEvery, a.trimRoutine)
		return
	}
	a.trim.Reset(trimEvery)
}

// trimRoutine unmaps the chunks that were not needed since arm. It is scheduled again as long as there is more than the
// reserve.
func (a *arena) trimRoutine() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = false
	more := false
	for size, c := range a.classes {
		if spare := min(c.low, len(c.free)-reserveChunks); spare > 0 {
			a.unmap(c, size, spare)
		}
		more = more || len(c.free) > reserveChunks
	}
	if more {
		a.arm()
	}
}

// mapChunk makes a chunk. a.mu is held.
func (a *arena) mapChunk(c *chunkClass, size int) ([]byte, error) {
	chunk, locked, err := mapAnonymous(size)
	if err != nil {
		return nil, err
	}
	c.locked = c.locked && locked
	a.mapped += size
	c.mapped++
	return chunk, nil
}

// unmap unmaps the n chunks of a class that have been free for longest. a.mu is held.
func (a *arena) unmap(c *chunkClass, size, n int) {
	for _, chunk := range c.free[:n] {
		_ = unix.Munmap(chunk) // cannot fail: mapChunk mapped it
		a.mapped -= size
		c.mapped--
	}
	c.free = slices.Delete(c.free, 0, n)
	c.low = min(c.low, len(c.free))
}
