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

// transport is the part of the driver that the queue loop uses. Each copy mode has an implementation. All methods
// except interrupt are called on the queue's thread only. fetch, commit, read and arm only queue work; submitAndWait
// and flush submit it.
type transport interface {
	// fetch offers tag to the driver for its first request.
	fetch(tag int)
	// commit answers the request of tag with result (bytes, or a negative errno), and offers the tag for the next one.
	commit(tag int, result int32)
	// load copies the payload of tag's write into p, unless the driver has done so.
	load(tag int, p []byte) error
	// store copies p, the result of tag's read, to the driver, unless the driver does so by itself.
	store(tag int, p []byte) error
	// read reads from the file fd into p. Its completion has slot as its index.
	read(slot int, fd int, p []byte, off int64)
	// arm makes the next interrupt a completion. An interrupt that comes earlier becomes one when arm is called.
	arm()
	// submitAndWait submits the queued work. If wait is true, it returns only when there is a completion, or
	// spuriously.
	submitAndWait(wait bool) error
	// flush submits queued work without letting the driver hand out requests. The caller must repeat it until done is
	// true, and take all completions in between.
	flush() (done bool, err error)
	// next takes one completion.
	next() (completion, bool)
	// desc returns the request of a tag whose fetch or commit completed with result 0.
	desc(tag int) ioDesc
	// interrupt ends the wait in submitAndWait. It may be called on any goroutine.
	interrupt()
	// close releases the ring. If the tags are not drained, this cancels their fetches.
	close(drained bool)
	// free releases the transport's memory. It must come after close, and after the tags are drained or the thread has
	// ended.
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
	completeIO   completionKind = iota // a fetch or commit: a request (result 0), or the end of the tag (negative)
	completeRead                       // a read
	completeWake                       // an interrupt

	// batchTransport uses these, and does not return them.
	completePrep
	completeCommit
	completeTags
)

// transportConfig has the parameters and resources of a transport.
type transportConfig struct {
	mode          CopyMode
	queue, depth  int
	ioMax         int
	descs         []byte // the driver's descriptors of this queue
	buf           []byte // the tags' buffers, one after the other; nil for CopyUser
	char          charDevice
	legacyOpcodes bool // commands are opcodes of one byte, as up to Linux 6.3
}

// charDevice is the part of a transport's work with files that does not go through its ring.
type charDevice interface {
	// pread and pwrite copy the payload of a request; see userTransport.
	pread(p []byte, off int64) (int, error)
	pwrite(p []byte, off int64) (int, error)
	// interruptFD returns the file that becomes readable by interrupt. The ring reads it.
	interruptFD() int
	interrupt()
}

// newTransport sets up the ring of a queue, and the transport of its mode. It must be called on the thread that will
// run the queue.
func newTransport(c transportConfig, charFD int) (transport, error) {
	// Twice the depth leaves room for a commit of every tag and as many reads in one turn. More reads cost an extra
	// submission. The kernel keeps completions for which the ring has no room (NODROP).
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

// newTransportOn makes the transport of c's mode on a ring. It takes the ring over, and closes it if it fails.
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

// ringTransport is the transport of CopyPlain, and the common part of the others. Every tag has a command of its own,
// and the driver copies between the request and the tag's buffer.
type ringTransport struct {
	transportConfig
	ring  *ring
	count []byte // buffer for the reads of the eventfd
	err   error  // why an entry could not be queued; submitAndWait and flush return it
}

// eventCount returns the memory into which all rings of the process read their eventfds. The content is not used. The
// memory is never unmapped, because the read of a ring ends only some time after the ring is closed.
var eventCount = sync.OnceValues(func() ([]byte, error) {
	mem, _, err := mapAnonymous(os.Getpagesize())
	return mem, err
})

// userData returns the user data of an entry: the kind in the high half, and the tag or slot in the low half.
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

// addr returns the address of the tag's buffer for the driver, which must be 0 with CopyUser.
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

// entry returns a free submission entry. If the ring is full, it first submits the entries.
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

// enter submits and, if wait is true, waits, in one system call. entered is false if the call was interrupted; then the
// kernel may not have done all its work.
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

// outcome turns the error of a system call into the results of enter.
func (p *ringTransport) outcome(err error) (entered bool, _ error) {
	switch {
	case err == nil:
		return true, nil
	case !transient(err):
		return false, fmt.Errorf("ublk: io_uring_enter: %w", err)
	case err == unix.EAGAIN: // the kernel has no memory for a request; it may get some meanwhile
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
	// A registered file stays open in the ring after its descriptor is closed, so unregister it. Not while there are
	// fetches, though: the kernel would wait for them (without end, at least in 6.12), and only closing the ring ends
	// them.
	if drained {
		_ = p.ring.register(unregisterFiles, nil, 0)
	}
	p.ring.close()
}

func (p *ringTransport) free() {}

// charFiles is the charDevice of a real queue: the descriptors of the char device, and of an eventfd for interrupt.
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
