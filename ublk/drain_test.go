package ublk

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// leaving is a queue that gets a new request as soon as a tag is free.
type leaving struct {
	*fakeQueue
	asked  atomic.Int64  // requests that the driver was given; the nth is for the nth place
	served sync.Map      // places that the handler saw
	over   chan struct{} // ends the load
	load   sync.WaitGroup
	low    int64 // the first places, which the handler has seen
}

// startLeaving runs a queue whose handler answers by answer, on any goroutine.
func startLeaving(t testing.TB, mode CopyMode, depth int, answer func(*Request)) *leaving {
	t.Helper()
	l := &leaving{over: make(chan struct{})}
	l.fakeQueue = startFake(t, mode, depth, handlerFunc(func(r *Request) error {
		if _, again := l.served.LoadOrStore(r.Offset, true); again {
			t.Errorf("the request at %d was served twice", r.Offset)
		}
		answer(r)
		return ErrAsync
	}), nil)
	l.holds = true
	go l.loop()
	return l
}

// saturate keeps the driver's tags in use until over, and checks the answers.
func (l *leaving) saturate(t testing.TB) {
	l.load.Go(func() {
		for {
			select {
			case <-l.over:
				return
			case r := <-l.kernel.results:
				if _, ok := l.served.Load(int64(r.d.startSector) << 9); !ok || r.res != 512 {
					t.Errorf("the request at %d was answered with %d, and served: %v", r.d.startSector<<9, r.res, ok)
				}
			}
		}
	})
	next := func() ioDesc { return desc(OpWrite, 0, (l.asked.Add(1)-1)<<9, 512) }
	l.kernel.mu.Lock()
	l.kernel.refill = next
	l.kernel.mu.Unlock()
	for range l.depth {
		l.kernel.dispatch(next())
	}
}

// saw reports whether the handler has seen the first n requests.
func (l *leaving) saw(n int64) bool {
	for ; l.low < n; l.low++ {
		if _, ok := l.served.Load(l.low << 9); !ok {
			return false
		}
	}
	return true
}

// unseen counts the requests that the handler has not seen.
func (l *leaving) unseen() int {
	n := int(l.asked.Load())
	l.served.Range(func(any, any) bool { n--; return true })
	return n
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatal("not in time:", what)
		}
	}
}

func soon(r *Request) {
	time.AfterFunc(time.Duration(rand.IntN(200))*time.Microsecond, func() { r.Complete(nil) })
}

// TestRestUnderLoad: queues whose drivers always have more requests come to rest one after the other, and rest until
// the next command. Then they serve the requests that they held, or leave them to the driver.
func TestRestUnderLoad(t *testing.T) { inEachMode(t, testRestUnderLoad) }

func testRestUnderLoad(t *testing.T, mode CopyMode) {
	var queues []*leaving
	for range 4 {
		l := startLeaving(t, mode, 2+len(queues), soon)
		l.saturate(t)
		queues = append(queues, l)
	}
	tell := func(n leave) {
		for _, l := range queues {
			l.leaveAs(n)
		}
	}
	rest := func() bool {
		for _, l := range queues {
			if !l.resting() {
				return false
			}
		}
		return true
	}
	for range 10 {
		tell(leaveSoon)
		eventually(t, "a rest", rest)
		time.Sleep(time.Millisecond) // more requests come, and nothing is done about them
		for _, l := range queues {
			if n := l.kernel.commands(); n == 0 {
				t.Error("the driver has no command of a queue at rest")
			}
		}
		tell(leaveNot)
		for _, l := range queues {
			n := l.asked.Load()
			eventually(t, "service after the rest", func() bool { return l.saw(n) })
		}
	}
	tell(leaveSoon)
	eventually(t, "a rest", rest)
	tell(leaveNow)
	for _, l := range queues {
		if err := l.wait(); err != nil || !l.left || !l.idle() {
			t.Errorf("left: %v, idle %v, %v", l.left, l.idle(), err)
		}
		close(l.over)
		l.load.Wait()
		if n := l.kernel.commands(); n == 0 {
			t.Error("the driver has no command of a queue that left")
		}
		if n := l.unseen(); n > l.depth {
			t.Errorf("%d requests are left to the driver", n)
		}
	}
}

// TestRestAfterTheLastAnswer: a queue rests after the answer to the last request, even if nothing else comes. Before
// that, a Quiesce that is given up leaves the queue as it was.
func TestRestAfterTheLastAnswer(t *testing.T) { inEachMode(t, testRestAfterTheLastAnswer) }

func testRestAfterTheLastAnswer(t *testing.T, mode CopyMode) {
	open := make(chan *Request, 8)
	l := startLeaving(t, mode, 4, func(r *Request) { open <- r })
	give := func(place int64) { l.kernel.dispatch(desc(OpWrite, 0, place<<9, 512)) }
	give(0)
	stuck := <-open
	l.leaveAs(leaveSoon)
	give(1) // held, or on its way
	give(2)
	time.Sleep(5 * time.Millisecond)
	if l.resting() {
		t.Error("rests while the handler has a request")
	}
	l.leaveAs(leaveNot)
	for range 2 {
		(<-open).Complete(nil)
	}
	for range 2 {
		if r := <-l.kernel.results; r.res != 512 || r.d.startSector == 0 {
			t.Errorf("answered: %+v", r)
		}
	}
	l.leaveAs(leaveSoon)
	time.Sleep(time.Millisecond)
	stuck.Complete(nil)
	eventually(t, "a rest", l.resting)
	if r := <-l.kernel.results; r.res != 512 || r.d.startSector != 0 {
		t.Errorf("answered: %+v", r)
	}
	give(3)
	l.leaveAs(leaveNot) // the rest of an earlier telling is none of the next one
	l.leaveAs(leaveSoon)
	eventually(t, "a rest, or a request", func() bool { return l.resting() || len(open) > 0 })
	if len(open) == 0 { // the loop missed that it was to stay
		l.leaveAs(leaveNot)
	}
	r := <-open
	if l.resting() {
		t.Error("rests while the handler has a request")
	}
	r.Complete(nil)
	l.leaveAs(leaveNot)
	l.stopWell(t)
}

// TestKillEndsARest: a device that fails while it is quiesced ends.
func TestKillEndsARest(t *testing.T) { inEachMode(t, testKillEndsARest) }

func testKillEndsARest(t *testing.T, mode CopyMode) {
	for range 100 {
		l := startLeaving(t, mode, 2, soon)
		l.leaveAs(leaveSoon)
		if rand.IntN(2) == 0 {
			eventually(t, "a rest", l.resting)
		}
		l.kill()
		if err := l.wait(); !errors.Is(err, errKilled) {
			t.Fatalf("the loop ended with %v", err)
		}
	}
}
