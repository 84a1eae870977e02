package web

import (
	"context"
	"sync"
	"time"
)

// kept is a value that costs the store something to read. It is read when somebody asks for it, once for all that ask at
// the same time. It is kept for a while, and for longer if it took long: so that, however often it is asked for, it
// is read for a part of 1/times of the time.
type kept[T any] struct {
	s     *server
	what  string // for the log
	load  func(context.Context, Source) (T, error)
	least time.Duration // for which it is kept
	times int           // as long as it took, for which it is kept, too

	mu    sync.Mutex // guards the fields below
	value T
	at    time.Time     // when it was read; zero: never
	err   error         // of the last reading; value and at are those of an earlier one
	until time.Time     // when it is to be read again
	done  chan struct{} // closed when the reading under way ends; nil: there is none
	told  told
}

// told is when the log was told of an error.
type told struct{ at time.Time }

// again reports whether the log is to be told of an error: once a minute, however often somebody asks for the page.
func (t *told) again(now time.Time) bool {
	if now.Sub(t.at) < time.Minute {
		return false
	}
	t.at = now
	return true
}

// get returns the value, the time at which it was read, and why it could not be read lately. It waits for at most wait for
// a reading under way, and then returns the last one, which may be none.
func (k *kept[T]) get(ctx context.Context, wait time.Duration) (T, time.Time, error) {
	if done := k.begin(); done != nil {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-done:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.value, k.at, k.err
}

// begin begins a reading if it is time for one. It returns nil if there is none under way.
func (k *kept[T]) begin() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.done != nil || k.s.now().Before(k.until) {
		return k.done
	}
	k.done = make(chan struct{})
	k.s.work.Go(k.read) // the caller is a request, so work is more than 0
	return k.done
}

func (k *kept[T]) read() {
	begun := k.s.now()
	var value T
	from, err := k.s.source()
	if err == nil {
		value, err = k.load(k.s.life, from)
	}
	ended := k.s.now()
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil && k.s.life.Err() == nil && k.told.again(ended) {
		k.s.Log.Warn("a part of the page cannot be read", "part", k.what, "err", err)
	}
	if k.err = err; err == nil {
		k.value, k.at = value, ended
	}
	k.until = ended.Add(max(k.least, time.Duration(k.times)*ended.Sub(begun)))
	close(k.done)
	k.done = nil
}
