package ublk

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// arena is the buffer memory of the process's queues with CopyUser. It is mapped in chunks, each locked and
// large enough for the largest request of those who take it; queues have some only while they have requests.
//
// It maps a chunk when one is asked for and none is free, up to limit. A chunk that comes back stays mapped
// for the next one who asks. How many have been free all the time between two looks, beyond a reserve, nobody
// needs: those are unmapped. The reserve is mapped before the first device is made, so that a queue that
// needs memory when the machine has none gets it sooner or later: who has to wait is served first, and
// meanwhile every queue gives back what it has as soon as its requests are done.
type arena struct {
	wanted atomic.Bool // queues wait

	mu      sync.Mutex // guards what follows; never held over a call that can wait for I/O of a device
	limit   int        // of mapped
	mapped  int        // bytes
	classes map[int]*chunkClass
	waiting []waiter
	grants  []grant
	trim    *time.Timer // runs while there is more than the reserve
	armed   bool
}

// chunkClass is the chunks of one size.
type chunkClass struct {
	devices int
	locked  bool // all that were mapped could be locked
	mapped  int  // free, lent or granted
	free    [][]byte
	low     int // the fewest that were free since the last look
}

// waiter is a queue that has no chunk and needs one.
type waiter struct {
	q    *queue
	size int
}

// grant is a chunk that a queue has waited for and not taken yet.
type grant struct {
	q     *queue
	chunk []byte
}

const (
	reserveChunks = 2 // of each class; more than one only so that not all wait for one
	trimEvery     = time.Second
	// arenaShare is the part of the machine's memory that the arena may have unless it is told.
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

// SetBufferLimit bounds the buffer memory of all CopyUser devices of the process together. The default is an
// eighth of the machine's memory. Requests that need more wait until others end. For each maximum request
// size (Options.MaxIOBytes) in use, two buffers are always there.
func SetBufferLimit(bytes int64) {
	a := buffers()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.limit = int(bytes)
}

// join is called before a device is made whose pools take chunks of size. From then on the reserve is there.
// locked reports whether chunks can be locked.
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

// leave is the end of a device that has joined.
func (a *arena) leave(size int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.classes[size]
	if c.devices--; c.devices == 0 {
		a.unmap(c, size, len(c.free))
		c.locked = true
	}
}

// take lends a chunk, or returns nil. With wait q is woken when it may ask again, and is served before
// those that come later.
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

// find returns a chunk that is free or may be mapped. a.mu is held.
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
		return nil // as at the limit: the reserve, at least, has been lent and comes back
	}
	return chunk
}

// put takes a chunk back, and passes it on to the queue that has waited longest.
func (a *arena) put(chunk []byte) {
	if q := a.pass(chunk); q != nil {
		q.granted.Store(true)
		q.wake()
	}
}

// pass is put without waking: it returns who is to be woken.
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
		a.unmap(c, len(chunk), 1) // which makes room, though maybe not enough yet
	}
	got := a.find(w.size)
	if got == nil {
		return nil
	}
	a.grants = append(a.grants, grant{w.q, got})
	a.stopWaiting(w.q)
	return w.q
}

// stopWaiting removes q from those who wait. a.mu is held.
func (a *arena) stopWaiting(q *queue) {
	a.waiting = slices.DeleteFunc(a.waiting, func(w waiter) bool { return w.q == q })
	a.wanted.Store(len(a.waiting) > 0)
}

// forget is the end of a queue.
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

// arm has trimRoutine run after a while. a.mu is held.
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

// trimRoutine unmaps what nobody has needed since it was armed. It runs for a moment, while there is
// something to unmap.
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

// unmap removes n of the free chunks of a class, those that were free longest. a.mu is held.
func (a *arena) unmap(c *chunkClass, size, n int) {
	for _, chunk := range c.free[:n] {
		_ = unix.Munmap(chunk) // it is one that mapChunk made
		a.mapped -= size
		c.mapped--
	}
	c.free = slices.Delete(c.free, 0, n)
	c.low = min(c.low, len(c.free))
}
