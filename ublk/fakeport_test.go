package ublk

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakePort is a driver behind the port: it dispatches the requests that a test gives it, checks that the loop keeps to
// the protocol, and performs reads from byte slices.
type fakePort struct {
	t     testing.TB
	files map[int][]byte // content by fd
	// readRes, when set, changes what a read returns: it gets the number of the read and the bytes it would give.
	readRes func(nth, n int) int

	mu       sync.Mutex // guards what follows
	cond     *sync.Cond
	owner    []tagOwner
	descs    []ioDesc
	results  chan fakeResult // commits, in their order
	ready    []completion
	reads    int
	held     []completion // reads that hold keeps back
	hold     bool
	armed    bool
	pending  bool // an interrupt
	waits    int  // turns that had to sleep
	stopping bool
}

type tagOwner uint8

const (
	tagUnknown tagOwner = iota
	tagIdle             // fetched, waits for a request
	tagServer           // dispatched
	tagEnded
)

type fakeResult struct {
	tag int
	res int32
}

func newFakePort(t testing.TB, depth int) *fakePort {
	p := &fakePort{t: t, files: map[int][]byte{}, owner: make([]tagOwner, depth), descs: make([]ioDesc, depth),
		results: make(chan fakeResult, 4*depth)}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *fakePort) fetch(tag int) { p.offer(tag, tagUnknown) }

func (p *fakePort) commit(tag int, res int32) {
	p.offer(tag, tagServer)
	p.results <- fakeResult{tag, res}
}

// offer gives a tag back to the driver.
func (p *fakePort) offer(tag int, from tagOwner) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.owner[tag] != from {
		p.t.Errorf("tag %d handed over in state %d, want %d", tag, p.owner[tag], from)
	}
	p.owner[tag] = tagIdle
	if p.stopping {
		p.end(tag)
	}
	p.cond.Broadcast()
}

func (p *fakePort) end(tag int) {
	p.owner[tag] = tagEnded
	p.ready = append(p.ready, completion{completeIO, tag, -int32(unix.ENODEV)})
}

func (p *fakePort) read(slot, fd int, b []byte, off int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	if content, ok := p.files[fd]; !ok {
		n = -int(unix.EBADF)
	} else if off < int64(len(content)) {
		n = len(content[off:])
	}
	n = min(n, len(b))
	if p.readRes != nil {
		n = p.readRes(p.reads, n)
	}
	p.reads++
	if n > 0 {
		copy(b[:n], p.files[fd][off:])
	}
	c := completion{completeRead, slot, int32(n)}
	if p.hold {
		p.held = append(p.held, c)
		return
	}
	p.ready = append(p.ready, c)
}

func (p *fakePort) arm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.armed {
		p.t.Error("armed twice")
	}
	p.armed = true
}

func (p *fakePort) interrupt() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending = true
	p.cond.Broadcast()
}

func (p *fakePort) turn(wait bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for wait && len(p.ready) == 0 && !(p.pending && p.armed) {
		p.waits++
		p.cond.Wait()
	}
	if p.pending && p.armed {
		p.pending, p.armed = false, false
		p.ready = append(p.ready, completion{kind: completeWake})
	}
	return nil
}

func (p *fakePort) next() (completion, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) == 0 {
		return completion{}, false
	}
	c := p.ready[0]
	p.ready = p.ready[:copy(p.ready, p.ready[1:])]
	return c, true
}

func (p *fakePort) desc(tag int) ioDesc { return p.descs[tag] }

func (p *fakePort) close(bool) {}

// dispatch gives the loop a request on any idle tag, waiting for one.
func (p *fakePort) dispatch(d ioDesc) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for tag, o := range p.owner {
			if o == tagIdle {
				p.owner[tag], p.descs[tag] = tagServer, d
				p.ready = append(p.ready, completion{completeIO, tag, 0})
				p.cond.Broadcast()
				return tag
			}
		}
		p.cond.Wait()
	}
}

// release lets held reads complete.
func (p *fakePort) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = false
	p.ready = append(p.ready, p.held...)
	p.held = nil
	p.cond.Broadcast()
}

func (p *fakePort) heldReads() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.held)
}

// stop aborts idle tags, and the others when they are committed.
func (p *fakePort) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopping = true
	for tag, o := range p.owner {
		if o == tagIdle {
			p.end(tag)
		}
	}
	p.cond.Broadcast()
}

const fakeIOMax = 64 << 10

// fakeQueue runs a queue on a fake port; the test's end stops it and checks that it ended well.
type fakeQueue struct {
	*queue
	port *fakePort
	end  chan error
}

func startFake(t testing.TB, depth int, h Handler, report func(error)) *fakeQueue {
	t.Helper()
	f := &fakeQueue{port: newFakePort(t, depth), end: make(chan error, 1)}
	f.queue = newQueue(3, depth, fakeIOMax, make([]byte, depth*fakeIOMax), h, report)
	if err := f.start(f.port); err != nil {
		t.Fatal(err)
	}
	return f
}

func runFake(t testing.TB, depth int, h Handler, report func(error)) *fakeQueue {
	t.Helper()
	f := startFake(t, depth, h, report)
	go func() { f.end <- f.run() }()
	t.Cleanup(func() {
		f.port.stop()
		if err := f.wait(); err != nil {
			t.Errorf("the loop ended with %v", err)
		}
		if f.owned != 0 || f.reading != 0 {
			t.Errorf("%d requests and %d reads open at the end", f.owned, f.reading)
		}
	})
	return f
}

func (f *fakeQueue) wait() error {
	select {
	case err := <-f.end:
		return err
	case <-time.After(10 * time.Second):
		return fmt.Errorf("the loop does not end")
	}
}

// do dispatches one request and returns its result.
func (f *fakeQueue) do(t testing.TB, d ioDesc) int32 {
	t.Helper()
	tag := f.port.dispatch(d)
	select {
	case r := <-f.port.results:
		if r.tag != tag {
			t.Fatalf("tag %d was answered, want %d", r.tag, tag)
		}
		return r.res
	case <-time.After(10 * time.Second):
		t.Fatal("no answer")
		return 0
	}
}
