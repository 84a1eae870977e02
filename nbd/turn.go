package nbd

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Admitter is implemented by a Device that limits how many requests begin, or how many bytes they have, in a time.
type Admitter interface {
	// Admit counts a request, and returns nil if it may begin now. Otherwise it returns a Turn, which counts the request
	// when its turn comes. bytes is 0 for a CACHE, and for a request that changes the device but writes no data.
	//
	// It is called in the order in which requests arrive, for all but a FLUSH and a BLOCK_STATUS. It must not wait.
	Admit(write bool, bytes int64) Turn
}

// Turn is a request that may not begin yet.
type Turn interface {
	// Ready is closed when the request may begin.
	Ready() <-chan struct{}
	// Cancel is called if the request is not carried out, or begins before its turn.
	Cancel()
}

// Requests that wait for their turn are received, so that those behind them, such as a flush, are not held up. But they
// take memory, which a client whose rate is limited must not take from others. So what waits of one connection, and of
// all, is bounded. Beyond that the receiver itself waits, before it takes anything for the request.
const (
	// heldMost is how much of the budget the waiting requests of a connection take at most.
	heldMost = 4 << 20
	// heldPart is the part of Options.MaxMemory that those of all connections take.
	heldPart = 4
)

// hold keeps a request until its turn.
func (c *conn) hold(req request, turn Turn) error {
	charge := c.chargeFor(req)
	if !c.mayHold(charge) {
		c.sendBatch()
		return c.beginAt(turn, req)
	}
	t, err := c.take(req)
	if err != nil {
		turn.Cancel()
		c.unhold(charge)
		return err
	}
	c.wg.Add(1) // called by the receiver, so run does not wait yet
	go c.heldRoutine(t, turn, charge)
	return nil
}

// watchEvery is how often the receiver looks whether the client has gone, while it waits and so does not receive.
const watchEvery = 200 * time.Millisecond

// beginAt waits for the turn of a request, and begins it unless the client has gone by then. It returns io.EOF if so.
func (c *conn) beginAt(turn Turn, req request) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for waits := true; waits; {
		select {
		case <-turn.Ready():
			waits = false
		case <-c.ending.done:
			waits = false
		case <-tick.C:
		}
		if !c.ending.finishes.Load() && c.in.ended() {
			turn.Cancel()
			return io.EOF
		}
	}
	if !c.await(turn) {
		return net.ErrClosed
	}
	return c.begin(req)
}

// mayHold counts a request that waits, unless there are enough. Receivers that ask at the same time may exceed the bound
// for all of them by a request each.
func (c *conn) mayHold(charge int64) bool {
	if c.held.Load()+charge > heldMost || c.srv.held.Load()+charge > c.srv.opts.MaxMemory/heldPart {
		return false
	}
	c.held.Add(charge)
	c.srv.held.Add(charge)
	return true
}

func (c *conn) unhold(charge int64) {
	c.held.Add(-charge)
	c.srv.held.Add(-charge)
}

// heldRoutine carries out a request when its turn has come. It is no worker: these may all be waiting for the device.
func (c *conn) heldRoutine(t task, turn Turn, charge int64) {
	defer c.wg.Done()
	begins := c.await(turn)
	c.unhold(charge)
	if begins {
		c.do(t)
		return
	}
	if t.payload != nil {
		t.payload.free()
	}
	c.reply(t, c.failed(t.request, errGivenUp))
}

// await waits for a turn, and reports whether the request is to be carried out. It is, before its turn, when the server
// ends the connection: what was received is answered. If the client has gone, it is not.
func (c *conn) await(turn Turn) bool {
	select {
	case <-turn.Ready():
	case <-c.ending.done:
		turn.Cancel()
	}
	return !c.cutOff.Load() && (!c.ended.Load() || c.ending.finishes.Load())
}

// ending ends the waiting for turns. It may be done several times.
type ending struct {
	once     sync.Once
	done     chan struct{}
	finishes atomic.Bool // the server ends the connection, and answers what it has received
}

func newEnding() *ending { return &ending{done: make(chan struct{})} }

func (e *ending) set() { e.once.Do(func() { close(e.done) }) }

func (e *ending) finish() {
	e.finishes.Store(true)
	e.set()
}
