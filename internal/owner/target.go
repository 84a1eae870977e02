package owner

import (
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// target answers the requests of a block device with a volume or snapshot.
//
// Reads are planned and finished on the queue's thread, and fetched on its ring. Small writes are done on the queue's
// thread, because handing them over would cost more than doing them. Requests that may wait for the disk or the
// cleaner, or that are large enough to be worth another CPU, go to the workers.
type target struct {
	dev    *cow.Device
	report func(error) // called with the reason why a request failed; the sender gets only an errno
	meter  *meter
	jobs   chan *ublk.Request
	wg     sync.WaitGroup // the workers

	waiting *waitingRoom
	holders sync.WaitGroup // the goroutines of waiting

	lastReport atomic.Int64 // time of the last call of report, in Unix seconds
	suppressed atomic.Int64 // failures not reported since

	counted bool // the device has ended, and its counters are in the meter; guarded by meters.mu
}

const (
	// inlineBytes is the largest write or read that is compressed or decompressed on the queue's thread: one unit of
	// the engine. Copying and coding in parallel pays off from about twice that size.
	inlineBytes = 64 << 10
	// workers is how many requests can wait for the disk at the same time. A few are enough, since flushes share one
	// sync.
	workers = 16
)

// readState is the state of a read of one tag of one queue. It is made at the tag's first read.
type readState struct {
	plan  cow.ReadPlan
	err   error // of the fetches, for the worker that finishes the read
	fetch bool  // the worker must also fetch
	whole bool  // the worker does all of it
}

// state returns the state of a request that is a read.
func state(r *ublk.Request) *readState {
	p, ok := r.Data.(*readState)
	if !ok {
		p = new(readState)
		r.Data = p
	}
	return p
}

// newTarget makes the target of a device that handles at most the given number of requests at once. The channel of jobs
// holds that many, so a queue's thread never waits to hand one over.
func newTarget(dev *cow.Device, m *meter, requests int, report func(error)) *target {
	t := &target{dev: dev, meter: m, report: report, jobs: make(chan *ublk.Request, requests), waiting: newWaitingRoom(requests)}
	t.holders.Go(func() { t.holdRoutine(t.waiting.reads) })
	t.holders.Go(func() { t.holdRoutine(t.waiting.writes) })
	for range workers {
		t.wg.Go(t.workRoutine)
	}
	return t
}

// close ends the workers. No request may arrive any more.
func (t *target) close() {
	close(t.waiting.reads)
	close(t.waiting.writes)
	t.holders.Wait()
	close(t.jobs)
	t.wg.Wait()
}

// ServeUBLK answers a request, or hands it to the ring or a worker to be answered later.
func (t *target) ServeUBLK(r *ublk.Request) error {
	switch {
	case t.holds(r):
		return ublk.ErrAsync
	case r.Op == ublk.OpRead:
		return t.reportFailure(r, t.read(r))
	case r.Op == ublk.OpWrite && !r.FUA && r.Length <= inlineBytes && !t.dev.Paced():
		_, err := t.dev.WriteAt(r.Buf, r.Offset)
		return t.reportFailure(r, err)
	}
	t.jobs <- r
	return ublk.ErrAsync
}

func (t *target) read(r *ublk.Request) error {
	p := state(r)
	if err := t.dev.PlanRead(&p.plan, r.Buf, r.Offset); err != nil {
		return err
	}
	fetches := p.plan.Fetches()
	if len(fetches) == 0 {
		return p.plan.Finish(nil)
	}
	if !p.plan.Hold() { // the plan must not wait here for files that this thread's own requests may be using
		p.fetch = true
		t.jobs <- r
		return ublk.ErrAsync
	}
	for i := range fetches {
		f := &fetches[i]
		r.Fetch(f.Fd(), f.Buf, f.Off)
	}
	return ublk.ErrFetch
}

// FetchedUBLK finishes a read after its fetches, or hands a large one to a worker.
func (t *target) FetchedUBLK(r *ublk.Request, err error) error {
	p := r.Data.(*readState)
	if r.Length <= inlineBytes {
		return t.reportFailure(r, p.plan.Finish(err))
	}
	p.err = err
	t.jobs <- r
	return ublk.ErrAsync
}

func (t *target) workRoutine() {
	for r := range t.jobs {
		r.Complete(t.reportFailure(r, t.work(r)))
	}
}

// reportFailure returns err. If the request failed, it first calls report, at most once a second, because a full or
// damaged disk may fail all requests.
func (t *target) reportFailure(r *ublk.Request, err error) error {
	if err == nil || err == ublk.ErrFetch || err == ublk.ErrAsync {
		return err
	}
	t.meter.failed(err)
	now, last := time.Now().Unix(), t.lastReport.Load()
	if now == last || !t.lastReport.CompareAndSwap(last, now) {
		t.suppressed.Add(1)
		return err
	}
	why := fmt.Errorf("%v of %d bytes at %d: %w", r.Op, r.Length, r.Offset, err)
	if n := t.suppressed.Swap(0); n > 0 {
		why = fmt.Errorf("%w (and %d others before)", why, n)
	}
	t.report(why)
	return err
}

// work performs a request completely. A panic fails the request, since an unanswered request would hang its process
// forever.
func (t *target) work(r *ublk.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &ublk.PanicError{Op: r.Op, Offset: r.Offset, Length: r.Length, Value: p, Stack: debug.Stack()}
		}
	}()
	switch r.Op {
	case ublk.OpRead:
		p := r.Data.(*readState)
		if p.whole {
			p.whole = false
			_, err := t.dev.ReadAt(r.Buf, r.Offset)
			return err
		}
		if p.fetch {
			p.fetch = false
			return p.plan.Fetch()
		}
		return p.plan.Finish(p.err)
	case ublk.OpWrite:
		if _, err := t.dev.WriteAt(r.Buf, r.Offset); err != nil || !r.FUA {
			return err
		}
		return t.dev.Flush()
	case ublk.OpFlush:
		return t.dev.Flush()
	case ublk.OpDiscard:
		return t.dev.Discard(r.Offset, int64(r.Length))
	case ublk.OpWriteZeroes:
		if r.NoUnmap { // NoUnmap only asks to keep the allocated space
			return t.dev.Zero(r.Offset, int64(r.Length))
		}
		return t.dev.WriteZeroes(r.Offset, int64(r.Length), false)
	}
	return fmt.Errorf("%v: %w", r.Op, ErrUnsupported)
}
