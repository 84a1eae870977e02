package nbd

import (
	"sync"
	"time"
)

// requestCharge is charged for a request in addition to its buffers, so that requests without buffers are limited, too.
// It covers the task, and a packet with the headers and the vector of as many chunks as a READ is answered with.
const requestCharge = 8 << 10

// memory limits what all connections of a server have under way together. Waiting connections are served in the order
// in which they asked.
type memory struct {
	max int64

	mu      sync.Mutex // guards the fields below, and those of the budgets
	used    int64
	unsent  int64     // replies that paused connections keep for the next server
	waiting []*budget // budgets whose receivers wait for others to release, the longest-waiting first
}

// budget limits what one connection has under way. Only the receiver acquires; any goroutine releases. The charge is
// the size of the buffers, not the number of bytes in them.
type budget struct {
	all *memory
	max int64

	// Guarded by all.mu.
	used int64
	need int64 // what the receiver waits for; 0: it does not wait

	granted chan struct{} // the receiver has got need
}

func newBudget(all *memory, limit int64) *budget {
	return &budget{all: all, max: limit, granted: make(chan struct{}, 1)}
}

// fitsHere reports whether n more stays within the connection's limit, and fitsAll whether it stays within the
// server's. One request always fits, however large. The caller holds all.mu.
func (b *budget) fitsHere(n int64) bool { return b.used == 0 || b.used+n <= b.max }
func (m *memory) fitsAll(n int64) bool  { return m.used == 0 || m.used+n <= m.max }

// tryAcquire takes n if that is possible without waiting.
func (b *budget) tryAcquire(n int64) bool {
	m := b.all
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.waiting) > 0 || !b.fitsHere(n) || !m.fitsAll(n) {
		return false
	}
	b.used += n
	m.used += n
	return true
}

// acquire waits until it can take n. A reply releases its charge when it is sent, or dropped because its connection is
// broken, so acquire ends unless clients take no replies. Each time it has waited for patience because of what other
// connections hold, it calls starved, which should end the shortage.
func (b *budget) acquire(n int64, patience time.Duration, starved func()) {
	if b.tryAcquire(n) {
		return
	}
	m := b.all
	m.mu.Lock()
	b.need = n
	if b.fitsHere(n) {
		m.waiting = append(m.waiting, b)
		m.grant()
	}
	m.mu.Unlock()
	for {
		timer := time.NewTimer(patience)
		select {
		case <-b.granted:
			timer.Stop()
			return
		case <-timer.C:
			if b.waitsForOthers() {
				starved()
			}
		}
	}
}

// keep counts n more bytes of replies for the next server, and reports whether they may be kept.
func (m *memory) keep(n int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.unsent+n > min(m.max, maxUnsent) {
		return false
	}
	m.unsent += n
	return true
}

// forget begins to count anew what is kept.
func (m *memory) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unsent = 0
}

func (b *budget) waitsForOthers() bool {
	b.all.mu.Lock()
	defer b.all.mu.Unlock()
	return b.need > 0 && b.fitsHere(b.need)
}

func (b *budget) release(n int64) {
	if n == 0 {
		return
	}
	m := b.all
	m.mu.Lock()
	defer m.mu.Unlock()
	couldNot := b.need > 0 && !b.fitsHere(b.need)
	b.used -= n
	m.used -= n
	if couldNot && b.fitsHere(b.need) { // from now on only the others are in its way
		m.waiting = append(m.waiting, b)
	}
	m.grant()
}

// grant gives waiting receivers what they need, in their order, until one does not fit. The caller holds mu.
func (m *memory) grant() {
	for len(m.waiting) > 0 {
		b := m.waiting[0]
		if !m.fitsAll(b.need) {
			return
		}
		m.waiting[0] = nil
		m.waiting = m.waiting[1:]
		b.used += b.need
		m.used += b.need
		b.need = 0
		b.granted <- struct{}{}
	}
}
