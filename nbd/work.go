package nbd

import (
	"fmt"
	"sync"
	"syscall"
	"time"
)

// task is a request for a worker. The worker owns the payload and the charge.
type task struct {
	request
	payload *buffer
	charge  int64
}

// handOver gives a request to a worker.
func (c *conn) handOver(req request) error {
	t, err := c.take(req)
	if err == nil {
		c.give(t)
	}
	return err
}

// take takes what a request needs from the budget, and receives the payload of a write.
func (c *conn) take(req request) (task, error) {
	t := task{request: req, charge: c.chargeFor(req)}
	c.acquire(t.charge)
	if req.typ != cmdWrite {
		if t.arrived.IsZero() {
			t.arrived = time.Now()
		}
		return t, nil
	}
	t.payload = newBuffer(int(req.length))
	c.receiving.Store(time.Now().UnixNano())
	n, err := c.in.readFull(t.payload.b)
	c.receiving.Store(0)
	if err != nil {
		c.keep(req, t.payload.b[:n])
		t.payload.free()
		c.budget.release(t.charge)
	}
	t.arrived = time.Now()
	return t, err
}

// chargeFor returns what a request takes from the budget that is handed over.
func (c *conn) chargeFor(req request) int64 {
	switch req.typ {
	case cmdRead:
		return requestCharge + bufferSize(int(readStep(req)))
	case cmdWrite:
		return requestCharge + bufferSize(int(req.length))
	case cmdCache:
		return requestCharge + bufferSize(int(min(longStep, req.length)))
	case cmdBlockStatus:
		return c.statusCharge(req)
	}
	return requestCharge
}

// give hands t to an idle worker, or to a new one if none is idle and the limit permits it. Otherwise it waits for a
// worker.
func (c *conn) give(t task) {
	select {
	case c.tasks <- t:
		return
	default:
	}
	if c.workers < c.srv.opts.Workers {
		c.workers++
		c.wg.Add(1)
		go c.workRoutine(t)
		return
	}
	c.sendBatch()
	c.tasks <- t
}

// workRoutine executes t, and then further tasks until the connection ends.
func (c *conn) workRoutine(t task) {
	defer c.wg.Done()
	c.do(t)
	for t := range c.tasks {
		c.do(t)
	}
}

func (c *conn) do(t task) {
	if c.cutOff.Load() {
		if t.payload != nil {
			t.payload.free()
		}
		c.budget.release(t.charge)
		return
	}
	switch t.typ {
	case cmdRead:
		c.read(t)
	case cmdWrite:
		err := writeFull(c.dev, t.payload.b, int64(t.off))
		t.payload.free()
		c.changed(t, err)
	case cmdTrim:
		c.changed(t, c.inSteps(t, hugeStep, c.dev.Discard))
	case cmdWriteZeroes:
		c.changed(t, c.writeZeroes(t))
	case cmdCache:
		c.reply(t, c.failed(t.request, c.cache(t)))
	case cmdBlockStatus:
		c.blockStatus(t)
	}
}

// changed replies to a request that changed the device, or failed to. With FUA it replies after a flush.
func (c *conn) changed(t task, err error) {
	if err == nil && t.flags&cmdFlagFUA != 0 {
		c.joinFlush(t.request, t.charge)
		return
	}
	c.finished(t.request, err)
	c.reply(t, c.failed(t.request, err))
}

func (c *conn) reply(t task, f failure) {
	p := newPacket(t.charge)
	p.head = c.appendResult(p.head, t.request, f)
	c.out.send(p.sealHead())
}

// longStep is how much of a request is executed at a time if the request may have any length and may take long. Between
// two steps it stops if the connection has ended.
const longStep = 1 << 20

// errGivenUp is the answer to a long request that was not carried out to its end.
var errGivenUp = fmt.Errorf("nbd: given up, since the client has gone: %w", syscall.ESHUTDOWN)

// cache reads the range, so that the caches of the device hold it.
func (c *conn) cache(t task) error {
	buf := newBuffer(int(min(longStep, t.length)))
	defer buf.free()
	for off, end := int64(t.off), int64(t.off)+int64(t.length); off < end; off += longStep {
		if c.givesUp() {
			return errGivenUp
		}
		if err := readFull(c.dev, buf.b[:min(longStep, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// hugeStep is how much of a request is executed at a time if the time that it takes hardly goes with its length.
const hugeStep = 1 << 32

// writeZeroes zeroes the range. If the range may become a hole, this takes one call, or few; otherwise it goes in small
// steps, because reserving the space may take long.
func (c *conn) writeZeroes(t task) error {
	noHole, step := t.flags&cmdFlagNoHole != 0, int64(hugeStep)
	if noHole {
		step = longStep
	}
	return c.inSteps(t, step, func(off, length int64) error { return c.dev.WriteZeroes(off, length, noHole) })
}

// inSteps calls do for the range of a request, a step at a time. Between two steps it may give up, and before the first
// one if the steps are small. This is an answer, too: a client that has only ended its sending takes it.
func (c *conn) inSteps(t task, step int64, do func(off, length int64) error) error {
	if t.length == 0 {
		return do(int64(t.off), 0)
	}
	for off, end := int64(t.off), int64(t.off+t.length); off < end; off += step {
		if (step < hugeStep || off > int64(t.off)) && c.givesUp() {
			return errGivenUp
		}
		if err := do(off, min(step, end-off)); err != nil {
			return err
		}
	}
	return nil
}

// flusher flushes the device for one connection. Requests that join while a flush is under way share the next one,
// since the present flush need not cover what was acknowledged after it began.
type flusher struct {
	mu      sync.Mutex // guards the fields below
	waiting []waiter
	spare   []waiter // empty slice that replaces waiting when it is taken
	running bool     // a goroutine serves waiting until it is empty
}

// waiter is a reply that waits for a flush.
type waiter struct {
	request
	charge int64
}

// joinFlush sends the reply to a request once a flush that begins after this call has ended.
func (c *conn) joinFlush(req request, charge int64) {
	f := &c.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting = append(f.waiting, waiter{req, charge})
	if !f.running {
		f.running = true
		c.wg.Add(1) // called by the receiver or a worker, so run does not wait yet
		go c.flushRoutine()
	}
}

func (c *conn) flushRoutine() {
	defer c.wg.Done()
	f := &c.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.waiting) > 0 {
		taken := f.waiting
		f.waiting = f.spare[:0]
		f.mu.Unlock()
		err := c.dev.Flush()
		outcome := c.failed(request{typ: cmdFlush}, err)
		p := newPacket(0)
		for _, w := range taken {
			c.finished(w.request, err)
			p.head = c.appendResult(p.head, w.request, outcome)
			p.charge += w.charge
		}
		c.out.send(p.sealHead())
		f.mu.Lock()
		f.spare = taken
	}
	f.running = false
}
