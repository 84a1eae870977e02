package ublk

import "sync/atomic"

// leave is what a queue is told about going away with its disk in use.
type leave uint32

const (
	leaveNot  leave = iota
	leaveSoon       // rest when nothing is with the handler, and wait for more news; it may be taken back
	leaveNow        // end when nothing is with the handler
	leaveDrop       // the same, and what arrives has nobody to go to
)

// drainer is the part of a queue that ends it while the driver still has requests for it.
//
// A queue that is to leave keeps what arrives from the handler. When it gets the handler's last answer it
// rests: it gives the driver that answer, and enters the ring no more. The driver hands out requests only on
// the queue's thread, when that enters the ring (DEFER_TASKRUN), so that from here on nothing arrives,
// however much there is to do: the queues of a device get there one after the other, and then end together.
//
// So there is also a command in the driver's hands when the queue ends: that of the last answer, or all if
// there was none. Before Linux 6.15 the driver notices the end of a queue only by the commands that it can
// cancel (ublk_uring_cmd_cancel_fn); if the server has every tag, by the block layer's timeout after 30
// seconds (ublk_timeout). Later drivers go by the char device's release (ublk_ch_release). In both what was
// kept, or not handed out, goes to the next server.
type drainer struct {
	// command is a leave, and in its upper bits a count that makes each telling another one. One goroutine tells
	// at a time.
	command atomic.Uint32
	rests   atomic.Uint32 // the command that the queue rests for, or restsForGood
	wakeup  chan struct{} // gets one, if there is none, when command or killed changes
	holds   bool          // what arrives may be left to the driver, which issues it again; set before the queue starts
	// The descriptors are not mapped yet. Set before the queue starts, taken back by its thread.
	early bool

	// Used by the queue's thread only.
	seen uint32 // the command that the loop goes by
	look bool   // look without waiting for what is under way
	held []int  // tags that arrived and were not handed out
	left bool   // the loop has ended here
}

const (
	leaveMask    = 3
	restsForGood = ^uint32(0) // the loop has ended
)

// leaveAs tells the queue, from any goroutine.
func (q *queue) leaveAs(l leave) {
	q.command.Store(q.command.Load()&^leaveMask + leaveMask + 1 + uint32(l))
	q.notify()
	q.wake()
}

// notify ends a rest.
func (q *queue) notify() {
	select {
	case q.wakeup <- struct{}{}:
	default:
	}
}

// resting reports, on any goroutine, whether the queue rests because of what it was told last.
func (q *queue) resting() bool {
	r := q.rests.Load()
	return r == restsForGood || r == q.command.Load()
}

func (q *queue) leaving() bool { return leave(q.seen&leaveMask) != leaveNot }

// idle reports whether the handler has no request.
func (q *queue) idle() bool { return q.owned == 0 && q.reading == 0 }

// finished reports whether the handler has no request and will get none. A request that the driver handed out
// before it was told to stop, and that is not held, shows up in one more turn.
func (q *queue) finished() bool { return q.idle() && (q.holding() || !q.look) }

// mayWait reports whether the loop has seen everything that it was told, and may wait for events.
func (q *queue) mayWait() bool { return !q.look && q.command.Load() == q.seen }

// leaves reports whether the loop ends here. It does not return while the queue rests.
func (q *queue) leaves() (bool, error) {
	for {
		command := q.command.Load()
		q.look = command != q.seen
		q.seen = command
		if !q.holding() && len(q.held) > 0 {
			if err := q.withRecover((*queue).serveHeld); err != nil {
				return false, err
			}
		}
		if !q.leaving() {
			return false, nil
		}
		q.commitLater()
		if !q.finished() {
			return false, nil
		}
		if err := q.flush(); err != nil || !q.idle() {
			return false, err
		}
		if q.pool != nil {
			q.pool.rest()
		}
		q.stats.publish(q.owned)
		if leave(command&leaveMask) >= leaveNow {
			return true, nil
		}
		if err := q.rest(command); err != nil {
			return false, err
		}
	}
}

// flush gives the driver all answers.
func (q *queue) flush() error {
	for {
		if q.killed.Load() {
			return errKilled
		}
		if done, err := q.transport.flush(); done || err != nil {
			return err
		}
		if err := q.withRecover((*queue).reap); err != nil {
			return err
		}
	}
}

// rest waits until the queue is told something else.
func (q *queue) rest(command uint32) error {
	q.rests.Store(command)
	for q.command.Load() == command {
		if q.killed.Load() {
			return errKilled
		}
		<-q.wakeup
	}
	return nil
}

// holding reports whether requests that arrive are kept from the handler.
func (q *queue) holding() bool {
	switch leave(q.seen & leaveMask) {
	case leaveNot:
		return false
	case leaveDrop:
		return true
	}
	return q.holds
}

// hold keeps a request that arrived from the handler: before the descriptors are mapped, and when the queue
// is to leave.
func (q *queue) hold(tag int) bool {
	if !q.early && !q.holding() {
		return false
	}
	q.held = append(q.held, tag)
	return true
}

// serveHeld hands out what was held, when the queue is to stay.
func (q *queue) serveHeld() error {
	for len(q.held) > 0 {
		tag := q.held[len(q.held)-1]
		q.held = q.held[:len(q.held)-1]
		q.dispatch(&q.requests[tag], q.transport.desc(tag))
	}
	return nil
}
