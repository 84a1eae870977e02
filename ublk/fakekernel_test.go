package ublk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// fakeKernel is a driver behind the memory of a ring, for every copy mode. It takes the submission entries of a real
// transport, dispatches the requests that a test gives it, copies payloads as the mode requires, checks that the other
// side keeps to the protocol, and performs reads from byte slices. It is the transport's kernel and charDevice.
type fakeKernel struct {
	t     testing.TB
	mode  CopyMode
	buf   []byte // the tags' buffers
	descs []byte
	ring  *ring
	files map[int][]byte // content by fd
	// readRes, when set, changes what a read returns: it gets the number of the read and the bytes it would give.
	readRes func(nth, n int) int
	// copyRes, when set, changes how much a pread or pwrite copies, likewise.
	copyRes func(nth, n int) (int, error)
	// enterErr, when set, returns the outcome of the nth enter. EINTR comes after the work, other errors instead of it.
	enterErr func(nth int) error
	// takes, when set, limits how many elements the nth COMMIT takes; one that takes none is refused with the error.
	takes func(nth, n int) (int, unix.Errno)
	// alter, when set, may change the nth completion that is delivered, or hold it back until release.
	alter func(nth int, c *cqe) (late bool)
	// refill, when set, returns the next request for a tag that has become free.
	refill func() ioDesc

	mu       sync.Mutex // guards what follows
	cond     *sync.Cond
	owner    []tagOwner
	payload  [][]byte // of the request of each tag: what a write brings, what a read got
	addrs    []uint64
	results  chan fakeResult // commits, in their order
	backlog  []cqe           // completions that no enter has delivered
	work     []cqe           // requests that wait for an enter with events, which makes them completions
	entered  int
	commits  int
	reads    int
	copies   int
	held     []cqe // reads that hold keeps back, and completions that alter does
	altered  int   // completions that alter has seen
	hold     bool
	armed    bool
	pending  bool // an interrupt
	waits    int  // enters that had to sleep
	stopping bool
	closed   bool

	// CopyBatch
	fifo    []uint16 // dispatched tags that no FETCH has delivered
	fetches []uint64 // user data of the FETCHes in force
	pbufs   []pbuf
	pbufPos uint16
}

type tagOwner uint8

const (
	tagUnknown tagOwner = iota
	tagIdle             // fetched, waits for a request
	tagQueued           // has a request that the server does not know yet (CopyBatch)
	tagServer           // dispatched
	tagEnded
)

type fakeResult struct {
	tag int
	res int32
	d   ioDesc // the request
	bad bool   // a read that did not bring fill(d)
}

const fakeEvent = 1 << 20 // the file that the transport reads to learn of interrupts

func newFakeKernel(t testing.TB, mode CopyMode, depth int, buf []byte) *fakeKernel {
	k := &fakeKernel{
		t: t, mode: mode, buf: buf, files: map[int][]byte{}, owner: make([]tagOwner, depth),
		payload: make([][]byte, depth), addrs: make([]uint64, depth),
		descs: make([]byte, depth*descSize), results: make(chan fakeResult, 4*depth),
	}
	k.cond = sync.NewCond(&k.mu)
	k.ring = &ring{kernel: k}
	const head = 256
	p := &ringParams{sqEntries: 32, cqEntries: 64}
	for int(p.cqEntries) < 4*depth {
		p.cqEntries *= 2
	}
	p.sq = sqOffsets{head: 0, tail: 4, mask: 8, array: head}
	p.cq = cqOffsets{head: 16, tail: 20, mask: 24, cqes: head + 4*p.sqEntries}
	k.ring.ringMem = fakeMemory(t, int(p.cq.cqes+p.cqEntries*cqeSize))
	k.ring.sqeMem = fakeMemory(t, int(p.sqEntries)*sqeSize)
	*(*uint32)(unsafe.Pointer(&k.ring.ringMem[p.sq.mask])) = p.sqEntries - 1
	*(*uint32)(unsafe.Pointer(&k.ring.ringMem[p.cq.mask])) = p.cqEntries - 1
	k.ring.attach(p)
	return k
}

func fakeMemory(t testing.TB, n int) []byte {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	return mem
}

// transport makes the real transport of the mode on this kernel.
func (k *fakeKernel) transport() transport {
	c := transportConfig{mode: k.mode, queue: 3, depth: len(k.owner), ioMax: fakeIOMax, descs: k.descs, buf: k.buf, char: k}
	p, err := newTransportOn(k.ring, c)
	if err != nil {
		k.t.Fatal(err)
	}
	return p
}

func (k *fakeKernel) register(op int, arg unsafe.Pointer, n int) error {
	if op == registerPbufRing {
		reg := (*pbufReg)(arg)
		k.pbufs = unsafe.Slice((*pbuf)(pointer(reg.addr)), reg.entries)
	}
	return nil
}

// pointer is what an entry's address points to.
func pointer(addr uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&addr)) }

func (k *fakeKernel) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
}

func (k *fakeKernel) enter(submit, minComplete, flags uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.entered++
	var err error
	if k.enterErr != nil {
		if err = k.enterErr(k.entered); err != nil && err != unix.EINTR {
			return err
		}
	}
	for range submit {
		head := *k.ring.sqHead
		e := (*sqe)(unsafe.Pointer(&k.ring.sqeMem[(head&k.ring.sqMask)*sqeSize]))
		*k.ring.sqHead = head + 1
		k.take(e)
		*e = sqe{opcode: 0xff} // the kernel is done with it
	}
	for {
		if flags&enterGetEvents != 0 {
			k.deferred()
		}
		k.deliver()
		if err != nil || *k.ring.cqTail-*k.ring.cqHead >= minComplete {
			return err
		}
		k.waits++
		k.cond.Wait()
	}
}

// deferred does the driver's deferred work, as a ring with DEFER_TASKRUN has it done.
func (k *fakeKernel) deferred() {
	k.backlog = append(k.backlog, k.work...)
	k.work = k.work[:0]
	k.deliverTags()
	if k.pending && k.armed {
		k.pending, k.armed = false, false
		k.post(completeWake, 0, 8)
	}
}

// deliver moves completions to the ring while it has room.
func (k *fakeKernel) deliver() {
	n := 0
	for ; n < len(k.backlog) && *k.ring.cqTail-*k.ring.cqHead <= k.ring.cqMask; n++ {
		if k.alter != nil {
			if k.altered++; k.alter(k.altered, &k.backlog[n]) {
				k.held = append(k.held, k.backlog[n])
				continue
			}
		}
		*(*cqe)(unsafe.Add(k.ring.cqes, uintptr(*k.ring.cqTail&k.ring.cqMask)*cqeSize)) = k.backlog[n]
		*k.ring.cqTail++
	}
	k.backlog = k.backlog[:copy(k.backlog, k.backlog[n:])]
}

func (k *fakeKernel) post(kind completionKind, index int, res int32) {
	k.backlog = append(k.backlog, cqe{userData: userData(kind, index), res: res})
}

// take performs one entry.
func (k *fakeKernel) take(e *sqe) {
	kind, index := completionKind(e.userData>>32), int(uint32(e.userData))
	switch {
	case e.opcode == opRead && kind == completeWake:
		if k.armed || e.fd != fakeEvent || e.len != 8 {
			k.t.Errorf("armed twice, or to read %d bytes of %d", e.len, e.fd)
		}
		k.armed = true
	case e.opcode == opRead:
		k.read(e)
	case e.opcode != opURingCmd || e.flags&sqeFixedFile == 0 || e.fd != 0:
		k.t.Errorf("entry %+v", e)
	case k.mode == CopyBatch:
		k.batch(e)
	default:
		cmd := (*ioCmd)(unsafe.Pointer(&e.cmd))
		if int(cmd.tag) != index || cmd.queueID != 3 {
			k.t.Errorf("command of tag %d in queue %d has user data %#x", cmd.tag, cmd.queueID, e.userData)
		}
		switch e.off {
		case ioFetchReq:
			k.offer(index, cmd.addr, tagUnknown, 0)
		case ioCommitAndFetchReq:
			k.offer(index, cmd.addr, tagServer, cmd.result)
		default:
			k.t.Errorf("command %#x", e.off)
		}
	}
}

// offer gives a tag back to the driver.
func (k *fakeKernel) offer(tag int, addr uint64, from tagOwner, res int32) {
	if k.owner[tag] != from {
		k.t.Errorf("tag %d handed over in state %d, want %d", tag, k.owner[tag], from)
	}
	if (addr == 0) != (k.mode == CopyUser) {
		k.t.Errorf("tag %d has address %#x", tag, addr)
	}
	k.addrs[tag] = addr
	if from == tagServer {
		d := *k.descOf(tag)
		read := Op(d.opFlags&opMask) == OpRead && res > 0
		if read && k.mode != CopyUser {
			copy(k.payload[tag], k.buffer(tag)[:res])
		}
		k.results <- fakeResult{tag, res, d, read && !allAre(k.payload[tag], fill(d))}
	}
	k.owner[tag] = tagIdle
	if k.stopping && k.mode != CopyBatch {
		k.end(tag)
	} else if k.refill != nil {
		k.give(tag, k.refill())
	}
	k.cond.Broadcast()
}

func (k *fakeKernel) end(tag int) {
	k.owner[tag] = tagEnded
	k.post(completeIO, tag, -int32(unix.ENODEV))
}

// buffer is the memory that the transport gave for tag, which must be that tag's.
func (k *fakeKernel) buffer(tag int) []byte {
	off := int(k.addrs[tag] - uint64(uintptr(unsafe.Pointer(&k.buf[0]))))
	if off != tag*fakeIOMax {
		k.t.Errorf("tag %d has the buffer at %d", tag, off)
	}
	return k.buf[off:][:fakeIOMax]
}

func (k *fakeKernel) descOf(tag int) *ioDesc {
	return (*ioDesc)(unsafe.Pointer(&k.descs[tag*descSize]))
}

// batch performs one batch command.
func (k *fakeKernel) batch(e *sqe) {
	cmd := *(*batchIO)(unsafe.Pointer(&e.cmd))
	res := int32(0)
	switch e.off {
	case ioPrepCmds:
		k.elements(e, cmd, int(cmd.elements), tagUnknown)
	case ioCommitCmds:
		n := int(cmd.elements)
		var errno unix.Errno
		if k.takes != nil {
			n, errno = k.takes(k.commits, n)
		}
		k.commits++
		k.elements(e, cmd, n, tagServer)
		if res = int32(n) * elemSize; n == 0 {
			res = -int32(errno)
		}
	case ioFetchCmds:
		if e.flags&sqeBufferSelect == 0 || e.opFlags != cmdMultishot || cmd.elemBytes != 2 || cmd.flags != 0 {
			k.t.Errorf("FETCH %+v", cmd)
		}
		if !k.stopping {
			k.fetches = append(k.fetches, e.userData)
			return
		}
		res = -int32(unix.ENODEV)
	default:
		k.t.Errorf("command %#x", e.off)
	}
	k.backlog = append(k.backlog, cqe{userData: e.userData, res: res})
}

func (k *fakeKernel) elements(e *sqe, cmd batchIO, n int, from tagOwner) {
	if cmd.queueID != 3 || cmd.elemBytes != elemSize || cmd.flags != batchHasBufAddr || int(e.len) != int(cmd.elements)*elemSize {
		k.t.Errorf("batch command %+v of %d bytes", cmd, e.len)
	}
	for _, el := range unsafe.Slice((*batchElem)(pointer(e.addr)), cmd.elements)[:n] {
		k.offer(int(el.tag), el.addr, from, el.result)
	}
}

// deliverTags gives dispatched tags to a FETCH.
func (k *fakeKernel) deliverTags() {
	for len(k.fifo) > 0 && len(k.fetches) > 0 {
		if k.pbufs[0].tail == k.pbufPos {
			k.backlog = append(k.backlog, cqe{userData: k.fetches[0], res: -int32(unix.ENOBUFS)})
			k.fetches = k.fetches[:copy(k.fetches, k.fetches[1:])]
			continue
		}
		b := k.pbufs[int(k.pbufPos)&(len(k.pbufs)-1)]
		k.pbufPos++
		n := min(len(k.fifo), int(b.len)/tagSize, 1+k.entered%3) // lists of varying length
		for i, tag := range k.fifo[:n] {
			k.owner[tag] = tagServer
			binary.NativeEndian.PutUint16(unsafe.Slice((*byte)(pointer(b.addr)), b.len)[i*tagSize:], tag)
		}
		k.fifo = k.fifo[:copy(k.fifo, k.fifo[n:])]
		k.backlog = append(k.backlog, cqe{
			userData: k.fetches[0], res: int32(n * tagSize),
			flags: cqeBuffer | cqeMore | uint32(b.id)<<cqeBufferShift,
		})
	}
}

func (k *fakeKernel) read(e *sqe) {
	b := unsafe.Slice((*byte)(pointer(e.addr)), e.len)
	n := 0
	if content, ok := k.files[int(e.fd)]; !ok {
		n = -int(unix.EBADF)
	} else if int64(e.off) < int64(len(content)) {
		n = len(content[e.off:])
	}
	n = min(n, len(b))
	if k.readRes != nil {
		n = k.readRes(k.reads, n)
	}
	k.reads++
	if n > 0 {
		copy(b[:n], k.files[int(e.fd)][e.off:])
	}
	c := cqe{userData: e.userData, res: int32(n)}
	if k.hold {
		k.held = append(k.held, c)
		return
	}
	k.backlog = append(k.backlog, c)
}

// userCopy is a pread or pwrite on the char device, on the payload of a request that the server has.
func (k *fakeKernel) userCopy(p []byte, off int64, op Op) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(p)
	if k.copyRes != nil {
		var err error
		if n, err = k.copyRes(k.copies, n); err != nil {
			k.copies++
			return 0, err
		}
	}
	k.copies++
	at := off - userCopyBase
	queue, tag, skip := at>>userQueueShift, int(at>>userTagShift)&0xffff, int(at)&(1<<userTagShift-1)
	if k.mode != CopyUser || queue != 3 || k.owner[tag] != tagServer || Op(k.descOf(tag).opFlags&opMask) != op ||
		skip+len(p) > len(k.payload[tag]) {
		k.t.Errorf("copy of %d bytes at %d of tag %d in queue %d, state %d", len(p), skip, tag, queue, k.owner[tag])
		return 0, unix.EINVAL
	}
	if op == OpWrite {
		return copy(p[:n], k.payload[tag][skip:]), nil
	}
	return copy(k.payload[tag][skip:], p[:n]), nil
}

func (k *fakeKernel) pread(p []byte, off int64) (int, error)  { return k.userCopy(p, off, OpWrite) }
func (k *fakeKernel) pwrite(p []byte, off int64) (int, error) { return k.userCopy(p, off, OpRead) }
func (k *fakeKernel) interruptFD() int                        { return fakeEvent }

func (k *fakeKernel) interrupt() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pending = true
	k.cond.Broadcast()
}

// dispatch gives the loop a request on any idle tag, waiting for one. A write brings bytes of value fill(d).
func (k *fakeKernel) dispatch(d ioDesc) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	for {
		if tag, ok := k.tryDispatch(d); ok {
			return tag
		}
		k.cond.Wait()
	}
}

func (k *fakeKernel) tryDispatch(d ioDesc) (tag int, ok bool) {
	for tag, o := range k.owner {
		if o == tagIdle {
			k.give(tag, d)
			return tag, true
		}
	}
	return 0, false
}

func (k *fakeKernel) give(tag int, d ioDesc) {
	*k.descOf(tag) = d
	size := int(d.sectors) << sectorShift
	if op := Op(d.opFlags & opMask); op == OpRead || op == OpWrite {
		if cap(k.payload[tag]) < size {
			k.payload[tag] = make([]byte, size)
		}
		k.payload[tag] = k.payload[tag][:size]
		set(k.payload[tag], ^fill(d))
		if op == OpWrite {
			set(k.payload[tag], fill(d))
			if k.mode != CopyUser {
				copy(k.buffer(tag), k.payload[tag])
			}
		}
	}
	if k.mode == CopyBatch {
		k.owner[tag] = tagQueued
		k.fifo = append(k.fifo, uint16(tag))
	} else {
		k.owner[tag] = tagServer
		k.work = append(k.work, cqe{userData: userData(completeIO, tag)})
	}
	k.cond.Broadcast()
}

// commands counts the tags that the server has not got: those that an old driver can cancel.
func (k *fakeKernel) commands() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := len(k.work)
	for _, o := range k.owner {
		if o == tagIdle || o == tagQueued {
			n++
		}
	}
	return n
}

// fill is the byte that a write brings, and that a read is to return: another one for every fakeIOMax of the disk.
func fill(d ioDesc) byte { return byte(int64(d.startSector)<<sectorShift/fakeIOMax) + 1 }

func set(p []byte, b byte) {
	for i := range p {
		p[i] = b
	}
}

func allAre(p []byte, b byte) bool {
	return len(p) == 0 || p[0] == b && bytes.Equal(p[1:], p[:len(p)-1])
}

// complete posts a completion that no entry asked for.
func (k *fakeKernel) complete(kind completionKind, index int, res int32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.post(kind, index, res)
	k.cond.Broadcast()
}

// release lets held reads complete.
func (k *fakeKernel) release() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hold = false
	k.backlog = append(k.backlog, k.held...)
	k.held = nil
	k.cond.Broadcast()
}

func (k *fakeKernel) heldReads() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.held)
}

// stop aborts idle tags, and the others when they are committed; with CopyBatch, the FETCHes.
func (k *fakeKernel) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stopping {
		return
	}
	k.stopping = true
	for tag, o := range k.owner {
		if o == tagIdle && k.mode != CopyBatch {
			k.end(tag)
		}
	}
	// A FETCH that has tags to deliver is passed over, and the last one still delivers them.
	last := len(k.fetches)
	if len(k.fifo) > 0 {
		last--
	}
	for _, ud := range k.fetches[:max(last, 0)] {
		k.backlog = append(k.backlog, cqe{userData: ud, res: -int32(unix.ENODEV)})
	}
	k.fetches = k.fetches[max(last, 0):]
	k.cond.Broadcast()
}

const fakeIOMax = 64 << 10

// fakeQueue runs a queue on a fake kernel; the test's end stops it and checks that it ended well.
type fakeQueue struct {
	*queue
	kernel *fakeKernel
	end    chan error
}

func startFake(t testing.TB, mode CopyMode, depth int, h Handler, report func(error)) *fakeQueue {
	t.Helper()
	return startFakeOn(t, newArena(1<<30), mode, depth, h, report)
}

// startFakeOn is startFake with buffers of a, for CopyUser.
func startFakeOn(t testing.TB, a *arena, mode CopyMode, depth int, h Handler, report func(error)) *fakeQueue {
	t.Helper()
	var buf []byte
	if mode != CopyUser {
		buf = make([]byte, depth*fakeIOMax)
	} else if _, err := a.join(poolBlock(fakeIOMax)); err != nil {
		t.Fatal(err)
	}
	f := &fakeQueue{kernel: newFakeKernel(t, mode, depth, buf), end: make(chan error, 1)}
	f.queue = newQueue(mode, 3, depth, fakeIOMax, buf, a, h, report)
	if err := f.start(f.kernel.transport()); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fakeQueue) loop() {
	err := f.run()
	f.queue.transport.close(f.ended == f.depth)
	f.end <- err
}

func runFake(t testing.TB, mode CopyMode, depth int, h Handler, report func(error)) *fakeQueue {
	t.Helper()
	f := startFake(t, mode, depth, h, report)
	go f.loop()
	t.Cleanup(func() { f.stopWell(t) })
	return f
}

// stopWell stops the queue and checks that nothing is left.
func (f *fakeQueue) stopWell(t testing.TB) {
	t.Helper()
	f.kernel.stop()
	if err := f.wait(); err != nil {
		t.Errorf("the loop ended with %v", err)
	}
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	if f.owned != 0 || f.reading != 0 || !f.starved.empty() || !f.kernel.closed {
		t.Errorf("%d requests and %d reads open at the end", f.owned, f.reading)
	}
	if f.pool == nil {
		return
	}
	f.pool.drop()
	if f.pool.lent != 0 || f.pool.have != 0 {
		t.Errorf("the pool has %d chunks, and has lent %d pieces", f.pool.have, f.pool.lent)
	}
	f.pool.lender.leave(poolBlock(fakeIOMax))
}

func (f *fakeQueue) wait() error {
	select {
	case err := <-f.end:
		return err
	case <-time.After(testwatch.Long):
		return fmt.Errorf("the loop does not end\n%s", testwatch.Stacks())
	}
}

// do dispatches one request and returns its result.
func (f *fakeQueue) do(t testing.TB, d ioDesc) int32 {
	t.Helper()
	tag := f.kernel.dispatch(d)
	r := testwatch.Wait(t, testwatch.Long, "an answer", f.kernel.results)
	if r.tag != tag {
		t.Fatalf("tag %d was answered, want %d", r.tag, tag)
	}
	return r.res
}

// onHost skips a test in the guest with -short: it needs no driver, and has been run outside.
func onHost(t testing.TB) {
	t.Helper()
	if os.Getenv("VDISK_GUEST") == "1" && testing.Short() {
		t.Skip("needs no driver")
	}
}

// inEachMode runs a test on the transport of every copy mode.
func inEachMode(t *testing.T, f func(t *testing.T, mode CopyMode)) {
	onHost(t)
	for mode, name := range map[CopyMode]string{CopyPlain: "plain", CopyUser: "user", CopyBatch: "batch"} {
		t.Run(name, func(t *testing.T) { f(t, mode) })
	}
}
