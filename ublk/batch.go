package ublk

import (
	"fmt"
	"math/bits"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The batch commands of include/uapi/linux/ublk_cmd.h (7.0): _IOWR('u', nr, struct ublk_batch_io), 16 bytes.
const (
	ioPrepCmds   = 3<<30 | 16<<16 | 'u'<<8 | 0x25
	ioCommitCmds = 3<<30 | 16<<16 | 'u'<<8 | 0x26
	ioFetchCmds  = 3<<30 | 16<<16 | 'u'<<8 | 0x27

	batchHasBufAddr = 1 << 1 // UBLK_BATCH_F_HAS_BUF_ADDR: elements carry an address
)

// batchIO is struct ublk_batch_io, at byte 48 of an SQE.
type batchIO struct {
	queueID   uint16
	flags     uint16
	elements  uint16
	elemBytes uint8
	_         uint8
	_         uint64
}

// batchElem is struct ublk_elem_header and the address that follows it.
type batchElem struct {
	tag      uint16
	bufIndex uint16
	result   int32
	addr     uint64
}

const (
	elemSize = 16
	tagSize  = 2 // size of a tag in the buffer of a FETCH

	// tagBufSize is the most that the driver puts into one buffer: 128 tags (MAX_NR_TAG in ublk_drv.c).
	tagBufSize = 128 * tagSize
	// maxTagBufs limits the buffers given to the FETCHes. When the buffers run out, a FETCH ends and is issued again.
	maxTagBufs = 256
	// fetchCommands is the number of active FETCHes. Cancelling skips a FETCH that is just delivering tags. Only with a
	// second FETCH does one always come back and report the cancellation.
	fetchCommands = 2
)

// pbufReg is struct io_uring_buf_reg. pbuf is struct io_uring_buf; its reserved field in the first entry is the ring's
// tail.
type pbufReg struct {
	addr    uint64
	entries uint32
	group   uint16
	flags   uint16
	_       [3]uint64
}

type pbuf struct {
	addr uint64
	len  uint32
	id   uint16
	tail uint16
}

type batchTag uint8

const (
	batchIdle      batchTag = iota // with the driver
	batchOwned                     // delivered to the queue
	batchCommitted                 // answered; not yet confirmed by the driver
	batchEnded
)

// batchTransport is the transport of CopyBatch. One command carries all answers of a turn. Tags arrive as lists, in
// buffers that two long-lived FETCH commands fill. The driver aborts these two commands and not a command for each tag,
// so the transport itself reports the end of each tag once the driver has the tag back.
type batchTransport struct {
	*ringTransport
	tags    []batchTag
	elems   []*elemBuf
	idle    []int // element buffers not used by a command
	filling int   // the element buffer that commits are added to, or -1
	prep    bool  // filling holds the tags' first buffers, for a PREP

	pbufs   []pbuf // ring of buffers for the FETCHes to fill
	pbufMem []byte
	tagMem  []byte
	arrived []byte // tags in buffer current that the queue has not got yet
	current int    // the buffer that arrived is in, or -1

	fetches int // active FETCHes
	aborted bool
	drained bool // aborted, and the ring has been entered since: no more tags come
	scan    int  // no tag below it is idle
}

// elemBuf holds the elements of one command, outside the Go heap.
type elemBuf struct {
	mem     []byte
	n, done int
}

func newBatchTransport(p *ringTransport) (transport, error) {
	b := &batchTransport{ringTransport: p, tags: make([]batchTag, p.depth), filling: -1, current: -1}
	if err := b.mapTagBuffers(); err != nil {
		b.close(true)
		b.free()
		return nil, err
	}
	return b, nil
}

// mapTagBuffers makes the buffers for tags, and the ring that passes them to the kernel.
func (p *batchTransport) mapTagBuffers() (err error) {
	n := min(1<<bits.Len(uint(p.depth-1)), maxTagBufs) // a power of two
	if p.tagMem, _, err = mapAnonymous(roundUp(n*tagBufSize, os.Getpagesize())); err != nil {
		return err
	}
	if p.pbufMem, _, err = mapAnonymous(roundUp(n*int(unsafe.Sizeof(pbuf{})), os.Getpagesize())); err != nil {
		return err
	}
	p.pbufs = unsafe.Slice((*pbuf)(unsafe.Pointer(&p.pbufMem[0])), n)
	reg := pbufReg{addr: uint64(uintptr(unsafe.Pointer(&p.pbufMem[0]))), entries: uint32(n)}
	if err := p.ring.register(registerPbufRing, unsafe.Pointer(&reg), 1); err != nil {
		return fmt.Errorf("ublk: register buffers for tags: %w", err)
	}
	for id := range n {
		p.provide(id)
	}
	return nil
}

// provide gives a buffer to the kernel.
func (p *batchTransport) provide(id int) {
	tail := p.pbufs[0].tail
	b := &p.pbufs[int(tail)&(len(p.pbufs)-1)]
	b.addr = uint64(uintptr(unsafe.Pointer(&p.tagMem[id*tagBufSize])))
	b.len, b.id = tagBufSize, uint16(id)
	// The kernel may read the entry once the tail is stored. There is no 16-bit atomic store, so the adjacent id is
	// stored with it.
	word := [2]uint16{p.pbufs[0].id, tail + 1}
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&p.pbufs[0].id)), *(*uint32)(unsafe.Pointer(&word)))
}

func (p *batchTransport) fetch(tag int) {
	p.prep = true
	p.add(tag, 0)
}

func (p *batchTransport) commit(tag int, result int32) { p.add(tag, result) }

// add adds a tag to the element buffer of the next command.
func (p *batchTransport) add(tag int, result int32) {
	if p.filling < 0 && !p.newFilling() {
		return
	}
	b := p.elems[p.filling]
	*b.at(b.n) = batchElem{tag: uint16(tag), result: result, addr: p.addr(tag)}
	b.n++
	p.tags[tag] = batchCommitted
}

func (b *elemBuf) at(i int) *batchElem { return (*batchElem)(unsafe.Pointer(&b.mem[i*elemSize])) }

// newFilling takes an idle element buffer or makes one, and reports whether that succeeded. There are at most as many
// as tags, and usually only one, because a command completes before the turn that submits it returns.
func (p *batchTransport) newFilling() bool {
	if n := len(p.idle); n > 0 {
		p.filling, p.idle = p.idle[n-1], p.idle[:n-1]
	} else {
		mem, _, err := mapAnonymous(roundUp(p.depth*elemSize, os.Getpagesize()))
		if err != nil {
			p.err = err
			return false
		}
		p.filling = len(p.elems)
		p.elems = append(p.elems, &elemBuf{mem: mem})
	}
	b := p.elems[p.filling]
	b.n, b.done = 0, 0
	return true
}

func (p *batchTransport) submitAndWait(wait bool) error {
	if p.filling >= 0 {
		p.submit()
	}
	last := p.aborted
	entered, err := p.enter(wait && (p.drained || !p.aborted))
	if last && entered {
		p.drained = true
	}
	return err
}

func (p *batchTransport) flush() (done bool, err error) {
	if p.filling >= 0 {
		p.submit()
	}
	return p.ringTransport.flush()
}

// submit queues the command for the added elements.
func (p *batchTransport) submit() {
	if p.prep {
		p.elemCommand(ioPrepCmds, completePrep, p.filling)
		for id := range fetchCommands {
			p.fetchCommand(id)
		}
	} else {
		p.elemCommand(ioCommitCmds, completeCommit, p.filling)
	}
	p.prep, p.filling = false, -1
}

func (p *batchTransport) elemCommand(op uint32, kind completionKind, index int) {
	e := p.entry()
	if e == nil {
		return
	}
	b := p.elems[index]
	e.opcode = opURingCmd
	e.flags = sqeFixedFile
	e.off = uint64(op)
	e.addr = uint64(uintptr(unsafe.Pointer(b.at(b.done))))
	e.len = uint32((b.n - b.done) * elemSize)
	e.userData = userData(kind, index)
	*(*batchIO)(unsafe.Pointer(&e.cmd)) = batchIO{
		queueID: uint16(p.queue), flags: batchHasBufAddr,
		elements: uint16(b.n - b.done), elemBytes: elemSize,
	}
}

func (p *batchTransport) fetchCommand(id int) {
	e := p.entry()
	if e == nil {
		return
	}
	e.opcode = opURingCmd
	e.flags = sqeFixedFile | sqeBufferSelect
	e.off = ioFetchCmds
	e.opFlags = cmdMultishot
	e.userData = userData(completeTags, id)
	*(*batchIO)(unsafe.Pointer(&e.cmd)) = batchIO{queueID: uint16(p.queue), elements: tagBufSize / tagSize, elemBytes: tagSize}
	p.fetches++
}

func (p *batchTransport) next() (completion, bool) {
	for {
		if len(p.arrived) > 0 {
			return p.nextTag(), true
		}
		e, ok := p.ring.nextCQE()
		if !ok {
			return p.nextEnd()
		}
		c := completion{kind: completionKind(e.userData >> 32), index: int(uint32(e.userData)), res: e.res}
		switch c.kind {
		case completePrep, completeCommit:
			if refused := p.confirmed(c); refused.res != 0 {
				return refused, true
			}
		case completeTags:
			if refused := p.fetched(c, e.flags); refused.res != 0 {
				return refused, true
			}
		default:
			return c, true
		}
	}
}

// nextTag takes a tag from the current buffer. After the last tag it gives the buffer back to the kernel.
func (p *batchTransport) nextTag() completion {
	tag := int(*(*uint16)(unsafe.Pointer(&p.arrived[0])))
	p.arrived = p.arrived[tagSize:]
	if len(p.arrived) == 0 {
		p.provide(p.current)
	}
	if tag >= p.depth || p.tags[tag] == batchOwned || p.tags[tag] == batchEnded {
		return completion{completeIO, tag, -int32(unix.EPROTO)}
	}
	p.tags[tag] = batchOwned
	return completion{completeIO, tag, 0}
}

// confirmed handles the result of a PREP or COMMIT. A COMMIT may be partial: its result is the number of bytes of
// elements that the driver took, and the others are sent again. If the driver took none, the result is the reason.
func (p *batchTransport) confirmed(c completion) (refused completion) {
	b := p.elems[c.index]
	taken := int(c.res) / elemSize
	if c.kind == completePrep && c.res == 0 {
		taken = b.n
	}
	if taken <= 0 || taken > b.n-b.done {
		return refusal(int(b.at(b.done).tag), c.res)
	}
	for range taken {
		tag := int(b.at(b.done).tag)
		if p.tags[tag] == batchCommitted { // unless it has been delivered again already
			p.tags[tag] = batchIdle
			p.scan = min(p.scan, tag)
		}
		b.done++
	}
	if b.done < b.n {
		p.elemCommand(ioCommitCmds, completeCommit, c.index)
		return completion{}
	}
	p.idle = append(p.idle, c.index)
	return completion{}
}

// refusal returns the completion that ends the loop with an error. It replaces ENODEV, which would only mean the end of
// one tag.
func refusal(tag int, res int32) completion {
	if res >= 0 || res == -int32(unix.ENODEV) {
		res = -int32(unix.EIO)
	}
	return completion{completeIO, tag, res}
}

// fetched handles an event of a FETCH: tags, or the end of the FETCH.
func (p *batchTransport) fetched(c completion, flags uint32) (refused completion) {
	if flags&cqeBuffer != 0 {
		p.current = int(flags >> cqeBufferShift)
		p.arrived = p.tagMem[p.current*tagBufSize:][:max(c.res, 0)&^1]
		if len(p.arrived) == 0 {
			p.provide(p.current)
		}
	}
	if flags&cqeMore != 0 {
		return completion{}
	}
	p.fetches--
	switch {
	case c.res == -int32(unix.ENODEV):
		p.aborted = true
	case c.res < 0 && c.res != -int32(unix.ENOBUFS):
		return refusal(0, c.res)
	case !p.aborted:
		p.fetchCommand(c.index)
	}
	return completion{}
}

// nextEnd reports the end of the tags that the driver has back after an abort, one at a time.
func (p *batchTransport) nextEnd() (completion, bool) {
	if !p.drained {
		return completion{}, false
	}
	for ; p.scan < len(p.tags); p.scan++ {
		if p.tags[p.scan] == batchIdle {
			p.tags[p.scan] = batchEnded
			return completion{completeIO, p.scan, -int32(unix.ENODEV)}, true
		}
	}
	return completion{}, false
}

func (p *batchTransport) close(drained bool) {
	p.ringTransport.close(drained && p.fetches == 0)
}

func (p *batchTransport) free() {
	for _, b := range p.elems {
		_ = unix.Munmap(b.mem)
	}
	for _, mem := range [][]byte{p.pbufMem, p.tagMem} {
		if mem != nil {
			_ = unix.Munmap(mem)
		}
	}
}
