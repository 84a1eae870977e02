package nbd

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// inlineMax is the largest READ or WRITE that the receiver does itself. It bounds how long
	// requests behind it wait, and must fit in the input and in a batch.
	inlineMax = 32 << 10

	// batchSize is the room for the replies that the receiver collects; batchFlush is how many
	// bytes it sends at the latest, so that the client has something to do meanwhile.
	batchSize  = 64 << 10
	batchFlush = 32 << 10

	// batchReplies is how many replies it collects at most, for the same reason.
	batchReplies = 16
)

// ErrProtocol is in the chain of what ServeConn returns when the client broke the protocol in a way
// that leaves nothing but to hang up.
var ErrProtocol = errors.New("nbd: protocol violation")

// conn is one connection in the transmission phase.
type conn struct {
	srv *Server
	session
	dev  Device
	try  TryReader // dev, or nil
	size uint64

	in     *input
	out    sender
	budget *budget

	// The receiver's alone.
	batch   *buffer // replies not yet handed to the sender
	batched int     // how many
	reads   pace
	writes  pace
	workers int

	tasks chan task
	wg    sync.WaitGroup // workers and flusher
	flush flusher
	ended atomic.Bool // the receiver has ended: long tasks give up
}

// session is what a negotiation ends in.
type session struct {
	export     *Export
	structured bool // structured replies
	allocation bool // base:allocation
}

func newConn(srv *Server, nc net.Conn, s session) *conn {
	c := &conn{
		srv:     srv,
		session: s,
		dev:     s.export.Device,
		size:    uint64(s.export.Device.Size()),
		budget:  newBudget(srv.opts.MaxInFlight),
		tasks:   make(chan task),
	}
	c.try, _ = c.dev.(TryReader)
	c.out = sender{conn: nc, budget: c.budget}
	c.in = newInput(nc, c.sendBatch)
	return c
}

// run serves requests until the client disconnects, which is no error, or the connection ends
// otherwise. When it returns, no request is under way.
func (c *conn) run() error {
	err := c.receive()
	c.sendBatch()
	c.ended.Store(true)
	close(c.tasks)
	c.wg.Wait()
	c.in.free()
	if err == io.EOF { // without NBD_CMD_DISC, but between requests
		return nil
	}
	return err
}

func (c *conn) receive() error {
	for !c.out.failed.Load() {
		b, err := c.in.next(requestLen)
		if err != nil {
			return err
		}
		req, ok := parseRequest(b)
		if !ok {
			return fmt.Errorf("%w: request magic %#x", ErrProtocol, be.Uint32(b))
		}
		if req.typ == cmdDisc {
			return nil
		}
		if err := c.dispatch(req); err != nil {
			return err
		}
	}
	return c.out.err
}

// dispatch does req or hands it over. It returns an error only if the connection is of no more use.
func (c *conn) dispatch(req request) error {
	if errno := c.check(req); errno != 0 {
		if req.typ == cmdWrite {
			if err := c.in.discard(int(req.length)); err != nil {
				return err
			}
		}
		c.replyBatched(req, errno)
		return nil
	}
	switch {
	case req.length == 0 && req.typ != cmdFlush && req.flags&cmdFlagFUA == 0:
		c.replyBatched(req, 0)
	case req.typ == cmdRead && req.length <= inlineMax && c.reads.inline():
		c.readInline(req)
	case req.typ == cmdWrite && req.length <= inlineMax && c.writes.inline():
		return c.writeInline(req)
	case req.typ == cmdWrite:
		return c.handOverWrite(req)
	case req.typ == cmdFlush:
		c.acquire(requestCharge)
		c.joinFlush(req.cookie, requestCharge)
	default:
		c.handOver(req)
	}
	return nil
}

// allowedFlags has, per command, the flags that mean something there. FUA is allowed everywhere: the
// specification has it ignored by commands that change nothing.
var allowedFlags = [...]uint16{
	cmdRead:        cmdFlagFUA | cmdFlagDF,
	cmdWrite:       cmdFlagFUA,
	cmdDisc:        cmdFlagFUA,
	cmdFlush:       cmdFlagFUA,
	cmdTrim:        cmdFlagFUA,
	cmdCache:       cmdFlagFUA,
	cmdWriteZeroes: cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero,
	cmdBlockStatus: cmdFlagFUA | cmdFlagReqOne,
}

// check returns the error number for a request that cannot be served.
func (c *conn) check(req request) uint32 {
	if int(req.typ) >= len(allowedFlags) || req.flags&^allowedFlags[req.typ] != 0 {
		return errnoInval
	}
	if req.typ == cmdFlush {
		return 0 // offset and length are reserved, and ignored
	}
	changes := false
	switch req.typ {
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		changes = true
		if c.export.ReadOnly {
			return errnoPerm
		}
	case cmdBlockStatus:
		if !c.allocation || req.length == 0 {
			return errnoInval
		}
	case cmdRead:
		if req.flags&cmdFlagDF != 0 && !c.structured {
			return errnoInval
		}
	}
	if req.off > c.size || uint64(req.length) > c.size-req.off {
		if changes {
			return errnoNoSpace
		}
		return errnoInval
	}
	if req.length > MaxPayload && (req.typ == cmdRead || req.typ == cmdWrite) {
		return errnoInval
	}
	return 0
}

// readInline reads into the batch, or gives a read that has to wait to a worker.
func (c *conn) readInline(req request) {
	c.room(offsetDataLen + int(req.length))
	start := len(c.batch.b)
	b := c.batch.b
	if c.structured {
		b = appendOffsetData(b, chunkFlagDone, req.cookie, req.off, req.length)
	} else {
		b = appendSimple(b, req.cookie, 0)
	}
	head := len(b)
	b = b[:head+int(req.length)]
	began := time.Now()
	var err error
	if c.try != nil {
		var done bool
		if done, err = c.try.TryReadAt(b[head:], int64(req.off)); !done && err == nil {
			c.handOver(req)
			return
		}
	} else {
		err = readFull(c.dev, b[head:], int64(req.off))
	}
	c.reads.observe(time.Since(began))
	if err != nil {
		b = c.appendError(b[:start], req, wireErrno(err))
	}
	c.batch.b = b
	c.addedReply()
}

// writeInline writes from the input.
func (c *conn) writeInline(req request) error {
	p, err := c.in.next(int(req.length))
	if err != nil {
		return unexpected(err)
	}
	began := time.Now()
	err = writeFull(c.dev, p, int64(req.off))
	c.writes.observe(time.Since(began))
	if err == nil && req.flags&cmdFlagFUA != 0 {
		c.acquire(requestCharge)
		c.joinFlush(req.cookie, requestCharge)
		return nil
	}
	c.replyBatched(req, wireErrno(err))
	return nil
}

// handOverWrite receives the payload of a write for a worker.
func (c *conn) handOverWrite(req request) error {
	charge := requestCharge + int64(req.length)
	c.acquire(charge)
	buf := newBuffer(int(req.length))
	if err := c.in.readFull(buf.b); err != nil {
		buf.free()
		c.budget.release(charge)
		return err
	}
	c.give(task{request: req, payload: buf, charge: charge})
	return nil
}

func (c *conn) handOver(req request) {
	charge := int64(requestCharge)
	if req.typ == cmdRead {
		charge += int64(req.length)
	}
	c.acquire(charge)
	c.give(task{request: req, charge: charge})
}

// acquire takes n from the budget; what is batched is sent before it waits.
func (c *conn) acquire(n int64) {
	if c.budget.tryAcquire(n) {
		return
	}
	c.sendBatch()
	c.budget.acquire(n)
}

// replyBatched adds a reply without content to the batch.
func (c *conn) replyBatched(req request, errno uint32) {
	c.room(offsetDataLen)
	c.batch.b = c.appendResult(c.batch.b, req, errno)
	c.addedReply()
}

// appendResult appends the reply to a request that has no content to return, or that failed.
func (c *conn) appendResult(b []byte, req request, errno uint32) []byte {
	if errno != 0 {
		return c.appendError(b, req, errno)
	}
	if c.structured && req.typ == cmdRead { // of nothing
		return appendChunk(b, chunkFlagDone, chunkNone, req.cookie, 0)
	}
	return appendSimple(b, req.cookie, 0)
}

// appendError appends an error reply, structured where the specification wants it so.
func (c *conn) appendError(b []byte, req request, errno uint32) []byte {
	if c.structured && (req.typ == cmdRead || req.typ == cmdBlockStatus) {
		return appendErrorChunk(b, req.cookie, errno)
	}
	return appendSimple(b, req.cookie, errno)
}

// room makes n bytes free in the batch.
func (c *conn) room(n int) {
	if c.batch != nil && len(c.batch.b)+n > cap(c.batch.b) {
		c.sendBatch()
	}
	if c.batch == nil {
		c.batch = newBuffer(batchSize)
		c.batch.b = c.batch.b[:0]
	}
}

func (c *conn) addedReply() {
	c.batched++
	if c.batched >= batchReplies || len(c.batch.b) >= batchFlush {
		c.sendBatch()
	}
}

// sendBatch gives the batch to the sender.
func (c *conn) sendBatch() {
	if c.batch == nil {
		return
	}
	n := int64(len(c.batch.b))
	c.budget.acquire(n)
	p := newPacket(n)
	p.bufs = append(p.bufs, c.batch)
	p.vec = append(p.vec, c.batch.b)
	c.batch, c.batched = nil, 0
	c.out.send(p)
}

// unexpected turns the end of the stream into an error, where more was announced.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
