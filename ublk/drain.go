package ublk

import "sync/atomic"

// leave is a command to a queue whose disk stays in use: whether it must leave, and how.
type leave uint32

const (
	leaveNot  leave = iota
	leaveSoon       // rest when the handler has no request, and wait for the next command; leaveNot may follow
	leaveNow        // end when the handler has no request
	leaveDrop       // as leaveNow, and no server will follow: requests that arrive are kept from the handler, and fail
)

// drainer is the part of a queue that ends it while the driver still has requests for it.
//
// A queue that must leave no longer passes new requests to the handler. After the handler's last answer the queue
// rests: it gives that answer to the driver, and does not enter the ring again. The driver hands out requests only when
// the queue's thread enters the ring (DEFER_TASKRUN). So from then on no request arrives, however busy the disk is. The
// queues of a device come to rest one after the other, and then end together.
//
// This also makes sure that the driver has a command of the queue when the queue ends: that of the last answer, or all
// of them if there was no answer. Before Linux 6.15 the driver needs such a command to notice the end of a queue,
// because it notices when it can cancel one (ublk_uring_cmd_cancel_fn). If the server has every tag, the driver notices
// only after the block layer's timeout of 30 seconds (ublk_timeout). Later drivers notice when the char device is
// closed (ublk_ch_release). In both cases, requests that were kept or not handed out go to the next server.
type drainer struct {
	// command is a leave in its low bits, and a count in its upper bits that makes each command a new one. Only one
	// goroutine at a time sets it.
	command atomic.Uint32
	rests   atomic.Uint32 // the command that made the queue rest, or restsForGood
	wakeup  chan struct{} // has room for one signal; gets it when command or killed changes
	// holds is set, before the queue starts, if the driver issues requests again that the queue leaves unanswered.
	holds bool
	// early is set while the descriptors are not mapped yet. The queue's thread clears it.
	early bool

	// Used by the queue's thread only.
	seen uint32 // the command that the loop obeys
	look bool   // the command is new: look once more for requests that are under way, without waiting
	held []int  // tags that arrived and were kept from the handler
	left bool   // the loop has ended because of a command
}

const (
	leaveMask    = 3
	restsForGood = ^uint32(0) // the loop has ended
)

// leaveAs gives the queue a command. It may be called on any goroutine, but only on one at a time.
func (q *queue) leaveAs(l leave) {
	q.command.Store(q.command.Load()&^leaveMask + leaveMask + 1 + uint32(l))
	q.notify()
	q.wake()
}

// notify ends the wait in rest, so that it looks at command and killed again.
func (q *queue) notify() {
	select {
	case q.wakeup <- struct{}{}:
	default:
	}
}

// resting reports whether the queue rests because of its last command. It may be called on any goroutine.
func (q *queue) resting() bool {
	r := q.rests.Load()
	return r == restsForGood || r == q.command.Load()
}

func (q *queue) leaving() bool { return leave(q.seen&leaveMask) != leaveNot }

// idle reports whether the handler has no request.
func (q *queue) idle() bool { return q.owned == 0 && q.reading == 0 }

// finished reports whether the handler has no request and will get none. If the queue does not hold requests, the
// driver may have handed some out before the command; they show up in one more turn of the loop.
func (q *queue) finished() bool { return q.idle() && (q.holding() || !q.look) }

// mayWait reports whether the loop has seen the last command, and so may wait for events.
func (q *queue) mayWait() bool { return !q.look && q.command.Load() == q.seen }

// leaves obeys the last command, and reports whether the loop must end. While the queue rests, leaves does not return.
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

// rest waits until the queue has another command.
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

// hold keeps an arrived request from the handler, and reports whether it did: while the descriptors are not mapped, and
// when the queue must leave.
func (q *queue) hold(tag int) bool {
	if !q.early && !q.holding() {
		return false
	}
	q.held = append(q.held, tag)
	return true
}

// serveHeld passes the held requests to the handler, when the queue stays after all.
func (q *queue) serveHeld() error {
	for len(q.held) > 0 {
		tag := q.held[len(q.held)-1]
		q.held = q.held[:len(q.held)-1]
		q.dispatch(&q.requests[tag], q.transport.desc(tag))
	}
	return nil
}
