package ublk

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// queue is one hardware queue: a loop on one thread that takes requests from its transport, passes them to the handler,
// and commits the answers.
//
// A tag is in one of three states: with the driver (its fetch is under way), ours (dispatched and not committed), or
// ended (the driver aborted it). The loop runs until every tag has ended, which happens only after the driver has
// drained all requests. It also ends after kill, when the device cannot be saved: closing the ring then makes the
// driver fail the open requests.
type queue struct {
	id        int
	depth     int
	ioMax     int
	handler   Handler
	fetcher   Fetcher // handler, if it implements Fetcher
	report    func(error)
	transport transport

	stats *queueCounters

	requests []Request
	pool     *pool         // with CopyUser: lends buffers to requests
	starved  requestFIFO   // requests waiting for a buffer
	serving  *Request      // the request that the handler is working on right now
	now      time.Duration // arrival of the completions that are being reaped
	yielded  time.Duration // when the loop last let the scheduler run
	reads    []readSlot    // fetches under way, by slot
	free     []int         // unused slots
	owned    int           // tags that are ours
	ended    int           // tags that the driver aborted
	reading  int           // fetches under way

	later  laterList    // answers from other goroutines
	asleep atomic.Bool  // the loop waits or is about to, so an answer must interrupt it
	waking atomic.Int32 // goroutines about to interrupt the loop
	// granted is set when the arena has a chunk that the queue has waited for.
	granted atomic.Bool
	killed  atomic.Bool

	drainer
}

var (
	errKilled  = errors.New("ublk: queue killed")
	errRefused = errors.New("the driver refused the command")
)

// newQueue makes the queue's state. buf holds depth buffers of ioMax bytes. With CopyUser buf is nil, and requests get
// buffers from a.
func newQueue(mode CopyMode, id, depth, ioMax int, buf []byte, a *arena, h Handler, report func(error)) *queue {
	q := &queue{
		id: id, depth: depth, ioMax: ioMax, handler: h, report: report, requests: make([]Request, depth),
		stats: newQueueCounters(depth),
	}
	q.fetcher, _ = h.(Fetcher)
	q.wakeup = make(chan struct{}, 1)
	if mode == CopyUser {
		q.pool = newPool(a, q, depth, ioMax)
	}
	for tag := range q.requests {
		r := &q.requests[tag]
		r.Queue, r.Tag, r.q = id, tag, q
		if q.pool == nil {
			r.full = buf[tag*ioMax : (tag+1)*ioMax : (tag+1)*ioMax]
		}
	}
	return q
}

// start offers every tag to the driver and checks whether the driver took them.
func (q *queue) start(p transport) error {
	q.transport = p
	for tag := range q.requests {
		p.fetch(tag)
	}
	p.arm()
	if err := p.submitAndWait(false); err != nil {
		return err
	}
	q.now = q.stats.now()
	return q.withRecover((*queue).reap)
}

// run serves until every tag has ended, or the queue leaves. After an error, tags that are still ours are lost.
func (q *queue) run() error {
	for q.ended < q.depth {
		switch ends, err := q.leaves(); {
		case err != nil:
			return err
		case ends:
			q.left = true
			return nil
		}
		if err := q.turn(); err != nil {
			return err
		}
	}
	return nil
}

// turn commits answers from other goroutines, waits for events, and serves them. It does not allocate.
func (q *queue) turn() error {
	for {
		q.commitLater()
		if q.pool != nil {
			q.pool.rest()
			q.granted.Store(false)
		}
		if !q.starved.empty() {
			if err := q.withRecover((*queue).serveStarved); err != nil {
				return err
			}
		}
		// An answer that is pushed after this store sees it and interrupts the loop; one pushed earlier is in the list.
		// The same holds for a chunk that the arena grants.
		q.asleep.Store(true)
		if q.later.empty() && !q.granted.Load() {
			break
		}
		q.asleep.Store(false)
	}
	if q.leaving() && q.finished() { // leaves does the rest; no event would end the wait
		q.asleep.Store(false)
		return nil
	}
	err := errKilled
	if !q.killed.Load() {
		q.stats.publish(q.owned)
		err = q.transport.submitAndWait(q.mayWait())
	}
	q.asleep.Store(false)
	if err != nil {
		return err
	}
	last := q.now
	q.now = q.stats.now()
	// Not after a long wait: its request must not be delayed.
	if q.now-q.yielded > yieldEvery && q.now-last < yieldEvery {
		q.yield()
	}
	return q.withRecover((*queue).reap)
}

// yieldEvery is less than 10 ms (forcePreemptNS in runtime/proc.go). After that time, the runtime takes the processor
// of a goroutine that the scheduler has not restarted, at every system call in which it finds the goroutine, and looks
// for that every 20 µs. This would cost a busy queue a third of its time.
const yieldEvery = 5 * time.Millisecond

// yield lets the scheduler restart this goroutine.
func (q *queue) yield() {
	runtime.Gosched()
	q.yielded = q.stats.now()
}

// answer passes a request that was answered on any goroutine to the loop. The caller must not touch r afterwards.
func (q *queue) answer(r *Request) {
	q.later.push(r)
	q.wake()
}

// wake interrupts the loop if it sleeps. It may be called on any goroutine.
func (q *queue) wake() {
	if !q.asleep.Load() {
		return
	}
	q.waking.Add(1)
	if q.asleep.CompareAndSwap(true, false) {
		q.transport.interrupt()
	}
	q.waking.Add(-1)
}

// settleWakes waits until no goroutine uses the transport to wake a loop that has ended. Since such a loop is not
// asleep, no goroutine can begin to.
func (q *queue) settleWakes() {
	for q.waking.Load() > 0 {
		runtime.Gosched()
	}
}

// kill makes run return errKilled soon. It has no effect on a queue that has ended.
func (q *queue) kill() {
	q.killed.Store(true)
	q.notify()
	q.wake()
}

func (q *queue) commitLater() {
	for r := q.later.take(); r != nil; {
		next := r.next
		r.next = nil
		q.commit(r)
		r = next
	}
}

func (q *queue) reap() error {
	for {
		c, ok := q.transport.next()
		if !ok {
			return nil
		}
		switch c.kind {
		case completeIO:
			if err := q.arrived(c.index, c.res); err != nil {
				return err
			}
		case completeRead:
			q.readDone(c.index, int(c.res))
		case completeWake:
			q.transport.arm()
		}
	}
}

// arrived handles the completion of a tag's command: a request, or the tag's end.
func (q *queue) arrived(tag int, res int32) error {
	switch {
	case res == 0 && q.hold(tag):
		return nil
	case res == 0:
		q.dispatch(&q.requests[tag], q.transport.desc(tag))
		return nil
	case syscall.Errno(-res) == unix.ENODEV: // UBLK_IO_RES_ABORT
		q.ended++
		return nil
	}
	return fmt.Errorf("ublk: queue %d tag %d: %w: %w", q.id, tag, errRefused, syscall.Errno(-res))
}

// dispatch fills in the tag's request from d and serves it, or lets it wait for a buffer.
func (q *queue) dispatch(r *Request, d ioDesc) {
	q.owned++
	r.Op = Op(d.opFlags & opMask)
	r.FUA = d.opFlags&flagFUA != 0
	r.NoUnmap = d.opFlags&flagNoUnmap != 0
	r.Offset = int64(d.startSector) << sectorShift
	r.Length = int(d.sectors) << sectorShift
	r.Buf = nil
	r.arrived, r.op, r.size = q.now, r.Op, 0
	r.err, r.readErr, r.wait = nil, nil, waitNone
	r.state.Store(requestServing)
	switch r.Op {
	case OpRead, OpWrite:
		q.dispatchPayload(r)
	case OpFlush, OpDiscard, OpWriteZeroes:
		q.settle(r, q.serve(r))
	default:
		r.op = OpRead // for the statistics
		q.settle(r, syscall.EOPNOTSUPP)
	}
}

// dispatchPayload finds a buffer for a read or write and serves it, or lets it wait for a buffer.
func (q *queue) dispatchPayload(r *Request) {
	switch {
	case r.Length > q.ioMax || r.Length == 0:
		q.settle(r, syscall.EIO)
		return
	case q.pool == nil:
	case !q.starved.empty() || !q.lendBuffer(r):
		r.state.Store(requestAnswered) // neither the handler nor anyone else has it
		q.starved.push(r)
		return
	}
	q.servePayload(r)
}

func (q *queue) lendBuffer(r *Request) bool {
	r.full, r.page = q.pool.get(r.Length)
	return r.full != nil
}

// servePayload serves a read or write that has a buffer.
func (q *queue) servePayload(r *Request) {
	r.size = r.Length
	r.Buf = r.full[:r.Length]
	if q.pool != nil && r.op == OpWrite {
		if err := q.transport.load(r.Tag, r.Buf); err != nil {
			q.settle(r, err)
			return
		}
	}
	q.settle(r, q.serve(r))
}

// serveStarved serves the requests that wait for a buffer, in order, while there are buffers. The first request keeps
// the others waiting, so that the pool's memory becomes free for it, however large it is.
func (q *queue) serveStarved() error {
	for r := q.starved.head; r != nil && q.lendBuffer(r); r = q.starved.head {
		q.starved.pop()
		r.state.Store(requestServing)
		q.servePayload(r)
	}
	return nil
}

// serve calls the handler. withRecover catches its panics.
func (q *queue) serve(r *Request) error {
	q.serving = r
	err := q.handler.ServeUBLK(r)
	q.serving = nil
	return err
}

func (q *queue) fetched(r *Request) error {
	q.serving = r
	err := q.fetcher.FetchedUBLK(r, r.readErr)
	q.serving = nil
	return err
}

// settle acts on the handler's result for r.
func (q *queue) settle(r *Request, err error) {
	if err != nil {
		switch err {
		case ErrAsync:
			return
		case ErrFetch:
			q.settleFetch(r)
			return
		}
	}
	if r.state.CompareAndSwap(requestServing, requestAnswered) {
		r.err = err
		q.commit(r)
	}
}

// settleFetch waits for the fetches of r, or continues at once if there are none.
func (q *queue) settleFetch(r *Request) {
	if r.reads > 0 {
		r.wait = waitFetch
		return
	}
	if q.fetcher == nil {
		q.settle(r, r.readErr)
		return
	}
	err := q.fetched(r)
	if r.reads == 0 && err == ErrFetch {
		err = fmt.Errorf("ublk: FetchedUBLK returned ErrFetch without a fetch: %w", syscall.EIO)
	}
	r.readErr = nil
	q.settle(r, err)
}

// commit gives the answer of r to the driver, which may reuse the tag at once. If fetches of r are under way, commit
// waits for them, because they write to its memory.
func (q *queue) commit(r *Request) {
	if r.reads > 0 {
		r.wait = waitCommit
		return
	}
	if r.err == nil && q.pool != nil && r.op == OpRead {
		r.err = q.transport.store(r.Tag, r.full)
	}
	res := int32(r.size)
	if r.err != nil {
		res = -int32(errnoOf(r.err))
	}
	if q.pool != nil && r.full != nil {
		q.pool.put(r.page, len(r.full))
		r.full, r.Buf = nil, nil
	}
	q.owned--
	q.stats.note(answer{arrived: r.arrived, op: r.op, bytes: max(res, 0), failed: res < 0})
	q.transport.commit(r.Tag, res)
}
