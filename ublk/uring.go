package ublk

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The parts of include/uapi/linux/io_uring.h that a ublk server needs.
const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7  // 5.18
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1

	enterGetEvents      = 1 << 0
	enterRegisteredRing = 1 << 4 // 5.18

	registerFiles     = 2
	unregisterFiles   = 3
	registerEventfd   = 4
	registerRingFDs   = 20
	unregisterRingFDs = 21

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1

	offSQRing = 0
	offSQEs   = 0x10000000

	opAsyncCancel = 14
	opRead        = 22
	opURingCmd    = 46

	sqeFixedFile = 1 << 0

	sqeSize = 128
	cqeSize = 16
)

// sqe is a 128-byte submission entry. cmd starts where addr3 of a plain entry stands.
type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64 // low half: cmd_op of a URING_CMD
	addr     uint64
	len      uint32
	opFlags  uint32
	userData uint64
	bufIndex uint16
	persona  uint16
	fileIdx  int32
	cmd      [80]byte
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

type sqOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	_                                                   uint64
}

type cqOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	_                                                   uint64
}

type ringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	_                                                                      [3]uint32
	sq                                                                     sqOffsets
	cq                                                                     cqOffsets
}

// ring is one io_uring with 128-byte submission entries. Its memory is the kernel's, outside the Go heap. It is not
// safe for concurrent use.
type ring struct {
	fd        int
	enterFD   int // fd, or its index when the ring is registered with this thread
	enterFlag uint32
	ringMem   []byte
	sqeMem    []byte

	sqHead, sqTail *uint32 // the kernel moves head, we move tail
	sqMask         uint32
	sqNext         uint32  // tail including entries that are not published yet
	cqHead, cqTail *uint32 // we move head, the kernel moves tail
	cqMask         uint32
	cqes           unsafe.Pointer
}

// queueSetup lists the set-up flags for a queue's ring, best first: DEFER_TASKRUN (6.1) runs the driver's work only
// when the thread asks for events, SINGLE_ISSUER (6.0) saves locking, COOP_TASKRUN (5.19) saves interrupts.
var queueSetup = []uint32{
	setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun,
	setupCoopTaskrun | setupSingleIssuer,
	setupCoopTaskrun,
	0,
}

// newRing sets up a ring with the first of the flag sets that the kernel knows.
func newRing(sqEntries, cqEntries uint32, flagSets ...uint32) (*ring, error) {
	var lastErr error
	for _, flags := range flagSets {
		p := ringParams{
			flags:     flags | setupSQE128 | setupSubmitAll | setupCQSize | setupClamp,
			cqEntries: cqEntries,
		}
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(sqEntries), uintptr(unsafe.Pointer(&p)), 0)
		if errno == 0 {
			return mapRing(int(fd), &p)
		}
		lastErr = setupError(errno)
		if errno != unix.EINVAL {
			break
		}
	}
	return nil, lastErr
}

func setupError(errno unix.Errno) error {
	switch errno {
	case unix.ENOSYS, unix.EINVAL:
		return fmt.Errorf("ublk: io_uring with 128-byte entries: %w (%w)", ErrKernelTooOld, errno)
	case unix.EPERM, unix.EACCES:
		return fmt.Errorf("ublk: io_uring is switched off for this process "+
			"(sysctl kernel.io_uring_disabled, or a seccomp filter): %w (%w)", ErrPermission, errno)
	}
	return fmt.Errorf("ublk: io_uring_setup: %w", errno)
}

func mapRing(fd int, p *ringParams) (*ring, error) {
	r := &ring{fd: fd, enterFD: fd}
	if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
		r.close()
		return nil, fmt.Errorf("ublk: io_uring without SINGLE_MMAP or NODROP: %w", ErrKernelTooOld)
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*cqeSize)
	var err error
	if r.ringMem, err = mapShared(fd, offSQRing, int(size)); err == nil {
		r.sqeMem, err = mapShared(fd, offSQEs, int(p.sqEntries)*sqeSize)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("ublk: map an io_uring: %w", err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.ringMem[off])) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), *word(p.sq.mask)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.mask)
	r.cqes = unsafe.Pointer(&r.ringMem[p.cq.cqes])
	r.sqNext = *r.sqTail
	// The index array is filled once: entry i of the ring is always SQE i.
	for i := range p.sqEntries {
		*word(p.sq.array + 4*i) = i
	}
	return r, nil
}

func mapShared(fd int, off int64, size int) ([]byte, error) {
	return unix.Mmap(fd, off, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// close releases everything; it may be called on a half-made ring, and twice.
func (r *ring) close() {
	if r.fd < 0 {
		return
	}
	if r.enterFlag != 0 {
		u := ringFDUpdate{offset: uint32(r.enterFD)}
		_ = r.register(unregisterRingFDs, unsafe.Pointer(&u), 1)
	}
	if r.sqeMem != nil {
		_ = unix.Munmap(r.sqeMem)
	}
	if r.ringMem != nil {
		_ = unix.Munmap(r.ringMem)
	}
	_ = unix.Close(r.fd)
	r.sqeMem, r.ringMem, r.fd = nil, nil, -1
}

// ringFDUpdate is struct io_uring_rsrc_update.
type ringFDUpdate struct {
	offset uint32
	_      uint32
	data   uint64
}

// registerSelf saves the file lookup of every enter on this thread (5.18); not having it costs only time.
func (r *ring) registerSelf() {
	u := ringFDUpdate{offset: ^uint32(0), data: uint64(r.fd)}
	if r.register(registerRingFDs, unsafe.Pointer(&u), 1) == nil {
		r.enterFD, r.enterFlag = int(u.offset), enterRegisteredRing
	}
}

func (r *ring) register(op int, arg unsafe.Pointer, n int) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), uintptr(op), uintptr(arg), uintptr(n), 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// get returns a cleared entry, or nil when the submission ring is full. The entry is published by the next enter.
func (r *ring) get() *sqe {
	if r.sqNext-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil
	}
	e := (*sqe)(unsafe.Pointer(&r.sqeMem[(r.sqNext&r.sqMask)*sqeSize]))
	*e = sqe{}
	r.sqNext++
	return e
}

// allSignals keeps the runtime's and the process's signals from ending a wait with EINTR: another thread takes them.
var allSignals = ^uint64(0)

// enter submits what get returned and, when minComplete > 0, waits for that many completions. Whether entries were
// taken is read from the ring, not from the result, since a wait that is interrupted hides it.
func (r *ring) enter(minComplete uint32) error {
	atomic.StoreUint32(r.sqTail, r.sqNext)
	submit := r.sqNext - atomic.LoadUint32(r.sqHead)
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.enterFD), uintptr(submit), uintptr(minComplete),
		uintptr(enterGetEvents|r.enterFlag), uintptr(unsafe.Pointer(&allSignals)), unsafe.Sizeof(allSignals))
	if errno == 0 {
		return nil
	}
	return errno
}

// next takes one completion; ok is false when there is none.
func (r *ring) next() (userData uint64, res int32, ok bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return 0, 0, false
	}
	e := (*cqe)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*cqeSize))
	userData, res = e.userData, e.res
	atomic.StoreUint32(r.cqHead, head+1)
	return userData, res, true
}

// transient tells results of enter after which the caller only has to look at the completions and go on.
func transient(err error) bool {
	return errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY)
}

// unsubmitted counts the entries that the kernel has not taken yet.
func (r *ring) unsubmitted() uint32 { return r.sqNext - atomic.LoadUint32(r.sqHead) }
