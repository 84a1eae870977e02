package ublk

import "sync/atomic"

// leave is what a queue is told about going away with its disk in use.
type leave int32

const (
	leaveNot  leave = iota
	leaveSoon       // hold what arrives, and tell when nothing is with the handler; it may be taken back
	leaveNow        // end as soon as nothing is with the handler
	leaveDrop       // the same, and what arrives has nobody to go to
)

// leaver is the part of a queue that ends it while the driver still has requests for it.
type leaver struct {
	told    atomic.Int32 // leave, by any goroutine
	resting atomic.Bool  // nothing is with the handler; for any goroutine
	holds   bool         // what arrives may be left to the driver, which issues it again; set before the queue starts
	// The descriptors are not mapped yet. Set before the queue starts, taken back by its thread.
	early bool

	// Used by the queue's thread only.
	seen leave
	look bool  // look without waiting for what is under way
	held []int // tags that arrived since leaveSoon and were not handed out
	left bool  // the loop has ended here
}

// leaveAs tells the queue, from any goroutine.
func (q *queue) leaveAs(l leave) {
	q.told.Store(int32(l))
	q.wake()
}

// mayWait tells whether the loop has seen all that it was told, and may wait for events.
func (q *queue) mayWait() bool { return !q.look && leave(q.told.Load()) == q.seen }

// mayLeave tells whether the loop ends here. It does so at a moment when nothing is with the handler.
func (q *queue) mayLeave() bool {
	l := leave(q.told.Load())
	q.look = l != q.seen // what the driver handed out before shows up in one more turn
	q.seen = l
	if l == leaveNot {
		q.resting.Store(false)
		_ = q.guarded((*queue).serveHeld)
		return false
	}
	rest := !q.look && q.owned == 0 && q.reading == 0
	q.resting.Store(rest)
	return rest && l >= leaveNow
}

// serveHeld hands out what was held, when the queue is to stay.
func (q *queue) serveHeld() error {
	for len(q.held) > 0 {
		tag := q.held[len(q.held)-1]
		q.held = q.held[:len(q.held)-1]
		q.dispatch(&q.requests[tag], q.port.desc(tag))
	}
	return nil
}

// goAway hands over the last answers. A port may need a second turn for what the driver did not take in the first; what
// arrives is the driver's to give to somebody else.
func (q *queue) goAway() error {
	q.left = true
	for range 3 {
		if err := q.port.turn(false); err != nil {
			return err
		}
		for ok := true; ok; {
			_, ok = q.port.next()
		}
	}
	return nil
}

// hold keeps a request that arrived from the handler: before the descriptors are mapped, and when the queue is to leave.
// Then one tag stays with the driver: before Linux 6.15 it notices the end of a queue by the fetches that it can give back,
// and if there is none, after 30 seconds.
func (q *queue) hold(tag int) bool {
	switch {
	case q.early:
	case q.seen == leaveNot || !q.holds && q.seen != leaveDrop:
		return false
	case q.owned+q.ended+len(q.held)+1 >= q.depth:
		return false
	}
	q.held = append(q.held, tag)
	return true
}
