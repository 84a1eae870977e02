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
	// inlineMax is the largest READ or WRITE that the receiver does itself. It bounds how long requests behind it wait,
	// and must fit in the input and in a batch.
	inlineMax = 32 << 10

	// batchSize is the room for the replies that the receiver collects; batchFlush is how many bytes it sends at the
	// latest, so that the client has something to do meanwhile.
	batchSize  = 64 << 10
	batchFlush = 32 << 10

	// batchReplies is how many replies it collects at most, for the same reason.
	batchReplies = 16
)

// ErrProtocol is in the chain of ServeConn's error if the client violated the protocol in a way that leaves no choice
// but to hang up.
var ErrProtocol = errors.New("nbd: protocol violation")

// conn is one connection in the transmission phase.
type conn struct {
	srv *Server
	session
	dev *guard
	try TryReader // dev, or nil
	ext Extenter  // dev, or nil
	obs Observer  // dev, or nil
	adm Admitter  // dev, or nil

	in       *input
	out      sender
	budget   *budget
	counters counters

	// The receiver's alone.
	batch   *buffer // replies not yet handed to the sender
	batched int     // how many
	reads   pace
	writes  pace
	workers int

	tasks   chan task
	wg      sync.WaitGroup // workers and flusher
	flush   flusher
	pausing atomic.Bool         // nothing more is received: Server.Pause
	head    [extRequestLen]byte // the header of the present request
	unsent  []byte              // replies that the server before could not send
	partial []byte              // what was received of a request that is not whole, when the connection was paused
	ended   atomic.Bool         // the receiver has ended, and not by DISC: long tasks give up
	cutOff  atomic.Bool         // nobody wants replies any more: long tasks give up, and no other begins
	gone    func()              // ends the context of ClientExports; called after one of the two above was set
	ending  *ending             // set after one of the two, or when the server ends the connection
	held    atomic.Int64        // what requests that wait for their turn take

	// receiving is when the receiver began to wait for the rest of a WRITE, in nanoseconds of Unix time; 0: it does
	// not.
	receiving atomic.Int64
}

// session is what a negotiation ends in.
type session struct {
	export       *Export
	name         string // the export's, as the client gave it
	size         uint64
	structured   bool      // structured replies, perhaps with extended headers
	extended     bool      // extended headers
	contexts     []Context // for BLOCK_STATUS; nil in it: base:allocation
	contextNames []string
}

func newConn(srv *Server, nc net.Conn, s session, gone func()) *conn {
	c := &conn{
		srv:     srv,
		session: s,
		dev:     guardOf(s.export.Device),
		budget:  newBudget(&srv.memory, srv.opts.MaxInFlight),
		tasks:   make(chan task),
		gone:    gone,
		ending:  newEnding(),
	}
	if c.dev.try != nil {
		c.try = c.dev
	}
	if c.dev.ext != nil {
		c.ext = c.dev
	}
	if c.dev.obs != nil {
		c.obs = c.dev
	}
	if c.dev.adm != nil {
		c.adm = c.dev
	}
	c.out = sender{conn: nc, budget: c.budget, pausing: &c.pausing}
	c.out.secure, _ = nc.(*secureConn)
	c.in = newInput(nc, srv.opts.read, c.sendBatch)
	return c
}

// run serves requests until the client disconnects, which is no error, or the connection is paused (errPaused), or ends
// in another way. When it returns, no request is under way.
func (c *conn) run() error {
	c.sendUnsent()
	err := c.receive()
	c.sendBatch()
	if err != nil && err != errPaused { // after DISC, what was asked for is still done
		c.ended.Store(true)
		c.gone()
		c.ending.set()
	}
	close(c.tasks)
	c.wg.Wait()
	if err == errPaused {
		c.keepReceived()
	}
	c.in.free()
	if c.out.failed.Load() { // it caused the receiver's error
		return c.out.err
	}
	if err == io.EOF { // without NBD_CMD_DISC, but between requests
		return nil
	}
	return err
}

// cut ends the connection at once, but for the requests that the device has.
func (c *conn) cut() {
	c.cutOff.Store(true)
	c.gone()
	c.ending.set()
	c.out.conn.Close()
}

// givesUp reports whether there is no point in going on with a long task.
func (c *conn) givesUp() bool { return c.ended.Load() || c.cutOff.Load() || c.out.failed.Load() }

// stalledSince returns when the client began to keep the server waiting while requests of it are under way: it takes no
// replies, or sends no more of a WRITE. It returns zero if the client does neither.
func (c *conn) stalledSince() time.Time {
	var first int64
	for _, since := range []int64{c.out.since.Load(), c.receiving.Load()} {
		if since != 0 && (first == 0 || since < first) {
			first = since
		}
	}
	if first == 0 {
		return time.Time{}
	}
	return time.Unix(0, first)
}

func (c *conn) receive() (err error) {
	defer recovered(&err)
	for !c.out.failed.Load() && !c.cutOff.Load() {
		if c.pausing.Load() {
			return errPaused
		}
		b, err := c.in.next(c.requestLen())
		if err != nil {
			return c.orPaused(err)
		}
		copy(c.head[:], b)
		req, ok := parseRequest(b, c.extended)
		if !ok {
			return fmt.Errorf("%w: request magic %#x", ErrProtocol, be.Uint32(b))
		}
		if req.typ == cmdDisc {
			return nil
		}
		if err := c.dispatch(req); err != nil {
			return c.orPaused(err)
		}
	}
	if c.cutOff.Load() {
		return net.ErrClosed
	}
	return c.out.err
}

// dispatch does req or hands it over. It returns an error only if the connection is of no more use.
func (c *conn) dispatch(req request) error {
	c.counters.count(req)
	payload, f := c.payload(&req)
	if payload > MaxPayload && c.extended {
		return fmt.Errorf("%w: a payload of %d bytes", ErrProtocol, payload)
	}
	if f.errno == 0 {
		f = c.check(req)
	}
	if f.errno != 0 {
		if payload > 0 {
			if n, err := c.in.discard(int(payload)); err != nil {
				return c.keepDiscarded(req, n, err)
			}
		}
		c.replyBatched(req, f)
		return nil
	}
	if turn := c.admit(req); turn != nil {
		return c.hold(req, turn)
	}
	return c.begin(req)
}

// admit returns the turn of a request that may not begin yet, or nil.
func (c *conn) admit(req request) Turn {
	if c.adm == nil {
		return nil
	}
	switch req.typ {
	case cmdRead:
		return c.adm.Admit(false, int64(req.length))
	case cmdCache:
		return c.adm.Admit(false, 0) // the client gets no data
	case cmdWrite:
		return c.adm.Admit(true, int64(req.length))
	case cmdTrim:
		return c.adm.Admit(true, 0)
	case cmdWriteZeroes:
		if req.flags&cmdFlagNoHole != 0 {
			return c.adm.Admit(true, int64(req.length))
		}
		return c.adm.Admit(true, 0)
	}
	return nil
}

// begin does req or hands it over, as dispatch does.
func (c *conn) begin(req request) error {
	switch {
	case req.length == 0 && (req.typ == cmdRead || req.typ == cmdCache || req.typ != cmdFlush && req.flags&cmdFlagFUA == 0):
		c.replyBatched(req, failure{}) // FUA means nothing to those that change nothing
	case req.typ == cmdRead && req.length <= inlineMax && c.reads.inline():
		c.readInline(req)
	case req.typ == cmdWrite && req.length <= inlineMax && c.writes.inline():
		return c.writeInline(req)
	case req.typ == cmdFlush:
		req.arrived, req.length = time.Now(), 0 // the length is reserved
		c.acquire(requestCharge)
		c.joinFlush(req, requestCharge)
	default:
		return c.handOver(req)
	}
	return nil
}

// payload returns the length of the payload that follows a request, and a failure if the request may have none. With
// extended headers the flag PAYLOAD_LEN says that there is a payload; payload clears the flag. QEMU 10.0 sends the
// payload of a WRITE without the flag. So a WRITE has a payload in any case.
func (c *conn) payload(req *request) (uint64, failure) {
	flag := c.extended && req.flags&cmdFlagPayload != 0
	if flag {
		req.flags &^= cmdFlagPayload
	}
	switch {
	case req.typ == cmdWrite:
		return req.length, failure{}
	case flag:
		return req.length, failure{errno: errnoInval, text: "only a write has a payload"}
	}
	return 0, failure{}
}

// allowedFlags has the flags that have a meaning for each command. FUA is allowed for all: by the specification,
// commands that change nothing ignore it.
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

// check returns why a request cannot be served.
func (c *conn) check(req request) failure {
	if int(req.typ) >= len(allowedFlags) || req.flags&^allowedFlags[req.typ] != 0 {
		return failure{errno: errnoInval, text: "there is no such command, or it has no such flags"}
	}
	if req.typ == cmdFlush {
		return failure{} // offset and length are reserved, and ignored
	}
	switch req.typ {
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		if c.export.ReadOnly {
			return failure{errno: errnoPerm, text: "the export is read-only"}
		}
	case cmdBlockStatus:
		if len(c.contexts) == 0 || req.length == 0 {
			return failure{errno: errnoInval, text: "a block status needs a metadata context that was selected for the export, and a length"}
		}
	case cmdRead:
		if req.flags&cmdFlagDF != 0 && !c.structured {
			return failure{errno: errnoInval}
		}
	}
	if req.off > c.size || req.length > c.size-req.off {
		f := failure{errno: errnoInval, text: "the range lies behind the end of the export"}
		if req.typ == cmdWrite || req.typ == cmdWriteZeroes {
			f.errno = errnoNoSpace
		}
		return f
	}
	if req.flags&(cmdFlagNoHole|cmdFlagFastZero) == cmdFlagNoHole|cmdFlagFastZero {
		return failure{errno: errnoNotSup} // to make sure of the space is not faster than to write
	}
	return c.checkPayload(req)
}

// checkPayload returns why the payload of a request, or of its reply, is too long.
func (c *conn) checkPayload(req request) failure {
	switch {
	case req.length <= MaxPayload, req.typ != cmdRead && req.typ != cmdWrite:
		return failure{}
	case req.typ == cmdRead && (req.flags&cmdFlagDF != 0 || req.length > maxRead):
		return failure{errno: errnoOverflow, text: "so much cannot be read at once"}
	case req.typ == cmdRead && c.structured:
		return failure{} // in several chunks
	}
	return failure{errno: errnoInval, text: "more than the largest payload"}
}

// readInline reads into the batch, or gives a read that has to wait to a worker.
func (c *conn) readInline(req request) {
	c.room(replyRoom + int(req.length))
	start := len(c.batch.b)
	b := c.batch.b
	if c.structured {
		b = c.appendOffsetData(b, chunkFlagDone, req, req.off, uint32(req.length))
	} else {
		b = c.appendSimple(b, req, 0)
	}
	head := len(b)
	b = b[:head+int(req.length)]
	began := time.Now()
	var err error
	if c.try != nil {
		var done bool
		if done, err = c.try.TryReadAt(b[head:], int64(req.off)); !done && err == nil {
			req.arrived = began
			_ = c.handOver(req) // a read has no payload, which alone may fail
			return
		}
	} else {
		err = readFull(c.dev, b[head:], int64(req.off))
	}
	took := time.Since(began)
	c.reads.observe(took)
	c.observe(req, took, err)
	if err != nil {
		b = c.appendError(b[:start], req, c.failed(req, err))
	}
	c.batch.b = b
	c.addedReply()
}

// writeInline writes from the input.
func (c *conn) writeInline(req request) error {
	p, err := c.in.next(int(req.length))
	if err != nil {
		c.keep(req, nil)
		return unexpected(err)
	}
	began := time.Now()
	err = writeFull(c.dev, p, int64(req.off))
	took := time.Since(began)
	c.writes.observe(took)
	if err == nil && req.flags&cmdFlagFUA != 0 {
		req.arrived = began
		c.acquire(requestCharge)
		c.joinFlush(req, requestCharge)
		return nil
	}
	c.observe(req, took, err)
	c.replyBatched(req, c.failed(req, err))
	return nil
}

// acquire takes n from the budget; what is batched is sent before it waits.
func (c *conn) acquire(n int64) {
	if c.budget.tryAcquire(n) {
		return
	}
	c.sendBatch()
	c.waitFor(n)
}

// waitFor takes n from the budget, and waits for it.
func (c *conn) waitFor(n int64) { c.budget.acquire(n, c.srv.opts.stall, c.srv.cutStalled) }

// batchCharge is what a batch takes from the budget, from its beginning until it is sent. It must not be taken when the
// batch is sent: the receiver may hold the charge of a request by then, and what it waits for might not fit beside it.
const batchCharge = requestCharge + batchSize

// room makes n bytes free in the batch. The caller holds nothing of the budget.
func (c *conn) room(n int) {
	if c.batch != nil && len(c.batch.b)+n > cap(c.batch.b) {
		c.sendBatch()
	}
	if c.batch == nil {
		c.waitFor(batchCharge)
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

// sendBatch gives the batch to the sender. It does not wait for the budget.
func (c *conn) sendBatch() {
	if c.batch == nil {
		return
	}
	p := newPacket(batchCharge)
	p.buf = c.batch
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
