package nbd

import "sync"

// task is a request for a worker, which owns the payload and the charge.
type task struct {
	request
	payload *buffer
	charge  int64
}

// give hands t to a worker, a new one if none is idle and there may be more. It waits if there may
// not.
func (c *conn) give(t task) {
	select {
	case c.tasks <- t:
		return
	default:
	}
	if c.workers < c.srv.opts.Workers {
		c.workers++
		c.wg.Add(1)
		go c.routineWork(t)
		return
	}
	c.sendBatch()
	c.tasks <- t
}

// routineWork does t, and then tasks as they come, until the connection ends.
func (c *conn) routineWork(t task) {
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
		c.changed(t, c.dev.Discard(int64(t.off), int64(t.length)))
	case cmdWriteZeroes:
		c.changed(t, c.writeZeroes(t))
	case cmdCache:
		c.reply(t, c.errno(t.request, c.cache(t)))
	case cmdBlockStatus:
		c.blockStatus(t)
	}
}

// changed replies to a request that changed the device, or failed to; with FUA, after a flush.
func (c *conn) changed(t task, err error) {
	if err == nil && t.flags&cmdFlagFUA != 0 {
		c.joinFlush(t.request, t.charge)
		return
	}
	c.reply(t, c.errno(t.request, err))
}

func (c *conn) reply(t task, errno uint32) {
	p := newPacket(t.charge)
	p.head = c.appendResult(p.head, t.request, errno)
	c.out.send(p.sealHead())
}

// longStep is how much of a request that may be of any length, and may take long, is done at a time: it gives up when
// the connection has ended.
const longStep = 1 << 20

// cache reads the range, so that whatever caches the device has hold it.
func (c *conn) cache(t task) error {
	buf := newBuffer(int(min(longStep, t.length)))
	defer buf.free()
	for off, end := int64(t.off), int64(t.off)+int64(t.length); off < end && !c.givesUp(); off += longStep {
		if err := readFull(c.dev, buf.b[:min(longStep, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// writeZeroes zeroes the range: at once where that may be a hole, else as long as it takes to make sure of the space.
func (c *conn) writeZeroes(t task) error {
	off, length := int64(t.off), int64(t.length)
	if t.flags&cmdFlagNoHole == 0 {
		return c.dev.WriteZeroes(off, length, false)
	}
	for end := off + length; off < end && !c.givesUp(); off += longStep {
		if err := c.dev.WriteZeroes(off, min(longStep, end-off), true); err != nil {
			return err
		}
	}
	return nil
}

// flusher flushes the device for one connection. Those who join while a flush is under way are
// served together by the next, since that one need not cover what was acknowledged after it began.
type flusher struct {
	mu      sync.Mutex // guards the fields below
	waiting []waiter
	spare   []waiter // the slice that waiting takes when waiting is taken
	running bool     // a goroutine serves waiting, until it is empty
}

// waiter is a reply that waits for a flush.
type waiter struct {
	cookie uint64
	charge int64
}

// joinFlush sends the reply of a request once a flush that begins after now has ended.
func (c *conn) joinFlush(req request, charge int64) {
	f := &c.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting = append(f.waiting, waiter{req.cookie, charge})
	if !f.running {
		f.running = true
		c.wg.Add(1) // by the receiver or a worker, so before run waits
		go c.routineFlush()
	}
}

func (c *conn) routineFlush() {
	defer c.wg.Done()
	f := &c.flush
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.waiting) > 0 {
		taken := f.waiting
		f.waiting = f.spare[:0]
		f.mu.Unlock()
		errno := c.errno(request{typ: cmdFlush}, c.dev.Flush())
		p := newPacket(0)
		for _, w := range taken {
			p.head = appendSimple(p.head, w.cookie, errno)
			p.charge += w.charge
		}
		c.out.send(p.sealHead())
		f.mu.Lock()
		f.spare = taken
	}
	f.running = false
}
