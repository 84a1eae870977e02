package ublk

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The parts of include/uapi/linux/io_uring.h that a ublk server needs. The versions are the Linux releases that
// introduced them.
const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7  // 5.18
	setupCoopTaskrun  = 1 << 8  // 5.19
	setupSQE128       = 1 << 10 // 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1
	setupNoSQArray    = 1 << 16 // 6.6

	enterGetEvents      = 1 << 0
	enterRegisteredRing = 1 << 4 // 5.18

	registerFiles     = 2
	unregisterFiles   = 3
	registerEventfd   = 4
	registerRingFDs   = 20
	unregisterRingFDs = 21
	registerPbufRing  = 22 // 5.19

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1

	offSQRing = 0
	offSQEs   = 0x10000000

	opAsyncCancel = 14
	opRead        = 22
	opURingCmd    = 46

	sqeFixedFile    = 1 << 0
	sqeBufferSelect = 1 << 5

	cqeBuffer      = 1 << 0 // the upper half of the flags is the buffer's id
	cqeMore        = 1 << 1 // the entry stays active
	cqeBufferShift = 16

	cmdMultishot = 1 << 1 // IORING_URING_CMD_MULTISHOT

	sqeSize = 128
	cqeSize = 16
)

// sqe is a 128-byte submission entry. cmd starts at the place of addr3 in a plain entry.
type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64 // low half of a URING_CMD: cmd_op
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

// kernel is the other side of a ring's memory. Tests replace it with a driver of their own.
type kernel interface {
	// enter takes submit entries and, if minComplete > 0, waits for that many completions. Without enterGetEvents in
	// flags it only takes the entries, and the driver's deferred work is not done.
	enter(submit, minComplete, flags uint32) error
	register(op int, arg unsafe.Pointer, n int) error
	close()
}

// ring is one io_uring with 128-byte submission entries. Its memory belongs to the kernel and is outside the Go heap.
// It is not safe for concurrent use.
type ring struct {
	kernel  kernel
	ringMem []byte
	sqeMem  []byte

	sqHead, sqTail *uint32 // the kernel moves head, this process moves tail
	sqMask         uint32
	sqNext         uint32  // the tail, including unpublished entries
	cqHead, cqTail *uint32 // this process moves head, the kernel moves tail
	cqMask         uint32
	cqes           unsafe.Pointer
}

// queueSetup lists the set-up flags for a queue's ring, best first. NO_SQARRAY (6.6) saves an indirection.
// DEFER_TASKRUN (6.1) runs the driver's work only when the thread asks for events. SINGLE_ISSUER (6.0) saves locking.
// COOP_TASKRUN (5.19) saves interrupts.
var queueSetup = []uint32{
	setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun | setupNoSQArray,
	setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun,
	setupCoopTaskrun | setupSingleIssuer,
	setupCoopTaskrun,
	0,
}

// newRing sets up a ring with the first set of flags that the kernel accepts.
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
	r := &ring{kernel: &ringFD{fd: fd, enterFD: fd}}
	if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
		r.close()
		return nil, fmt.Errorf("ublk: io_uring without SINGLE_MMAP or NODROP: %w", ErrKernelTooOld)
	}
	size := p.cq.cqes + p.cqEntries*cqeSize
	if p.flags&setupNoSQArray == 0 {
		size = max(size, p.sq.array+p.sqEntries*4)
	}
	var err error
	if r.ringMem, err = mapShared(fd, offSQRing, int(size)); err == nil {
		r.sqeMem, err = mapShared(fd, offSQEs, int(p.sqEntries)*sqeSize)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("ublk: map an io_uring: %w", err)
	}
	r.attach(p)
	return r, nil
}

// attach finds the parts of the ring in its memory.
func (r *ring) attach(p *ringParams) {
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.ringMem[off])) }
	r.sqHead, r.sqTail, r.sqMask = word(p.sq.head), word(p.sq.tail), *word(p.sq.mask)
	r.cqHead, r.cqTail, r.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.mask)
	r.cqes = unsafe.Pointer(&r.ringMem[p.cq.cqes])
	r.sqNext = *r.sqTail
	if p.flags&setupNoSQArray != 0 {
		return
	}
	// The index array is filled once: entry i of the ring is always SQE i.
	for i := range p.sqEntries {
		*word(p.sq.array + 4*i) = i
	}
}

func mapShared(fd int, off int64, size int) ([]byte, error) {
	return unix.Mmap(fd, off, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// close releases everything. It may be called on a partly made ring, and more than once.
func (r *ring) close() {
	if r.kernel == nil {
		return
	}
	if r.sqeMem != nil {
		_ = unix.Munmap(r.sqeMem)
	}
	if r.ringMem != nil {
		_ = unix.Munmap(r.ringMem)
	}
	r.kernel.close()
	r.sqeMem, r.ringMem, r.kernel = nil, nil, nil
}

func (r *ring) register(op int, arg unsafe.Pointer, n int) error {
	return r.kernel.register(op, arg, n)
}

// ringFD is the kernel side of a real ring.
type ringFD struct {
	fd        int
	enterFD   int // fd, or its index if the ring is registered with this thread
	enterFlag uint32
}

// ringFDUpdate is struct io_uring_rsrc_update.
type ringFDUpdate struct {
	offset uint32
	_      uint32
	data   uint64
}

// registerSelf registers the ring with this thread, which saves a file lookup in every enter (5.18). A failure only
// costs time.
func (k *ringFD) registerSelf() {
	u := ringFDUpdate{offset: ^uint32(0), data: uint64(k.fd)}
	if k.register(registerRingFDs, unsafe.Pointer(&u), 1) == nil {
		k.enterFD, k.enterFlag = int(u.offset), enterRegisteredRing
	}
}

func (k *ringFD) register(op int, arg unsafe.Pointer, n int) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(k.fd), uintptr(op), uintptr(arg), uintptr(n), 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// threadSignal is the signal by which the runtime, or with cgo the C library, makes all threads of the process execute
// a system call (syscall.AllThreadsSyscall, setgid(2)). The process stands still until each thread has done so.
const threadSignal = 33

// mostSignals blocks all signals except threadSignal during a wait, so that they do not end the wait with EINTR.
// Another thread takes them.
var mostSignals = ^uint64(1 << (threadSignal - 1))

func (k *ringFD) enter(submit, minComplete, flags uint32) error {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(k.enterFD), uintptr(submit), uintptr(minComplete),
		uintptr(flags|k.enterFlag), uintptr(unsafe.Pointer(&mostSignals)), unsafe.Sizeof(mostSignals))
	if errno == 0 {
		return nil
	}
	return errno
}

func (k *ringFD) close() {
	if k.enterFlag != 0 {
		u := ringFDUpdate{offset: uint32(k.enterFD)}
		_ = k.register(unregisterRingFDs, unsafe.Pointer(&u), 1)
	}
	_ = unix.Close(k.fd)
}

// get returns a cleared entry, or nil if the submission ring is full. The next enter or submit publishes the entry.
func (r *ring) get() *sqe {
	if r.sqNext-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil
	}
	e := (*sqe)(unsafe.Pointer(&r.sqeMem[(r.sqNext&r.sqMask)*sqeSize]))
	*e = sqe{}
	r.sqNext++
	return e
}

// enter submits the entries that get returned and, if minComplete > 0, waits for that many completions. The ring, and
// not the result, shows whether entries were taken, because the result of an interrupted wait does not.
func (r *ring) enter(minComplete uint32) error {
	atomic.StoreUint32(r.sqTail, r.sqNext)
	return r.kernel.enter(r.unsubmitted(), minComplete, enterGetEvents)
}

// takeBack withdraws the last entry. The kernel cannot have taken it, because it reads entries only in enter.
func (r *ring) takeBack() {
	r.sqNext--
	atomic.StoreUint32(r.sqTail, r.sqNext)
}

// submit submits entries without asking for events. With DEFER_TASKRUN the driver then receives the entries, but hands
// out nothing.
func (r *ring) submit() error {
	atomic.StoreUint32(r.sqTail, r.sqNext)
	return r.kernel.enter(r.unsubmitted(), 0, 0)
}

// next takes one completion. ok is false if there is none.
func (r *ring) next() (userData uint64, res int32, ok bool) {
	e, ok := r.nextCQE()
	return e.userData, e.res, ok
}

// nextCQE is next, and also returns the completion's flags.
func (r *ring) nextCQE() (e cqe, ok bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return cqe{}, false
	}
	e = *(*cqe)(unsafe.Add(r.cqes, uintptr(head&r.cqMask)*cqeSize))
	atomic.StoreUint32(r.cqHead, head+1)
	return e, true
}

// transient reports whether err is a result of enter after which the caller only needs to look at the completions and
// continue.
func transient(err error) bool {
	return err == unix.EINTR || err == unix.EAGAIN || err == unix.EBUSY
}

// unsubmitted returns the number of entries that the kernel has not taken yet.
func (r *ring) unsubmitted() uint32 { return r.sqNext - atomic.LoadUint32(r.sqHead) }
