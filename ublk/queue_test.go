package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

type handlerFunc func(r *Request) error

func (f handlerFunc) ServeUBLK(r *Request) error { return f(r) }

// fetchHandler plans in serve and finishes in fetched.
type fetchHandler struct {
	serve   func(r *Request) error
	fetched func(r *Request, err error) error
}

func (h fetchHandler) ServeUBLK(r *Request) error              { return h.serve(r) }
func (h fetchHandler) FetchedUBLK(r *Request, err error) error { return h.fetched(r, err) }

func desc(op Op, flags uint32, off int64, n int) ioDesc {
	return ioDesc{opFlags: uint32(op) | flags, startSector: uint64(off >> 9), sectors: uint32(n >> 9)}
}

func TestRequestFields(t *testing.T) { inEachMode(t, testRequestFields) }

func testRequestFields(t *testing.T, mode CopyMode) {
	var got *Request
	q := runFake(t, mode, 4, handlerFunc(func(r *Request) error {
		got = &Request{Op: r.Op, FUA: r.FUA, NoUnmap: r.NoUnmap, Offset: r.Offset, Length: r.Length, Buf: r.Buf, Queue: r.Queue, Tag: r.Tag}
		return nil
	}), nil)
	for _, c := range []struct {
		d    ioDesc
		want *Request
		buf  int
		res  int32
	}{
		{desc(OpRead, 0, 4096, 8192), &Request{Op: OpRead, Offset: 4096, Length: 8192}, 8192, 8192},
		{desc(OpWrite, flagFUA, 512, 512), &Request{Op: OpWrite, FUA: true, Offset: 512, Length: 512}, 512, 512},
		{desc(OpFlush, 0, 0, 0), &Request{Op: OpFlush}, 0, 0},
		{desc(OpDiscard, 0, 1<<40, 1<<31), &Request{Op: OpDiscard, Offset: 1 << 40, Length: 1 << 31}, 0, 0},
		{desc(OpWriteZeroes, flagNoUnmap, 0, 4096), &Request{Op: OpWriteZeroes, NoUnmap: true, Length: 4096}, 0, 0},
	} {
		if res := q.do(t, c.d); res != c.res {
			t.Errorf("%v: result %d, want %d", c.want.Op, res, c.res)
		}
		if got.Op != c.want.Op || got.FUA != c.want.FUA || got.NoUnmap != c.want.NoUnmap ||
			got.Offset != c.want.Offset || got.Length != c.want.Length || len(got.Buf) != c.buf || got.Queue != 3 {
			t.Errorf("handler saw %+v, want %+v", got, c.want)
		}
		if c.buf == 0 && got.Buf != nil {
			t.Errorf("%v has a buffer", c.want.Op)
		}
	}
}

func TestBuffersAreTheTags(t *testing.T) {
	mem := make([]byte, 4*fakeIOMax)
	q := newQueue(CopyPlain, 0, 4, fakeIOMax, mem, nil, handlerFunc(nil), nil)
	for tag := range q.requests {
		full := q.requests[tag].full
		if len(full) != fakeIOMax || cap(full) != fakeIOMax || &full[0] != &mem[tag*fakeIOMax] {
			t.Errorf("tag %d has the wrong buffer", tag)
		}
	}
}

func TestErrorsBecomeErrnos(t *testing.T) { inEachMode(t, testErrorsBecomeErrnos) }

func testErrorsBecomeErrnos(t *testing.T, mode CopyMode) {
	var answer error
	q := runFake(t, mode, 2, handlerFunc(func(*Request) error { return answer }), nil)
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{syscall.ENOSPC, syscall.ENOSPC},
		{fmt.Errorf("store: %w", syscall.EROFS), syscall.EROFS},
		{errors.New("anything"), syscall.EIO},
		{io.ErrUnexpectedEOF, syscall.EIO},
		{syscall.EAGAIN, syscall.EIO}, // the block layer would retry
		{syscall.Errno(1 << 20), syscall.EIO},
		{syscall.Errno(0), syscall.EIO},
	} {
		answer = c.err
		if res := q.do(t, desc(OpWrite, 0, 0, 4096)); res != -int32(c.want) {
			t.Errorf("%v: result %d, want %d", c.err, res, -int32(c.want))
		}
	}
}

func TestBadDescriptors(t *testing.T) { inEachMode(t, testBadDescriptors) }

func testBadDescriptors(t *testing.T, mode CopyMode) {
	q := runFake(t, mode, 2, handlerFunc(func(r *Request) error { t.Errorf("handler saw %v", r.Op); return nil }), nil)
	if res := q.do(t, desc(OpRead, 0, 0, fakeIOMax+512)); res != -int32(syscall.EIO) {
		t.Errorf("too long a read: %d", res)
	}
	if res := q.do(t, desc(13, 0, 0, 512)); res != -int32(syscall.EOPNOTSUPP) { // ZONE_APPEND
		t.Errorf("unknown operation: %d", res)
	}
}

func TestPanicBecomesEIO(t *testing.T) { inEachMode(t, testPanicBecomesEIO) }

func testPanicBecomesEIO(t *testing.T, mode CopyMode) {
	var reports []error
	q := runFake(t, mode, 2, handlerFunc(func(r *Request) error {
		if r.Op == OpWrite {
			var none []int
			_ = none[r.Tag]
		}
		return nil
	}), func(err error) { reports = append(reports, err) })
	for range 3 {
		if res := q.do(t, desc(OpWrite, 0, 8192, 512)); res != -int32(syscall.EIO) {
			t.Errorf("panic: result %d", res)
		}
		if res := q.do(t, desc(OpFlush, 0, 0, 0)); res != 0 {
			t.Errorf("after a panic: result %d", res)
		}
	}
	var p *PanicError
	if len(reports) != 3 || !errors.As(reports[0], &p) || p.Offset != 8192 || !strings.Contains(string(p.Stack), "testPanicBecomesEIO") {
		t.Errorf("reports %v", reports)
	}
}

func TestLater(t *testing.T) { inEachMode(t, testLater) }

func testLater(t *testing.T, mode CopyMode) {
	for name, complete := range map[string]func(*Request){
		"before the return": func(r *Request) { r.Complete(nil) },
		"in a goroutine":    func(r *Request) { go r.Complete(nil) },
		"after a while":     func(r *Request) { time.AfterFunc(5*time.Millisecond, func() { r.Complete(nil) }) },
	} {
		t.Run(name, func(t *testing.T) {
			q := runFake(t, mode, 2, handlerFunc(func(r *Request) error { complete(r); return ErrAsync }), nil)
			for range 20 {
				if res := q.do(t, desc(OpWrite, 0, 0, 4096)); res != 4096 {
					t.Errorf("result %d", res)
				}
			}
		})
	}
}

func TestFirstAnswerCounts(t *testing.T) { inEachMode(t, testFirstAnswerCounts) }

func testFirstAnswerCounts(t *testing.T, mode CopyMode) {
	q := runFake(t, mode, 2, handlerFunc(func(r *Request) error {
		r.Complete(syscall.ENOSPC)
		r.Complete(nil)
		return nil
	}), nil)
	for range 10 { // the fake transport fails the test if a tag is committed twice
		if res := q.do(t, desc(OpFlush, 0, 0, 0)); res != -int32(syscall.ENOSPC) {
			t.Errorf("result %d", res)
		}
	}
}

// TestNoAnswerIsLost lets many goroutines answer at random moments while the loop falls asleep and wakes.
func TestNoAnswerIsLost(t *testing.T) { inEachMode(t, testNoAnswerIsLost) }

func testNoAnswerIsLost(t *testing.T, mode CopyMode) {
	const depth, total = 32, 20000
	work := make(chan *Request, depth)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for r := range work {
				if rand.IntN(50) == 0 {
					time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
				}
				r.Complete(nil)
			}
		})
	}
	q := runFake(t, mode, depth, handlerFunc(func(r *Request) error { work <- r; return ErrAsync }), nil)
	go func() {
		for range total {
			q.kernel.dispatch(desc(OpWrite, 0, 0, 512))
		}
	}()
	for i := range total {
		select {
		case r := <-q.kernel.results:
			if r.res != 512 {
				t.Fatalf("result %d", r.res)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("answer %d of %d was lost", i, total)
		}
	}
	close(work)
	workers.Wait()
}

func TestFetch(t *testing.T) { inEachMode(t, testFetch) }

func testFetch(t *testing.T, mode CopyMode) {
	file := make([]byte, 1<<20)
	for i := range file {
		file[i] = byte(i * 7 >> 3)
	}
	var fetched int
	var fetchErr error
	var seen []byte
	plan := func(r *Request) error {
		half := r.Length / 2
		r.Fetch(5, r.Buf[:half], r.Offset)
		r.Fetch(5, r.Buf[half:], r.Offset+int64(half))
		return ErrFetch
	}
	finish := func(r *Request, err error) error {
		fetched++
		fetchErr, seen = err, bytes.Clone(r.Buf)
		return err
	}
	for _, h := range []Handler{fetchHandler{plan, finish}, handlerFunc(plan)} {
		_, isFetcher := h.(Fetcher)
		for _, c := range []struct {
			name    string
			readRes func(nth, n int) int
			off     int64
			wantErr error
		}{
			{"whole", nil, 8192, nil},
			{"short reads", func(nth, n int) int { return min(n, 512+nth) }, 4096, nil},
			{"interrupted", func(nth, n int) int {
				if nth%3 == 0 {
					return -int(syscall.EINTR)
				}
				return n
			}, 4096, nil},
			{"end of file", nil, 1<<20 - 4096, io.ErrUnexpectedEOF},
			{"error", func(nth, n int) int {
				if nth == 1 {
					return -int(syscall.EUCLEAN)
				}
				return n
			}, 0, syscall.EUCLEAN},
		} {
			t.Run(fmt.Sprintf("%s fetcher=%v", c.name, isFetcher), func(t *testing.T) {
				fetched, fetchErr, seen = 0, nil, nil
				q := startFake(t, mode, 2, h, nil)
				q.kernel.files[5], q.kernel.readRes = file, c.readRes
				go q.loop()
				res := q.do(t, desc(OpRead, 0, c.off, 16384))
				q.kernel.stop()
				if err := q.wait(); err != nil {
					t.Fatal(err)
				}
				want := int32(16384)
				if c.wantErr != nil {
					want = -int32(errnoOf(c.wantErr))
				}
				if res != want {
					t.Errorf("result %d, want %d", res, want)
				}
				if !isFetcher {
					return
				}
				if fetched != 1 || !errors.Is(fetchErr, c.wantErr) {
					t.Errorf("FetchedUBLK ran %d times with %v, want once with %v", fetched, fetchErr, c.wantErr)
				}
				if c.wantErr == nil && !bytes.Equal(seen, file[c.off:c.off+16384]) {
					t.Error("wrong bytes")
				}
			})
		}
	}
}

func TestFetchInStages(t *testing.T) { inEachMode(t, testFetchInStages) }

func testFetchInStages(t *testing.T, mode CopyMode) {
	h := fetchHandler{
		serve: func(r *Request) error {
			r.Data = 0
			r.Fetch(1, r.Buf[:512], 0)
			return ErrFetch
		},
		fetched: func(r *Request, err error) error {
			stage := r.Data.(int) + 1
			r.Data = stage
			if stage == 5 {
				return err
			}
			r.Fetch(1, r.Buf[:512], int64(stage)*512)
			return ErrFetch
		},
	}
	q := startFake(t, mode, 1, h, nil)
	q.kernel.files[1] = make([]byte, 8192)
	go q.loop()
	if res := q.do(t, desc(OpRead, 0, 0, 512)); res != 512 {
		t.Errorf("result %d", res)
	}
	if q.kernel.reads != 5 {
		t.Errorf("%d reads, want 5", q.kernel.reads)
	}
	q.kernel.stop()
	if err := q.wait(); err != nil {
		t.Fatal(err)
	}
}

// TestAnswerWaitsForReads: whatever the handler answers, the tag stays with the queue while the kernel writes to its
// memory.
func TestAnswerWaitsForReads(t *testing.T) { inEachMode(t, testAnswerWaitsForReads) }

func testAnswerWaitsForReads(t *testing.T, mode CopyMode) {
	for name, h := range map[string]handlerFunc{
		"error":    func(r *Request) error { r.Fetch(1, r.Buf, 0); return syscall.ENOMEM },
		"panic":    func(r *Request) error { r.Fetch(1, r.Buf, 0); panic("x") },
		"complete": func(r *Request) error { r.Fetch(1, r.Buf, 0); go r.Complete(syscall.ENOMEM); return ErrAsync },
	} {
		t.Run(name, func(t *testing.T) {
			q := startFake(t, mode, 1, h, nil)
			q.kernel.files[1], q.kernel.hold = make([]byte, 8192), true
			go q.loop()
			q.kernel.dispatch(desc(OpRead, 0, 0, 4096))
			for q.kernel.heldReads() == 0 {
				time.Sleep(time.Millisecond)
			}
			select {
			case r := <-q.kernel.results:
				t.Errorf("answered with %d while a read was under way", r.res)
			case <-time.After(20 * time.Millisecond):
			}
			q.kernel.release()
			if r := <-q.kernel.results; r.res != -int32(syscall.ENOMEM) && r.res != -int32(syscall.EIO) {
				t.Errorf("result %d", r.res)
			}
			q.kernel.stop()
			if err := q.wait(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestFetchMisuse(t *testing.T) { inEachMode(t, testFetchMisuse) }

func testFetchMisuse(t *testing.T, mode CopyMode) {
	again := 0
	q := runFake(t, mode, 1, fetchHandler{
		serve:   func(r *Request) error { r.Fetch(1, nil, 0); return ErrFetch }, // nothing to read
		fetched: func(r *Request, err error) error { again++; return ErrFetch }, // and nothing again
	}, nil)
	if res := q.do(t, desc(OpRead, 0, 0, 512)); res != -int32(syscall.EIO) || again != 1 {
		t.Errorf("result %d after %d calls", res, again)
	}
}

func TestRefusedCommandEndsTheLoop(t *testing.T) { inEachMode(t, testRefusedCommandEndsTheLoop) }

func testRefusedCommandEndsTheLoop(t *testing.T, mode CopyMode) {
	q := startFake(t, mode, 2, handlerFunc(func(*Request) error { return nil }), nil)
	go q.loop()
	q.kernel.complete(completeIO, 1, -int32(syscall.EINVAL))
	if err := q.wait(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("the loop ended with %v", err)
	}
}

func TestKillEndsASleepingLoop(t *testing.T) { inEachMode(t, testKillEndsASleepingLoop) }

func testKillEndsASleepingLoop(t *testing.T, mode CopyMode) {
	for range 200 {
		q := startFake(t, mode, 2, handlerFunc(func(*Request) error { return nil }), nil)
		go q.loop()
		q.kill()
		if err := q.wait(); !errors.Is(err, errKilled) {
			t.Fatalf("the loop ended with %v", err)
		}
	}
}

// TestStopWithRequestsOpen: the loop serves until the last answer, then ends.
func TestStopWithRequestsOpen(t *testing.T) { inEachMode(t, testStopWithRequestsOpen) }

func testStopWithRequestsOpen(t *testing.T, mode CopyMode) {
	open := make(chan *Request, 8)
	q := startFake(t, mode, 8, handlerFunc(func(r *Request) error { open <- r; return ErrAsync }), nil)
	go q.loop()
	for range 8 {
		q.kernel.dispatch(desc(OpWrite, 0, 0, 512))
	}
	var rs []*Request
	for range 8 {
		rs = append(rs, <-open)
	}
	q.kernel.stop()
	select {
	case err := <-q.end:
		t.Fatalf("ended with requests open: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	for _, r := range rs {
		r.Complete(nil)
	}
	if err := q.wait(); err != nil {
		t.Fatal(err)
	}
	if n := len(q.kernel.results); n != 8 {
		t.Errorf("%d answers, want 8", n)
	}
}

// TestNoAllocations: a request allocates nothing, however it is answered.
func TestNoAllocations(t *testing.T) { inEachMode(t, testNoAllocations) }

func testNoAllocations(t *testing.T, mode CopyMode) {
	inline := handlerFunc(func(r *Request) error { return nil })
	later := handlerFunc(func(r *Request) error { r.Complete(nil); return ErrAsync })
	fetch := fetchHandler{
		func(r *Request) error {
			r.Fetch(1, r.Buf[:512], 0)
			r.Fetch(1, r.Buf[512:], 512)
			return ErrFetch
		},
		func(r *Request, err error) error { return err },
	}
	for name, h := range map[string]Handler{"inline": inline, "later": later, "fetch": fetch} {
		t.Run(name, func(t *testing.T) {
			q := startFake(t, mode, 16, h, nil)
			q.kernel.files[1] = make([]byte, 1<<20)
			round := func() {
				for range 16 {
					q.kernel.dispatch(desc(OpRead, 0, 0, 4096))
				}
				for len(q.kernel.results) < 16 {
					q.kernel.interrupt() // so that a turn that only commits does not wait
					if err := q.turn(); err != nil {
						t.Fatal(err)
					}
				}
				for range 16 {
					<-q.kernel.results
				}
			}
			round() // grows the read slots
			if n := testing.AllocsPerRun(100, round); n > 0 {
				t.Errorf("%v allocations in 16 requests", n)
			}
		})
	}
}

// TestNoAnswerIsLostAtTheEdge has a single request under way, answered by a spinning goroutine about when the loop goes
// to sleep: no other event would make up for a missed wake-up.
func TestNoAnswerIsLostAtTheEdge(t *testing.T) { inEachMode(t, testNoAnswerIsLostAtTheEdge) }

func testNoAnswerIsLostAtTheEdge(t *testing.T, mode CopyMode) {
	if runtime.GOMAXPROCS(0) < 2 {
		t.Skip("needs two processors to race")
	}
	const total = 20000
	var mailbox atomic.Pointer[Request]
	var stop atomic.Bool
	var answering sync.WaitGroup
	answering.Go(func() {
		for spin := 0; !stop.Load(); {
			r := mailbox.Swap(nil)
			if r == nil {
				continue
			}
			for range spin % 400 {
				stop.Load()
			}
			spin += 7
			r.Complete(nil)
		}
	})
	defer answering.Wait()
	defer stop.Store(true)
	q := runFake(t, mode, 1, handlerFunc(func(r *Request) error { mailbox.Store(r); return ErrAsync }), nil)
	begin := time.Now()
	for i := 0; i < total && time.Since(begin) < 3*time.Second; i++ { // a busy machine may take minutes for all
		if res := q.do(t, desc(OpFlush, 0, 0, 0)); res != 0 {
			t.Fatalf("result %d", res)
		}
	}
}
