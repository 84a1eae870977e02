package nbd

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/internal/fuzzcode"
)

// What a program of FuzzTransmission works on: a disk whose end is no multiple of anything, and a block that fails.
const (
	fuzzSize  = 96<<10 + 512
	badBlock  = 5 // reads of it fail with EIO, and what changes it fails with ENOSPC
	fuzzBatch = 6 // the most requests that are under way at once
)

func touchesBad(off, n int64) bool {
	return n > 0 && off < (badBlock+1)*ramBlock && off+n > badBlock*ramBlock
}

// fuzzRAM returns the disk.
func fuzzRAM() *ramDevice {
	d := newRAM(fuzzSize)
	d.onRead = func(p []byte, off int64) error {
		if touchesBad(off, int64(len(p))) {
			return syscall.EIO
		}
		return nil
	}
	changes := func(off, n int64) error {
		if touchesBad(off, n) {
			return syscall.ENOSPC
		}
		return nil
	}
	d.onWrite = func(p []byte, off int64) error { return changes(off, int64(len(p))) }
	d.onZero = func(off, n int64, _ bool) error { return changes(off, n) }
	return d
}

// sent is a request under way.
type sent struct {
	request
	announced bool // with extended headers: a payload of length bytes follows
	payload   []byte
	covered   []bool // of the bytes of a structured READ, which have come
	chunks    int    // that have come
}

// transmitter runs a program of requests against a server and a model of the disk.
type transmitter struct {
	*client
	code       fuzzcode.Code
	device     *ramDevice
	disk       []byte // the model's content
	present    []bool // the model's blocks that are no holes
	readOnly   bool
	extended   bool
	allocation bool
	next       uint64 // cookie of the next request
	open       map[uint64]*sent
	touched    map[int64]int // blocks that a batch changes: how often
}

// wantErrno returns the error with which a request must be answered, by the specification and the package's
// documentation.
func (x *transmitter) wantErrno(s *sent) uint32 {
	r := s.request
	allowed := map[uint16]uint16{cmdRead: cmdFlagDF, cmdWrite: 0, cmdFlush: 0, cmdTrim: 0, cmdCache: 0, cmdWriteZeroes: cmdFlagNoHole | cmdFlagFastZero, cmdBlockStatus: cmdFlagReqOne}
	flags, known := allowed[r.typ]
	changes := r.typ == cmdWrite || r.typ == cmdTrim || r.typ == cmdWriteZeroes
	outside := r.off > fuzzSize || r.length > fuzzSize-r.off
	bad := !outside && touchesBad(int64(r.off), int64(r.length))
	switch {
	case s.announced && r.typ != cmdWrite, !known || r.flags&^(flags|cmdFlagFUA) != 0:
		return errnoInval
	case r.typ == cmdFlush:
		return 0
	case changes && x.readOnly:
		return errnoPerm
	case r.typ == cmdBlockStatus && (!x.allocation || r.length == 0), r.flags&cmdFlagDF != 0 && r.typ == cmdRead && !x.structured:
		return errnoInval
	case outside && (r.typ == cmdWrite || r.typ == cmdWriteZeroes):
		return errnoNoSpace
	case outside:
		return errnoInval
	case r.typ == cmdWriteZeroes && r.flags&(cmdFlagNoHole|cmdFlagFastZero) == cmdFlagNoHole|cmdFlagFastZero:
		return errnoNotSup
	case bad && changes:
		return errnoNoSpace
	case bad && r.typ == cmdCache:
		return errnoIO
	case bad && r.typ == cmdRead && !x.skipsBad(r):
		return errnoIO
	}
	return 0
}

// skipsBad reports whether the block that fails is left out of a read, as a hole, and so cannot fail it.
func (x *transmitter) skipsBad(r request) bool {
	return x.structured && r.flags&cmdFlagDF == 0 && r.length >= sparseMin // the block is always a hole
}

// draw makes a request of the program.
func (x *transmitter) draw() *sent {
	c := &x.code
	r := request{typ: uint16(c.Byte()), cookie: x.next}
	x.next++
	if r.typ < 250 {
		r.typ %= 8
	}
	if r.typ == cmdDisc {
		r.typ = cmdRead
	}
	f := c.Byte()
	if f < 200 {
		r.flags = uint16(f) % 32
		if f < 100 { // mostly those that are allowed
			r.flags &= map[uint16]uint16{cmdWriteZeroes: cmdFlagFUA | cmdFlagNoHole, cmdBlockStatus: cmdFlagReqOne, cmdRead: cmdFlagDF, cmdWrite: cmdFlagFUA, cmdTrim: cmdFlagFUA}[r.typ]
		}
	} else {
		r.flags = uint16(f) << 8
	}
	announced := x.extended && f%3 == 0
	where, off, n := c.Byte(), c.U16(), c.U16()
	r.off, r.length = uint64(off*512%fuzzSize), uint64(n)
	switch where % 8 {
	case 0:
		r.off, r.length = uint64(off%24)*ramBlock, uint64(1+n%24)*ramBlock
	case 1: // about the end
		r.off = fuzzSize - uint64(n)
	case 2:
		r.off, r.length = uint64(off)<<48, uint64(n)
	case 3:
		r.off, r.length = uint64(off)%fuzzSize, uint64(n)%64
	case 4: // all of it
		r.off, r.length = 0, fuzzSize-uint64(off%600)
	case 5:
		if x.extended && !announced && r.typ != cmdWrite { // more than 32 bits
			r.length <<= off % 48
		}
	}
	s := &sent{request: r, announced: announced}
	if r.typ == cmdWrite || announced {
		s.payload = bytes.Repeat([]byte{byte(x.next), where}, int(r.length)/2+1)[:r.length]
	}
	if r.typ == cmdRead {
		s.covered = make([]bool, min(r.length, fuzzSize))
	}
	return s
}

// batch sends requests together, and takes the answers in any order.
func (x *transmitter) batch(n int) {
	clear(x.touched)
	var b bytes.Buffer
	for range n {
		s := x.draw()
		x.open[s.cookie] = s
		flags := s.flags
		if s.announced {
			flags |= cmdFlagPayload
		}
		b.WriteString(x.header(flags, s.typ, s.cookie, s.off, s.length))
		b.Write(s.payload)
		if (s.typ == cmdWrite || s.typ == cmdTrim || s.typ == cmdWriteZeroes) && s.length > 0 && x.wantErrno(s) == 0 {
			for blk := int64(s.off) / ramBlock; blk <= (int64(s.off)+int64(s.length)-1)/ramBlock; blk++ {
				x.touched[blk]++
			}
		}
	}
	x.exchange(b.String())
	x.settle()
}

// header returns the header of a request.
func (x *transmitter) header(flags, typ uint16, cookie, off, length uint64) string {
	if x.extended {
		return u32(magicExtRequest) + u16(flags) + u16(typ) + u64(cookie) + u64(off) + u64(length)
	}
	return reqBytes(flags, typ, cookie, off, uint32(length))
}

// exchange sends bytes and takes the answers to all that is under way. It sends in a goroutine, because a server may
// wait for its answers to be taken.
func (x *transmitter) exchange(b string) {
	wrote := make(chan error, 1)
	go func() {
		_, err := io.WriteString(x.Conn, b)
		wrote <- err
	}()
	for len(x.open) > 0 {
		x.answer()
	}
	if err := <-wrote; err != nil {
		x.tb.Fatal(err)
	}
}

// answer takes one simple reply or one chunk.
func (x *transmitter) answer() {
	h := x.get(simpleLen)
	if x.extended != (be.Uint32(h) == magicExtReply) {
		x.tb.Fatalf("a reply in the wrong form: %x", h)
	}
	switch be.Uint32(h) {
	case magicExtReply:
		s := x.request(be.Uint64(h[8:]))
		if off := be.Uint64(x.get(8)); off != s.off {
			x.tb.Fatalf("a reply at %d to %+v", off, s.request)
		}
		x.chunk(s, be.Uint16(h[4:]), be.Uint16(h[6:]), x.get(int(be.Uint64(x.get(8)))))
	case magicSimple:
		cookie, errno := be.Uint64(h[8:]), be.Uint32(h[4:])
		s := x.request(cookie)
		if x.structured && (s.typ == cmdRead || s.typ == cmdBlockStatus) {
			x.tb.Fatalf("a simple reply to %+v", s.request)
		}
		if errno == 0 && s.typ == cmdRead {
			x.data(s, s.off, x.get(int(s.length)))
		}
		x.done(s, errno)
	case magicChunk:
		x.chunk(x.request(be.Uint64(h[8:])), be.Uint16(h[4:]), be.Uint16(h[6:]), x.get(int(be.Uint32(x.get(4)))))
	default:
		x.tb.Fatalf("no reply: %x", h)
	}
}

func (x *transmitter) request(cookie uint64) *sent {
	s := x.open[cookie]
	if s == nil {
		x.tb.Fatalf("a reply to request %d, which is not open", cookie)
	}
	return s
}

func (x *transmitter) chunk(s *sent, flags, typ uint16, b []byte) {
	content := s.typ == cmdRead || s.typ == cmdBlockStatus
	if !x.structured || !x.extended && !content || flags&^chunkFlagDone != 0 {
		x.tb.Fatalf("chunk %d with flags %#x to %+v", typ, flags, s.request)
	}
	s.chunks++
	errno := uint32(0)
	switch typ {
	case chunkNone:
		if len(b) != 0 || flags == 0 || s.length != 0 && content {
			x.tb.Fatalf("a chunk of nothing to %+v", s.request)
		}
	case chunkOffsetData:
		if len(b) <= 8 || s.typ != cmdRead {
			x.tb.Fatalf("%d bytes of data", len(b))
		}
		x.data(s, be.Uint64(b), b[8:])
	case chunkOffsetHole:
		if len(b) != 12 || be.Uint32(b[8:]) == 0 || s.typ != cmdRead || s.flags&cmdFlagDF != 0 {
			x.tb.Fatalf("a hole of %x to %+v", b, s.request)
		}
		x.data(s, be.Uint64(b), make([]byte, be.Uint32(b[8:])))
	case chunkBlockStatus, chunkStatusExt:
		if x.extended != (typ == chunkStatusExt) {
			x.tb.Fatalf("chunk %d", typ)
		}
		x.status(s, b)
	case chunkError, chunkErrorOffset:
		errno = x.failure(s, typ, b)
	default:
		x.tb.Fatalf("chunk %d", typ)
	}
	if flags&chunkFlagDone != 0 {
		x.done(s, errno)
	}
}

// failure checks an error chunk: it says why, and an offset lies in the range of a READ or CACHE.
func (x *transmitter) failure(s *sent, typ uint16, b []byte) (errno uint32) {
	if len(b) < 6 {
		x.tb.Fatalf("an error chunk of %x", b)
	}
	rest := b[6:]
	text := int(be.Uint16(b[4:]))
	switch {
	case typ == chunkError && len(rest) == text:
	case typ == chunkErrorOffset && (s.typ == cmdRead || s.typ == cmdCache) && len(rest) == text+8:
		if at := be.Uint64(rest[text:]); at < s.off || at >= s.off+s.length {
			x.tb.Fatalf("an error at %d of %+v", at, s.request)
		}
	default:
		x.tb.Fatalf("an error chunk of %x", b)
	}
	return be.Uint32(b)
}

// data checks a part of a READ: it was not there yet, and is what the model holds, but for blocks that are being changed.
func (x *transmitter) data(s *sent, off uint64, p []byte) {
	if off < s.off || off+uint64(len(p)) > s.off+s.length || s.flags&cmdFlagDF != 0 && s.chunks > 1 {
		x.tb.Fatalf("%d bytes at %d in reply to %+v", len(p), off, s.request)
	}
	for i, b := range p {
		at := int64(off) + int64(i)
		if s.covered[at-int64(s.off)] {
			x.tb.Fatalf("byte %d came twice", at)
		}
		s.covered[at-int64(s.off)] = true
		if b != x.disk[at] && x.touched[at/ramBlock] == 0 {
			x.tb.Fatalf("byte %d is %d, want %d, in reply to %+v", at, b, x.disk[at], s.request)
		}
	}
}

// status checks the descriptors of a BLOCK_STATUS.
func (x *transmitter) status(s *sent, b []byte) {
	head, each := 4, 8
	if x.extended {
		head, each = 8, 16
	}
	if s.typ != cmdBlockStatus || len(b) < head+each || (len(b)-head)%each != 0 || be.Uint32(b) != metaContextID(0) || s.flags&cmdFlagReqOne != 0 && len(b) != head+each {
		x.tb.Fatalf("a status of %d bytes to %+v", len(b), s.request)
	}
	at, end := int64(s.off), int64(s.off)+int64(s.length)
	last := ^uint32(0)
	for d := b[head:]; len(d) > 0; d = d[each:] {
		n, state := int64(be.Uint32(d)), be.Uint32(d[4:])
		if x.extended {
			n, state = int64(be.Uint64(d)), uint32(be.Uint64(d[8:]))
		}
		if n == 0 || at+n > end || state == last || state != 0 && state != stateHole|stateZero {
			x.tb.Fatalf("%d bytes at %d are %d, after %d", n, at, state, last)
		}
		for ; n > 0; n-- {
			if blk := at / ramBlock; x.touched[blk] == 0 && x.present[blk] == (state != 0) {
				x.tb.Fatalf("byte %d is said to be %d", at, state)
			}
			at++
		}
		last = state
	}
	if s.flags&cmdFlagReqOne == 0 && at != end {
		x.tb.Fatalf("the status ends at %d, not at %d", at, end)
	}
}

// done checks the outcome of a request, and does to the model what the request did.
func (x *transmitter) done(s *sent, errno uint32) {
	if want := x.wantErrno(s); errno != want {
		x.tb.Fatalf("errno %d, want %d, in reply to %+v", errno, want, s.request)
	}
	delete(x.open, s.cookie)
	if errno != 0 {
		return
	}
	for i, c := range s.covered {
		if !c {
			x.tb.Fatalf("byte %d did not come in reply to %+v", i, s.request)
		}
	}
	if s.length == 0 || s.typ != cmdWrite && s.typ != cmdTrim && s.typ != cmdWriteZeroes {
		return
	}
	from, to := int64(s.off), int64(s.off)+int64(s.length)
	if clear(x.disk[from:to]); s.typ == cmdWrite {
		copy(x.disk[from:to], s.payload)
	}
	noHole := s.typ == cmdWrite || s.flags&cmdFlagNoHole != 0 && s.typ == cmdWriteZeroes
	for b := from / ramBlock; b <= (to-1)/ramBlock; b++ {
		whole := from <= b*ramBlock && (b+1)*ramBlock <= to
		x.present[b] = noHole || x.present[b] && !whole
	}
}

// settle compares the device with the model after a batch. Where requests of a batch met, any order of theirs is right,
// and the model takes over what the device has.
func (x *transmitter) settle() {
	have := x.device.content()
	for blk, n := range x.touched {
		from, to := blk*ramBlock, min((blk+1)*ramBlock, fuzzSize)
		if n > 1 {
			copy(x.disk[from:to], have[from:to])
			x.present[blk] = x.device.present[blk]
		}
	}
	if !bytes.Equal(have, x.disk) {
		x.tb.Fatal("the device holds something else than the model")
	}
	for blk, p := range x.present {
		if x.device.present[blk] != p {
			x.tb.Fatalf("block %d: present %v, want %v", blk, !p, p)
		}
	}
}

// breaks ends the connection in the way that the program says, with requests before it that must be answered.
func (x *transmitter) breaks(how byte) {
	clear(x.touched)
	before := &sent{request: request{typ: cmdFlush, cookie: x.next}}
	x.open[x.next] = before
	b, want := x.header(0, cmdFlush, x.next, 0, 0), error(nil)
	read := x.header(0, cmdRead, 0, 0, 512)
	switch how % 4 {
	case 0:
		b += x.header(uint16(how)&^cmdFlagPayload, cmdDisc, 0, uint64(how), uint64(how)) + "what is behind it is not read"
	case 1:
		bad := []byte(read)
		bad[how/4%4] ^= how | 1
		b, want = b+string(bad), ErrProtocol
	case 2: // the client goes away in the middle of a header
		b, want = b+read[:1+int(how/4)%(len(read)-1)], io.ErrUnexpectedEOF
	case 3: // in the middle of a payload, of a request that is valid or not
		flags := uint16(how/4%2) * cmdFlagReqOne
		b, want = b+x.header(flags, cmdWrite, 0, 0, 100<<(how/8%12))+x.code.Text(99), io.ErrUnexpectedEOF
	}
	x.exchange(b)
	_ = x.Conn.(interface{ CloseWrite() error }).CloseWrite()
	if err := x.hungUp(); want == nil && err != nil || want != nil && !errors.Is(err, want) {
		x.tb.Fatalf("the connection ended with %v, want %v (%d)", err, want, how)
	}
	if have := x.device.content(); !bytes.Equal(have, x.disk) {
		x.tb.Fatal("a request that did not arrive whole has changed the device")
	}
}

// FuzzTransmission is a program of requests, well-formed and broken, several under way at a time, against a real server,
// with simple or structured replies, or with extended headers.
// One block of the disk fails. A model knows the right answer to each request, and the content that reads, statuses and,
// after each batch, the disk must have.
func FuzzTransmission(f *testing.F) {
	for mode := range byte(8) {
		f.Add([]byte{mode, 4, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 1, 0, 2, 3, 0, 0, 0, 0, 0, 0, 7, 0, 4, 0, 0, 0, 0, 5, 6, 2, 0, 0, 2, 0, 1, 9})
		f.Add([]byte{mode, 1, 1, 1, 0, 0, 8, 0, 3, 3, 6, 1, 0, 0, 8, 0, 1, 4, 0, 0, 0, 9, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 3, 200, 1, 0, 0, 0, 0, 0, 5})
		f.Add([]byte{mode, 2, 0, 4, 4, 0, 0, 0, 0, 7, 8, 4, 0, 0, 0, 0, 255, 0, 0, 0, 0, 1, 0, 1, 201, 0, 0, 0, 0, 1, 5, 0, 2, 1, 0, 7, 7})
		f.Add([]byte{mode, 5, 1, 0, 1, 0, 0, 2, 0, 1, 0, 2, 255, 255, 9, 9, 0, 0, 3, 0, 5, 0, 0, 1, 0, 5, 1, 0, 200, 0, 4, 0, 0, 0, 0, 0, 0, 6})
	}
	f.Add([]byte{2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 7, 8, 4, 0, 0, 0, 0, 255, 0}) // a status that may have one descriptor
	// Little memory, and a batch of replies beside a request that waits for a worker: it hung.
	f.Add([]byte("\x97\x87\x1f\x1f\x1f\x1f\x1f\x1f\x1f\x1f\x1f\x87\x87\x1f\x1f\x1f\x87\x87\x87\x870\x1f\x87\x87\x1f\x1f\x1f\x1f\x1f \x1f1G0\x1f"))
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) <= 400 {
			transmit(t, program, nil, nil)
		}
	})
}

// Programs of requests have the same effects over TLS.
func TestProgramsOverTLS(t *testing.T) {
	p := newPKI(t)
	rng := rand.New(rand.NewPCG(8, 9))
	for mode := range 32 {
		program := make([]byte, 1+rng.IntN(400))
		for i := range program {
			program[i] = byte(rng.Uint32())
		}
		program[0] = byte(mode)
		transmit(t, program, p.config(t, p.server, "server"), p.config(t, p.client, "client"))
	}
}

// transmit runs a program of FuzzTransmission. With a server's and a client's configuration it does so over TLS.
func transmit(t *testing.T, program []byte, server, secure *tls.Config) {
	x := &transmitter{code: fuzzcode.Code{B: program}, device: fuzzRAM(), disk: make([]byte, fuzzSize), present: make([]bool, (fuzzSize+ramBlock-1)/ramBlock), open: map[uint64]*sent{}, touched: map[int64]int{}}
	mode := x.code.Byte()
	x.readOnly = mode&1 != 0
	x.client = pairClient(t, exportMap{"disk": {Device: x.device, ReadOnly: x.readOnly}}, Options{TLS: server, Workers: 2 + int(mode>>3)%3, MaxInFlight: 1 << (12 + mode>>5)})
	x.secure = secure
	defer x.Close()
	if x.extended = mode&4 != 0; x.extended {
		extend(x.client, contextAllocation)
		x.structured = true
	} else {
		x.client.open("disk", mode&2 != 0)
	}
	x.allocation = x.structured
	end := byte(0)
	for len(x.code.B) > 0 {
		n := x.code.Byte()
		if n >= 250 {
			end = x.code.Byte()
			break
		}
		x.batch(1 + int(n)%fuzzBatch)
	}
	x.breaks(end)
	if x.device.opens.Load() != x.device.closes.Load() {
		t.Fatalf("%d opens, %d closes", x.device.opens.Load(), x.device.closes.Load())
	}
}
