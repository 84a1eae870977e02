package owner

import (
	"sync"

	"github.com/vdisk/vdisk/internal/ratelimit"
	"github.com/vdisk/vdisk/ublk"
)

// waitingRoom has the requests of a block device that wait for their turn, since their volume's rate is limited. Its
// goroutines wait for them, not the queue's thread, and not the workers, on which flushes depend.
type waitingRoom struct {
	reads, writes chan heldRequest // each in the order of their turns; there is room for all requests of the device

	mu      sync.Mutex
	hurried chan struct{} // closed while the device is ending
}

type heldRequest struct {
	r    *ublk.Request
	turn *ratelimit.Turn
}

func newWaitingRoom(requests int) *waitingRoom {
	return &waitingRoom{
		reads: make(chan heldRequest, requests), writes: make(chan heldRequest, requests), hurried: make(chan struct{}),
	}
}

// holds keeps a request that may not begin yet, and reports whether it did. Flushes begin at once.
func (t *target) holds(r *ublk.Request) bool {
	write, bytes := r.Op != ublk.OpRead, int64(r.Length)
	switch {
	case r.Op == ublk.OpFlush:
		return false
	case r.Op == ublk.OpDiscard, r.Op == ublk.OpWriteZeroes && !r.NoUnmap:
		bytes = 0 // they write no data
	}
	turn := t.dev.Limiter().Admit(write, bytes)
	if turn == nil {
		return false
	}
	if write {
		t.waiting.writes <- heldRequest{r, turn}
	} else {
		t.waiting.reads <- heldRequest{r, turn}
	}
	return true
}

// holdRoutine hands requests to the workers when their turn has come, or at once while the device is ending.
func (t *target) holdRoutine(held <-chan heldRequest) {
	for h := range held {
		select {
		case <-h.turn.Ready():
		case <-t.waiting.end():
			h.turn.Cancel()
		}
		if h.r.Op == ublk.OpRead {
			state(h.r).whole = true
		}
		t.jobs <- h.r
	}
}

func (w *waitingRoom) end() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hurried
}

// hurry lets the requests begin that wait for their turn: the device is ending, and waits for its requests. The returned
// function is called if it goes on serving.
func (w *waitingRoom) hurry() (stay func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	hurried := w.hurried
	select {
	case <-hurried:
	default:
		close(hurried)
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.hurried == hurried {
			w.hurried = make(chan struct{})
		}
	}
}
