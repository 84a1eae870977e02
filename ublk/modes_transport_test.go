package ublk

import (
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// correct answers with the bytes that the fake kernel expects, and checks those of writes.
func correct(t testing.TB) handlerFunc {
	return func(r *Request) error {
		want := byte(r.Offset/fakeIOMax) + 1
		if r.Op == OpWrite && !allAre(r.Buf, want) {
			t.Errorf("the write at %d brought other bytes than %d", r.Offset, want)
		}
		if r.Op == OpRead {
			set(r.Buf, want)
		}
		return nil
	}
}

// load sends n reads and writes of any size through the queue and checks the answers.
func load(t *testing.T, q *fakeQueue, n int) {
	t.Helper()
	go func() {
		for i := range n {
			q.kernel.dispatch(desc(Op(i%2), 0, int64(i%250)*fakeIOMax, 512*(1+rand.IntN(fakeIOMax/512))))
		}
	}()
	for i := range n {
		select {
		case r := <-q.kernel.results:
			if r.bad || int(r.res) != int(r.d.sectors)<<sectorShift {
				t.Fatalf("%+v", r)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%d of %d were answered", i, n)
		}
	}
}

// TestPayloads: bytes arrive whole in both directions, whatever the mode, on the same thread or another.
func TestPayloads(t *testing.T) { inEachMode(t, testPayloads) }

func testPayloads(t *testing.T, mode CopyMode) {
	h := correct(t)
	for name, h := range map[string]Handler{
		"inline": h,
		"later":  handlerFunc(func(r *Request) error { go func() { r.Complete(h(r)) }(); return ErrAsync }),
	} {
		t.Run(name, func(t *testing.T) { load(t, runFake(t, mode, 40, h, nil), 2000) })
	}
}

// TestFaultyEnters: EINTR, EAGAIN and EBUSY of io_uring_enter lose nothing.
func TestFaultyEnters(t *testing.T) { inEachMode(t, testFaultyEnters) }

func testFaultyEnters(t *testing.T, mode CopyMode) {
	q := startFake(t, mode, 24, correct(t), nil)
	q.kernel.enterErr = func(nth int) error {
		return []error{nil, unix.EINTR, nil, unix.EBUSY, nil, unix.EAGAIN}[nth%6]
	}
	go q.loop()
	load(t, q, 600)
	q.stopWell(t)
}

// TestBrokenEnter: an enter that fails for good ends the loop.
func TestBrokenEnter(t *testing.T) { inEachMode(t, testBrokenEnter) }

func testBrokenEnter(t *testing.T, mode CopyMode) {
	q := startFake(t, mode, 4, correct(t), nil)
	q.kernel.enterErr = func(int) error { return unix.EBADF }
	go q.loop()
	if err := q.wait(); !errors.Is(err, unix.EBADF) {
		t.Errorf("the loop ended with %v", err)
	}
}

func TestPartialCommits(t *testing.T) {
	q := startFake(t, CopyBatch, 40, correct(t), nil)
	q.kernel.takes = func(nth, n int) (int, unix.Errno) { return 1 + nth%n, 0 }
	go q.loop()
	load(t, q, 2000)
	if q.kernel.commits < 100 {
		t.Errorf("%d commands for 2000 answers", q.kernel.commits)
	}
	q.stopWell(t)
}

func TestRefusedCommit(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EBUSY, unix.EINVAL, unix.ENODEV} {
		q := startFake(t, CopyBatch, 4, correct(t), nil)
		q.kernel.takes = func(nth, n int) (int, unix.Errno) { return 0, errno }
		go q.loop()
		q.kernel.dispatch(desc(OpFlush, 0, 0, 0))
		if err := q.wait(); err == nil {
			t.Errorf("%v: the loop ended well", errno)
		}
	}
}

// TestBatchesAreCommittedTogether: the answers of a turn are one command.
func TestBatchesAreCommittedTogether(t *testing.T) {
	q := startFake(t, CopyBatch, 32, correct(t), nil)
	for range 32 {
		q.kernel.dispatch(desc(OpFlush, 0, 0, 0))
	}
	for range 3 {
		q.kernel.interrupt()
		if err := q.turn(); err != nil {
			t.Fatal(err)
		}
	}
	if len(q.kernel.results) != 32 || q.kernel.commits != 1 {
		t.Errorf("%d answers in %d commands", len(q.kernel.results), q.kernel.commits)
	}
}

// TestFetchesAreMadeAgain: a FETCH that ran out of buffers, or just ended, is replaced.
func TestFetchesAreMadeAgain(t *testing.T) {
	q := runFake(t, CopyBatch, 8, correct(t), nil)
	for i := range 200 {
		q.kernel.mu.Lock()
		if n := len(q.kernel.fetches); n == fetchCommands {
			index := int(uint32(q.kernel.fetches[0]))
			q.kernel.fetches = q.kernel.fetches[:copy(q.kernel.fetches, q.kernel.fetches[1:])]
			q.kernel.post(completeTags, index, []int32{-int32(unix.ENOBUFS), 0}[i%2])
			q.kernel.cond.Broadcast()
		}
		q.kernel.mu.Unlock()
		q.do(t, desc(OpFlush, 0, 0, 0))
	}
	// And one that no driver sends ends the loop.
	p := startFake(t, CopyBatch, 8, correct(t), nil)
	p.kernel.complete(completeTags, 0, -int32(unix.EOPNOTSUPP))
	go p.loop()
	if err := p.wait(); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("the loop ended with %v", err)
	}
}

// TestTagBuffersRunOut has more tags than there are buffers for lists of them.
func TestTagBuffersRunOut(t *testing.T) {
	q := startFake(t, CopyBatch, 2*maxTagBufs, correct(t), nil)
	for range 2 * maxTagBufs {
		q.kernel.dispatch(desc(OpFlush, 0, 0, 0))
		q.kernel.mu.Lock()
		q.kernel.deliverTags() // one list for each
		q.kernel.mu.Unlock()
	}
	if len(q.kernel.fetches) != 0 {
		t.Fatalf("%d FETCHes still have buffers", len(q.kernel.fetches))
	}
	go q.loop()
	for range 2 * maxTagBufs {
		<-q.kernel.results
	}
	q.stopWell(t)
}

// TestAbortDelivers: tags that a FETCH still delivers when the driver aborts are served before the loop ends.
func TestAbortDelivers(t *testing.T) {
	for range 100 {
		q := startFake(t, CopyBatch, 8, correct(t), nil)
		for range 5 {
			q.kernel.dispatch(desc(OpWrite, 0, 0, 4096))
		}
		q.kernel.stop()
		go q.loop()
		if err := q.wait(); err != nil {
			t.Fatal(err)
		}
		if n := len(q.kernel.results); n != 5 || q.queue.ended != 8 {
			t.Fatalf("%d of 5 answered, %d of 8 tags ended", n, q.queue.ended)
		}
	}
}

func TestShortUserCopies(t *testing.T) {
	q := startFake(t, CopyUser, 8, correct(t), nil)
	q.kernel.copyRes = shortCopies
	go q.loop()
	load(t, q, 300)
	q.stopWell(t)
}

// TestFailedUserCopies: a payload that cannot be copied fails its request; a write's handler does not see it.
func TestFailedUserCopies(t *testing.T) {
	for _, c := range []struct {
		n   int
		err error
	}{{0, unix.EFAULT}, {0, nil}, {-1, nil}} {
		q := startFake(t, CopyUser, 2, handlerFunc(func(r *Request) error {
			if r.Op == OpWrite {
				t.Error("the handler saw a write without its payload")
			}
			return nil
		}), nil)
		q.kernel.copyRes = func(nth, n int) (int, error) { return min(c.n, n), c.err }
		if c.n < 0 {
			q.kernel.copyRes = func(nth, n int) (int, error) { return []int{512, 0}[nth%2], nil }
		}
		go q.loop()
		for _, op := range []Op{OpWrite, OpRead} {
			if res := q.do(t, desc(op, 0, 0, 4096)); res >= 0 {
				t.Errorf("%v: result %d", op, res)
			}
		}
		q.stopWell(t)
	}
	if err := transfer(func([]byte, int64) (int, error) { return 0, nil }, make([]byte, 1), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

// TestStarvedRequests holds more requests than the pool has memory for: the others wait their turn, requests without
// payload pass by, and a large one is not starved by small ones.
func TestStarvedRequests(t *testing.T) {
	const depth = 64
	room := poolSize(depth, fakeIOMax) / fakeIOMax
	held := make(chan *Request, depth)
	q := runFake(t, CopyUser, depth, handlerFunc(func(r *Request) error {
		if r.Op == OpFlush {
			return nil
		}
		held <- r
		return ErrAsync
	}), nil)
	for i := range depth - 1 {
		n := fakeIOMax
		if i == 0 || i > room { // the later ones would fit beside the first
			n = 4096
		}
		q.kernel.dispatch(desc(OpWrite, 0, int64(i)*fakeIOMax, n))
	}
	if res := q.do(t, desc(OpFlush, 0, 0, 0)); res != 0 {
		t.Errorf("flush: %d", res)
	}
	if len(held) != room {
		t.Errorf("%d requests got a buffer, want %d", len(held), room)
	}
	for i := range depth - 1 {
		r := <-held
		if int(r.Offset) != i*fakeIOMax {
			t.Errorf("request %d was served as number %d", r.Offset/fakeIOMax, i)
		}
		r.Complete(nil)
		<-q.kernel.results
	}
}

// TestPool: lent pieces never overlap, and everything that is given back grows together again.
func TestPool(t *testing.T) {
	for _, c := range []struct{ depth, ioMax int }{{1, 4096}, {64, 256 << 10}, {5, 12 << 10}, {4096, 4096}, {3, 32 << 20}, {2, 512}} {
		size := poolSize(c.depth, c.ioMax)
		if size > c.depth*poolBlock(c.ioMax) || size < poolBlock(c.ioMax) {
			t.Errorf("%+v: %d bytes", c, size)
		}
		a := newArena(size)
		if _, err := a.join(poolBlock(c.ioMax)); err != nil {
			t.Fatal(err)
		}
		p := newPool(a, nil, c.depth, c.ioMax)
		rng := rand.New(rand.NewPCG(1, uint64(c.depth)))
		used := make([]bool, size>>poolShift)
		type piece struct {
			b    []byte
			page int
		}
		var lent []piece
		mark := func(l piece, v bool) {
			slot, at := l.page>>p.top, l.page&(blockPages(p.top)-1)
			if unsafe.Pointer(&l.b[0]) != unsafe.Pointer(&p.chunks[slot][at<<poolShift]) {
				t.Fatalf("%+v: page %d is not where it should be", c, l.page)
			}
			for page := l.page; (page-l.page)<<poolShift < len(l.b); page++ {
				if used[page] == v {
					t.Fatalf("%+v: page %d twice", c, page)
				}
				used[page] = v
			}
		}
		giveBack := func(l piece) {
			mark(l, false)
			p.put(l.page, len(l.b))
		}
		for range 20000 {
			if len(lent) > 0 && rng.IntN(2) == 0 {
				i := rng.IntN(len(lent))
				giveBack(lent[i])
				lent[i] = lent[len(lent)-1]
				lent = lent[:len(lent)-1]
				if p.rest(); len(lent) == 0 && p.have != 0 {
					t.Fatalf("%+v: an unused pool keeps %d chunks", c, p.have)
				}
				continue
			}
			n := 1 + rng.IntN(c.ioMax)
			b, page := p.get(n)
			if b == nil {
				if len(lent) == 0 {
					t.Fatalf("%+v: no room for %d bytes in an unused pool", c, n)
				}
				continue
			}
			if len(b) != n {
				t.Fatalf("%d bytes, want %d", len(b), n)
			}
			mark(piece{b, page}, true)
			lent = append(lent, piece{b, page})
		}
		for _, l := range lent {
			giveBack(l)
		}
		for i := range size / poolBlock(c.ioMax) {
			b, page := p.get(c.ioMax)
			if b == nil {
				t.Fatalf("%+v: the pool has grown together to %d blocks only", c, i)
			}
			defer p.put(page, len(b))
		}
	}
}

// TestBatchLayout holds the sizes and numbers of include/uapi/linux/ublk_cmd.h and io_uring.h.
func TestBatchLayout(t *testing.T) {
	for name, c := range map[string]struct{ got, want uintptr }{
		"ublk_batch_io":       {unsafe.Sizeof(batchIO{}), 16},
		"batchIO.elements":    {unsafe.Offsetof(batchIO{}.elements), 4},
		"batchIO.elemBytes":   {unsafe.Offsetof(batchIO{}.elemBytes), 6},
		"ublk_elem_header+8":  {unsafe.Sizeof(batchElem{}), elemSize},
		"batchElem.result":    {unsafe.Offsetof(batchElem{}.result), 4},
		"io_uring_buf":        {unsafe.Sizeof(pbuf{}), 16},
		"io_uring_buf.bid":    {unsafe.Offsetof(pbuf{}.id), 12},
		"io_uring_buf_ring":   {unsafe.Offsetof(pbuf{}.tail), 14},
		"io_uring_buf_reg":    {unsafe.Sizeof(pbufReg{}), 40},
		"sqe.uring_cmd_flags": {unsafe.Offsetof(sqe{}.opFlags), 28},
		"sqe.buf_group":       {unsafe.Offsetof(sqe{}.bufIndex), 40},
		"PREP_IO_CMDS":        {ioPrepCmds, 0xc0107525},
		"COMMIT_IO_CMDS":      {ioCommitCmds, 0xc0107526},
		"FETCH_IO_CMDS":       {ioFetchCmds, 0xc0107527},
	} {
		if c.got != c.want {
			t.Errorf("%s is %#x, want %#x", name, c.got, c.want)
		}
	}
	if off := (&userTransport{&ringTransport{transportConfig: transportConfig{queue: 4095}}}).offset(4095); off != 0x80000000+4095<<41+4095<<25 {
		t.Errorf("payload offset %#x", off)
	}
}

// TestRingIsRegistered: the ring's own descriptor is looked up once, where the kernel can (5.18).
func TestRingIsRegistered(t *testing.T) {
	needNullCommands(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	p, err := newTransport(transportConfig{depth: 4}, fd)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close(true)
	if k := p.(*ringTransport).ring.kernel.(*ringFD); k.enterFlag != enterRegisteredRing {
		t.Errorf("the ring is entered by descriptor %d", k.enterFD)
	}
	if err := p.submitAndWait(false); err != nil && !errors.Is(err, syscall.EINTR) {
		t.Error(err)
	}
}
