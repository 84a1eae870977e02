package ublk

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// transport is what the queue loop needs of the driver; each copy mode has its own. All of it but interrupt is called by the
// queue's thread only. fetch, commit, read and arm only queue work; turn hands it over.
type transport interface {
	// fetch offers tag to the driver for its first request.
	fetch(tag int)
	// commit answers the request of tag with result (bytes, or a negative errno) and asks for the next.
	commit(tag int, result int32)
	// load brings the payload of tag's write into p, unless the driver has done so.
	load(tag int, p []byte) error
	// store gives p to the driver as what tag's read has read, unless the driver takes it by itself.
	store(tag int, p []byte) error
	// read reads into p; its completion carries slot.
	read(slot int, fd int, p []byte, off int64)
	// arm makes the next interrupt a completion. An interrupt that comes while none is armed is not lost.
	arm()
	// submitAndWait submits what was queued and, if wait is true, returns only when there is a completion (or spuriously).
	submitAndWait(wait bool) error
	// flush submits what was queued, and has the driver hand out nothing. It is to be called until done, with all
	// completions taken in between.
	flush() (done bool, err error)
	// next takes one completion.
	next() (completion, bool)
	// desc is the request of a tag whose fetch or commit completed with result 0.
	desc(tag int) ioDesc
	// interrupt ends a turn that waits, from any goroutine.
	interrupt()
	// close releases the ring; what is still fetched, if the tags are not drained, is cancelled.
	close(drained bool)
	// free gives back the transport's memory, after close, when the tags are drained or the thread is gone.
	free()
}

// completion is one event from the transport.
type completion struct {
	kind  completionKind
	index int   // tag or slot
	res   int32 // result of the command or of the read
}

type completionKind uint8

const (
	completeIO   completionKind = iota // a fetch or commit: a request (0), or the end of the tag (negative)
	completeRead                       // a read
	completeWake                       // an interrupt

	// These stay inside batchTransport.
	completePrep
	completeCommit
	completeTags
)

// transportConfig is what a transport is made of.
type transportConfig struct {
	mode          CopyMode
	queue, depth  int
	ioMax         int
	descs         []byte // the driver's descriptors of this queue
	buf           []byte // the tags' buffers, one after the other; nil for CopyUser
	char          charDevice
	legacyOpcodes bool // commands are opcodes of one byte, as up to Linux 6.3
}

// charDevice is what a transport does with files outside its ring.
type charDevice interface {
	// pread and pwrite copy the payload of a request; see userTransport.
	pread(p []byte, off int64) (int, error)
	pwrite(p []byte, off int64) (int, error)
	// interruptFD is the file that the ring reads to learn of interrupt.
	interruptFD() int
	interrupt()
}

// newTransport sets up the ring of a queue and the transport of its mode; it must be called on the thread that will run the
// queue.
func newTransport(c transportConfig, charFD int) (transport, error) {
	// Twice the depth leaves room for a commit of every tag and as many reads in one turn; more reads than that
	// cost an extra submission. Completions that outrun the ring are kept by the kernel (NODROP).
	entries := uint32(max(2*c.depth, 64))
	r, err := newRing(entries, 4*entries, queueSetup...)
	if err != nil {
		return nil, err
	}
	r.kernel.(*ringFD).registerSelf()
	fds := [1]int32{int32(charFD)}
	if err := r.register(registerFiles, unsafe.Pointer(&fds), 1); err != nil {
		r.close()
		return nil, fmt.Errorf("ublk: register the char device with the ring: %w", err)
	}
	return newTransportOn(r, c)
}

// newTransportOn makes the transport of c's mode on a ring that it then owns.
func newTransportOn(r *ring, c transportConfig) (transport, error) {
	count, err := eventCount()
	if err != nil {
		r.close()
		return nil, err
	}
	p := &ringTransport{transportConfig: c, ring: r, count: count}
	switch c.mode {
	case CopyUser:
		return &userTransport{p}, nil
	case CopyBatch:
		return newBatchTransport(p)
	}
	return p, nil
}

// ringTransport is the transport of CopyPlain, and what the other modes share: every tag has a command of its own, and the driver
// copies between the request and the tag's buffer.
type ringTransport struct {
	transportConfig
	ring  *ring
	count []byte // where the reads of the eventfd go
	err   error  // the first entry that could not be queued; turn reports it
}

// eventCount is where every ring of the process reads its eventfd to: nobody looks at it. It is never unmapped,
// because a ring ends some time after its close, and the read with it.
var eventCount = sync.OnceValues(func() ([]byte, error) {
	mem, _, err := mapAnonymous(os.Getpagesize())
	return mem, err
})

// The user data of an entry: the kind in the high half, the tag or slot in the low half.
func userData(k completionKind, index int) uint64 { return uint64(k)<<32 | uint64(uint32(index)) }

func (p *ringTransport) fetch(tag int) { p.command(ioFetchReq, tag, 0) }

func (p *ringTransport) commit(tag int, result int32) { p.command(ioCommitAndFetchReq, tag, result) }

func (p *ringTransport) command(op uint32, tag int, result int32) {
	e := p.entry()
	if e == nil {
		return
	}
	e.opcode = opURingCmd
	e.flags = sqeFixedFile // file 0: the char device
	if p.legacyOpcodes {
		op &= opMask
	}
	e.off = uint64(op)
	e.userData = userData(completeIO, tag)
	*(*ioCmd)(unsafe.Pointer(&e.cmd)) = ioCmd{queueID: uint16(p.queue), tag: uint16(tag), result: result, addr: p.addr(tag)}
}

// addr is where the driver copies to and from; with CopyUser it must be 0.
func (p *ringTransport) addr(tag int) uint64 {
	if p.buf == nil {
		return 0
	}
	return uint64(uintptr(unsafe.Pointer(&p.buf[tag*p.ioMax])))
}

func (p *ringTransport) load(int, []byte) error  { return nil }
func (p *ringTransport) store(int, []byte) error { return nil }

func (p *ringTransport) read(slot int, fd int, b []byte, off int64) {
	p.readEntry(userData(completeRead, slot), fd, b, off)
}

func (p *ringTransport) arm() {
	p.readEntry(userData(completeWake, 0), p.char.interruptFD(), p.count[:8], 0)
}

func (p *ringTransport) readEntry(userData uint64, fd int, b []byte, off int64) {
	e := p.entry()
	if e == nil {
		return
	}
	e.opcode = opRead
	e.fd = int32(fd)
	e.off = uint64(off)
	e.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	e.len = uint32(len(b))
	e.userData = userData
}

// entry returns a free submission entry, handing over the full ring first when it must.
func (p *ringTransport) entry() *sqe {
	for range 1000 {
		if e := p.ring.get(); e != nil {
			return e
		}
		if err := p.ring.enter(0); err != nil && !transient(err) {
			p.err = fmt.Errorf("ublk: io_uring_enter with a full ring: %w", err)
			return nil
		}
	}
	p.err = fmt.Errorf("ublk: the kernel takes no entries from a full ring")
	return nil
}

func (p *ringTransport) submitAndWait(wait bool) error {
	_, err := p.enter(wait)
	return err
}

func (p *ringTransport) flush() (done bool, err error) {
	if p.err != nil || p.ring.unsubmitted() == 0 {
		return true, p.err
	}
	_, err = p.outcome(p.ring.submit())
	return false, err
}

// enter makes one system call. entered is false if it was cut short, and the kernel may not have done all its work.
func (p *ringTransport) enter(wait bool) (entered bool, err error) {
	if p.err != nil {
		return false, p.err
	}
	var n uint32
	if wait {
		n = 1
	}
	return p.outcome(p.ring.enter(n))
}

// outcome sorts the results of a system call.
func (p *ringTransport) outcome(err error) (entered bool, _ error) {
	switch {
	case err == nil:
		return true, nil
	case !transient(err):
		return false, fmt.Errorf("ublk: io_uring_enter: %w", err)
	case err == unix.EAGAIN: // no memory for a request: let others make some
		time.Sleep(time.Millisecond)
	}
	return false, nil
}

func (p *ringTransport) next() (completion, bool) {
	ud, res, ok := p.ring.next()
	return completion{kind: completionKind(ud >> 32), index: int(uint32(ud)), res: res}, ok
}

func (p *ringTransport) desc(tag int) ioDesc {
	return *(*ioDesc)(unsafe.Pointer(&p.descs[tag*descSize]))
}

func (p *ringTransport) interrupt() { p.char.interrupt() }

func (p *ringTransport) close(drained bool) {
	// The registered file holds the char device open past its close, so it goes first. But the kernel waits (without
	// end, at least in 6.12) for requests that use it: while there are fetches, only the ring's end ends those.
	if drained {
		_ = p.ring.register(unregisterFiles, nil, 0)
	}
	p.ring.close()
}

func (p *ringTransport) free() {}

// charFiles is the charDevice of a real queue: the char device, and an eventfd that interrupt writes to.
type charFiles struct{ char, event int }

func (f charFiles) interruptFD() int { return f.event }

// interrupt adds one to the eventfd. It cannot block before 2^64-2 unread interrupts.
func (f charFiles) interrupt() {
	one := [8]byte{1}
	for {
		if _, err := unix.Write(f.event, one[:]); err != unix.EINTR {
			return
		}
	}
}

// laterList is a lock-free stack of answered requests: any goroutine pushes, the queue's thread takes all.
type laterList struct{ head atomic.Pointer[Request] }

func (l *laterList) push(r *Request) {
	for {
		old := l.head.Load()
		r.next = old
		if l.head.CompareAndSwap(old, r) {
			return
		}
	}
}

func (l *laterList) take() *Request {
	if l.head.Load() == nil {
		return nil
	}
	return l.head.Swap(nil)
}

func (l *laterList) empty() bool { return l.head.Load() == nil }
