package ublk

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// lentOut returns the number of bytes of the arena that queues have.
func (a *arena) lentOut() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.mapped
	for size, c := range a.classes {
		n -= size * len(c.free)
	}
	return n
}

func (a *arena) mappedBytes() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mapped
}

// TestIdleQueuesHaveNoMemory: a queue that sleeps without work has given its buffers back. Memory that is not needed
// for a while is unmapped, except the reserve, which goes with the last device.
func TestIdleQueuesHaveNoMemory(t *testing.T) {
	onHost(t)
	a := newArena(1 << 30)
	held := make(chan *Request, 64)
	q := startFakeOn(t, a, CopyUser, 64, handlerFunc(func(r *Request) error { held <- r; return ErrAsync }), nil)
	go q.loop()
	const n = 8
	for i := range n {
		q.kernel.dispatch(desc(OpWrite, 0, int64(i)*fakeIOMax, fakeIOMax))
	}
	var requests []*Request
	for range n {
		requests = append(requests, <-held)
	}
	if got := a.lentOut(); got != n*fakeIOMax {
		t.Errorf("%d bytes are lent to %d requests of %d", got, n, fakeIOMax)
	}
	for _, r := range requests {
		r.Complete(nil)
		<-q.kernel.results
	}
	eventually(t, "an idle queue has no memory", func() bool { return a.lentOut() == 0 })
	eventually(t, "the arena is as small as it was", func() bool { return a.mappedBytes() == reserveChunks*fakeIOMax })
	q.stopWell(t)
	if got := a.mappedBytes(); got != 0 {
		t.Errorf("%d bytes stay after the last device", got)
	}
}

// TestPoolGivesWay: once another queue has no memory at all, a pool lends nothing more, even if it has room, until it
// has given its chunks back.
func TestPoolGivesWay(t *testing.T) {
	a := newArena(0)
	if _, err := a.join(fakeIOMax); err != nil {
		t.Fatal(err)
	}
	p, q, r := newPool(a, &queue{}, 16, fakeIOMax), newPool(a, &queue{}, 16, fakeIOMax), newPool(a, &queue{}, 16, fakeIOMax)
	_, first := p.get(4096)
	_, second := p.get(4096)
	_, others := q.get(fakeIOMax)
	p.put(first, 4096)
	if b, page := p.get(4096); b == nil {
		t.Fatal("a pool with room does not lend it, and nobody waits")
	} else {
		first = page
	}
	if b, _ := r.get(4096); b != nil {
		t.Fatal("more than the reserve")
	}
	if b, _ := p.get(4096); b != nil {
		t.Error("a pool lends while another has nothing")
	}
	p.put(second, 4096)
	p.put(first, 4096)
	p.rest()
	if !r.queue.granted.Load() {
		t.Fatal("a waiting queue is not served")
	}
	b, page := r.get(4096)
	if b == nil {
		t.Fatal("the chunk that was granted is not there")
	}
	r.put(page, 4096)
	r.rest()
	q.put(others, fakeIOMax)
	q.rest()
	a.leave(fakeIOMax)
	if got := a.mappedBytes(); got != 0 {
		t.Errorf("%d bytes stay", got)
	}
}

// TestArenaIsShared: with buffers for two requests in all, every request of many busy queues is answered, and one of
// another size as well.
func TestArenaIsShared(t *testing.T) {
	a := newArena(0) // the reserve is all there is
	const other = 4096
	if _, err := a.join(other); err != nil {
		t.Fatal(err)
	}
	var queues []*fakeQueue
	for range 5 {
		h := correct(t)
		q := startFakeOn(t, a, CopyUser, 32, handlerFunc(func(r *Request) error {
			err := h(r)
			time.AfterFunc(time.Duration(rand.IntN(3000))*time.Microsecond, func() { r.Complete(err) })
			return ErrAsync
		}), nil)
		go q.loop()
		queues = append(queues, q)
	}
	// Two queues always have requests, so each could keep one of the two chunks for ever.
	rest := []func(){keepBusy(queues[0]), keepBusy(queues[1])}
	var loads sync.WaitGroup
	for _, q := range queues[2:] {
		loads.Go(func() { load(t, q, 50) })
	}
	loads.Wait()
	small := newPool(a, &queue{}, 2, other)
	if b, page := small.get(other); b == nil {
		t.Error("a queue of another size has nothing of its reserve")
	} else {
		small.put(page, len(b))
	}
	small.rest()
	for _, stop := range rest {
		stop()
	}
	for _, q := range queues {
		q.stopWell(t)
	}
	if a.wanted.Load() || len(a.grants) > 0 {
		t.Errorf("%d queues that have ended wait, %d have been granted a chunk", len(a.waiting), len(a.grants))
	}
	a.leave(other)
	if got := a.mappedBytes(); got != 0 {
		t.Errorf("%d bytes stay", got)
	}
}

// keepBusy gives a queue small requests all the time, until the returned function is called.
func keepBusy(q *fakeQueue) (rest func()) {
	var stop, drained atomic.Bool
	var sent, got atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				q.kernel.dispatch(desc(OpWrite, 0, int64(i%250)*fakeIOMax, 4096))
				sent.Add(1)
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for !drained.Load() || got.Load() < sent.Load() {
			select {
			case <-q.kernel.results:
				got.Add(1)
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() {
		stop.Store(true)
		wg.Wait()
		drained.Store(true)
		<-ended
	}
}

// TestWaiterLeaves: if a queue ends while it waits for a chunk, or before it has taken the chunk that it was granted,
// the next queue gets the chunk.
func TestWaiterLeaves(t *testing.T) {
	a := newArena(0)
	if _, err := a.join(fakeIOMax); err != nil {
		t.Fatal(err)
	}
	one, two, three := &queue{}, &queue{}, &queue{}
	has := [][]byte{a.take(fakeIOMax, one, true), a.take(fakeIOMax, one, true)}
	if has[0] == nil || has[1] == nil || a.take(fakeIOMax, one, false) != nil || a.wanted.Load() {
		t.Fatal("the reserve is not what it should be")
	}
	for _, q := range []*queue{one, two, two, three} {
		if a.take(fakeIOMax, q, true) != nil {
			t.Fatal("more than the reserve")
		}
	}
	a.forget(one)
	a.put(has[0])
	if !two.granted.Load() || three.granted.Load() {
		t.Fatal("the one that has waited longest is not the one that is served")
	}
	a.forget(two)
	if !three.granted.Load() || a.wanted.Load() {
		t.Fatal("the next one is not served")
	}
	got := a.take(fakeIOMax, three, true)
	if got == nil {
		t.Fatal("the chunk that was granted is not there")
	}
	a.put(got)
	a.put(has[1])
	a.leave(fakeIOMax)
	if got := a.mappedBytes(); got != 0 {
		t.Errorf("%d bytes stay", got)
	}
}
