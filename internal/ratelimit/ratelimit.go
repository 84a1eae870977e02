// Package ratelimit lets the requests of a volume begin at a limited rate: docs/operations.md, Limits of a volume. It
// knows nothing of volumes.
//
// golang.org/x/time/rate has another behaviour: it never admits a request that is larger than the burst, and who waits
// goes on waiting for as long as the limit asked that held when it came.
package ratelimit

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// kind is which requests a limit counts.
type kind int

const (
	all kind = iota
	reads
	writes
	kinds
)

// DefaultBurst is for how long a limit is saved up if Limits does not say so. A timer may be late, and what it was late
// by must not be lost.
const DefaultBurst = 100 * time.Millisecond

// Limits are the most requests and bytes in a second: of all requests, of reads, and of writes. 0 is no limit.
type Limits struct {
	Ops, Bytes [kinds]int64
	// Burst is for how long what is not used is saved up. Requests may then begin at once until that is used up.
	Burst time.Duration
}

// IsNone reports whether nothing is limited.
func (l Limits) IsNone() bool { return l.Ops == [kinds]int64{} && l.Bytes == [kinds]int64{} }

// bucket is one limit. Its state is a time: until then, what has begun uses up the limit. If that lies behind, the time
// since is saved up, as far as the burst goes. Something of any size may be counted once nothing is owed, and what comes
// after it waits for it. A request counts part by part (Limiter.part), so nobody waits long for what another one asked.
type bucket struct {
	rate int64 // a second; 0: no limit
	paid time.Time
}

// charge counts n requests or bytes.
func (b *bucket) charge(now time.Time, burst time.Duration, n int64) {
	if b.rate == 0 || n == 0 {
		return
	}
	if saved := now.Add(-burst); b.paid.Before(saved) {
		b.paid = saved
	}
	cost := float64(n) / float64(b.rate) * float64(time.Second)
	b.paid = b.paid.Add(time.Duration(min(cost, math.MaxInt64/4)))
}

// set changes the rate. What is owed stays owed, at the new rate. Nothing stays saved up.
func (b *bucket) set(now time.Time, rate int64) {
	owed := max(0, b.paid.Sub(now))
	switch {
	case rate == 0 || b.rate == 0:
		owed = 0
	case rate != b.rate:
		owed = time.Duration(min(float64(owed)*float64(b.rate)/float64(rate), math.MaxInt64/4))
	}
	if rate != b.rate || owed > 0 {
		b.paid = now.Add(owed)
	}
	b.rate = rate
}

// Limiter admits requests at a limited rate, reads among reads and writes among writes in the order in which they came.
// The zero value has no limit.
type Limiter struct {
	on atomic.Bool // there is a limit

	mu         sync.Mutex // guards the fields below
	limits     Limits
	ops, bytes [kinds]bucket
	first      [kinds]*Turn // the requests that wait, for reads and for writes
	last       [kinds]*Turn
	latest     kind // of the one that was counted last
	timer      *time.Timer
}

// Turn is a request that waits for its turn.
type Turn struct {
	l     *Limiter
	kind  kind
	begun bool  // it is counted as a request
	left  int64 // bytes that are not counted yet
	next  *Turn
	ready chan struct{}
}

// Ready is closed when the request may begin. What it takes is counted by then.
func (t *Turn) Ready() <-chan struct{} { return t.ready }

// Admit counts a request, and returns nil if it may begin now. Otherwise the rest of it is counted until its turn comes,
// which has to be waited for or cancelled. A nil Limiter has no limit.
func (l *Limiter) Admit(write bool, bytes int64) *Turn {
	if l == nil || !l.on.Load() {
		return nil
	}
	k := reads
	if write {
		k = writes
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.admitWaiting(now)
	t := Turn{l: l, kind: k, left: bytes}
	for l.first[k] == nil && !l.due(&t).After(now) {
		if l.chargePart(now, &t) {
			return nil
		}
	}
	return l.queue(now, t)
}

// queue makes a request wait. The caller holds mu.
func (l *Limiter) queue(now time.Time, of Turn) *Turn {
	t, k := &of, of.kind
	t.ready = make(chan struct{})
	if l.first[k] == nil {
		l.first[k] = t
	} else {
		l.last[k].next = t
	}
	l.last[k] = t
	l.arm(now)
	return t
}

// Cancel gives up a request that waits. What is not counted of it by then is not counted.
func (t *Turn) Cancel() {
	l := t.l
	l.mu.Lock()
	defer l.mu.Unlock()
	var before *Turn
	for at := l.first[t.kind]; at != nil; before, at = at, at.next {
		if at != t {
			continue
		}
		if before == nil {
			l.first[t.kind] = t.next
		} else {
			before.next = t.next
		}
		if l.last[t.kind] == t {
			l.last[t.kind] = before
		}
		break
	}
	l.wake()
}

// Set changes the limits, also for the requests that wait.
func (l *Limiter) Set(limits Limits) {
	if limits.Burst == 0 {
		limits.Burst = DefaultBurst
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if limits == l.limits {
		return
	}
	l.limits = limits
	now := time.Now()
	for k := range kinds {
		l.ops[k].set(now, limits.Ops[k])
		l.bytes[k].set(now, limits.Bytes[k])
	}
	l.on.Store(!limits.IsNone())
	l.wake()
}

// Limits returns the present limits.
func (l *Limiter) Limits() Limits {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limits
}

// due returns when the next part of a request may be counted. The caller holds mu.
func (l *Limiter) due(t *Turn) time.Time {
	var due time.Time
	for _, k := range [...]kind{all, t.kind} {
		if b := &l.ops[k]; !t.begun && b.paid.After(due) {
			due = b.paid
		}
		if b := &l.bytes[k]; b.paid.After(due) {
			due = b.paid
		}
	}
	return due
}

// A part of a request is as many bytes as may be transferred in a second / partsASecond, or leastPart if that is more.
const (
	partsASecond = 10
	leastPart    = 4096
)

// part returns how many bytes are counted at a time. Those of the other kind wait for no more than that, however long a
// request is. The caller holds mu.
func (l *Limiter) part(t *Turn) int64 {
	n := t.left
	for _, k := range [...]kind{all, t.kind} {
		if rate := l.bytes[k].rate; rate != 0 {
			n = min(n, max(rate/partsASecond, leastPart))
		}
	}
	return n
}

// chargePart counts a part of a request, and reports whether it was the last one. The caller holds mu.
func (l *Limiter) chargePart(now time.Time, t *Turn) bool {
	n := l.part(t)
	for _, k := range [...]kind{all, t.kind} {
		if !t.begun {
			l.ops[k].charge(now, l.limits.Burst, 1)
		}
		l.bytes[k].charge(now, l.limits.Burst, n)
	}
	l.latest = t.kind
	t.begun = true
	t.left -= n
	return t.left == 0
}

// admitWaiting lets those begin that wait and are due. If a read and a write are, they take turns, part by part. The caller
// holds mu.
func (l *Limiter) admitWaiting(now time.Time) {
	for {
		var t *Turn
		for _, k := range [...]kind{reads, writes} {
			if of := l.first[k]; of != nil && !l.due(of).After(now) && (t == nil || t.kind == l.latest) {
				t = of
			}
		}
		if t == nil {
			return
		}
		if !l.chargePart(now, t) {
			continue
		}
		if l.first[t.kind] = t.next; t.next == nil {
			l.last[t.kind] = nil
		}
		close(t.ready)
	}
}

// wake lets those begin that are due now, and comes back for the others. The caller holds mu.
func (l *Limiter) wake() {
	now := time.Now()
	l.admitWaiting(now)
	l.arm(now)
}

// arm sets the timer for the next of those that wait. The caller holds mu.
func (l *Limiter) arm(now time.Time) {
	var due time.Time
	for _, k := range [...]kind{reads, writes} {
		if t := l.first[k]; t != nil {
			if d := l.due(t); due.IsZero() || d.Before(due) {
				due = d
			}
		}
	}
	switch {
	case due.IsZero():
		if l.timer != nil {
			l.timer.Stop()
		}
	case l.timer == nil:
		l.timer = time.AfterFunc(due.Sub(now), l.timed)
	default:
		l.timer.Reset(due.Sub(now))
	}
}

func (l *Limiter) timed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wake()
}
