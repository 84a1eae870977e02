package nbd

import "sync"

// requestCharge is what a request counts for beside its payload, so that requests without one are
// bounded too. It is more than the server keeps of it.
const requestCharge = 1 << 10

// budget bounds what one connection has under way. Only the receiver acquires; anyone releases.
type budget struct {
	max int64

	mu    sync.Mutex // guards used
	freed sync.Cond  // signalled when used shrinks
	used  int64
}

func newBudget(limit int64) *budget {
	b := &budget{max: limit}
	b.freed.L = &b.mu
	return b
}

// tryAcquire takes n if that is possible now. One request is always possible, however large.
func (b *budget) tryAcquire(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used > 0 && b.used+n > b.max {
		return false
	}
	b.used += n
	return true
}

// acquire waits until n can be taken. It ends because every reply is sent, or dropped when the
// connection breaks, and releases its charge.
func (b *budget) acquire(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.used > 0 && b.used+n > b.max {
		b.freed.Wait()
	}
	b.used += n
}

func (b *budget) release(n int64) {
	if n == 0 {
		return
	}
	b.mu.Lock()
	b.used -= n
	b.mu.Unlock()
	b.freed.Signal()
}
