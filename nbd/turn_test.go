package nbd

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// turnDevice lets requests begin when the test says so. Those of 512 bytes begin at once.
type turnDevice struct {
	*ramDevice
	turns chan *testTurn
}

type testTurn struct {
	ready, cancelled chan struct{}
	write            bool
	bytes            int64
}

func (t *testTurn) Ready() <-chan struct{} { return t.ready }
func (t *testTurn) Cancel()                { close(t.cancelled) }

func (d *turnDevice) Admit(write bool, bytes int64) Turn {
	if bytes == 512 {
		return nil
	}
	t := &testTurn{make(chan struct{}), make(chan struct{}), write, bytes}
	d.turns <- t
	return t
}

func dialTurns(t *testing.T, opts Options) (*client, *Server, *turnDevice) {
	d := &turnDevice{newRAM(64 << 20), make(chan *testTurn, 1000)}
	c, s := dialServer(t, exportMap{"disk": {Device: d}}, opts)
	c.open("disk", false)
	return c, s, d
}

func (c *client) answered(cookie uint64, errno uint32) {
	c.tb.Helper()
	if r := c.reply(0); r.cookie != cookie || r.errno != errno {
		c.tb.Fatalf("the reply to %d with error %d, want that to %d with %d", r.cookie, r.errno, cookie, errno)
	}
}

// TestWaitingHoldsUpNothingElse checks that a flush and requests whose turn it is pass those that wait.
func TestWaitingHoldsUpNothingElse(t *testing.T) {
	c, _, d := dialTurns(t, Options{Workers: 1})
	old, fresh := strings.Repeat("o", 4096), strings.Repeat("n", 4096)
	copy(d.data, old)
	for i := range uint64(20) { // more than there are workers
		c.request(0, cmdWrite, i, i*4096, 4096, fresh)
	}
	c.request(0, cmdTrim, 20, 0, 0x10000)
	c.alive()
	c.want(0, 0, cmdWrite, 1<<20, 512, fresh[:512])
	if string(d.data[:4096]) != old {
		t.Error("a write was done before its turn")
	}
	for i := range uint64(20) {
		turn := <-d.turns
		if !turn.write || turn.bytes != 4096 {
			t.Errorf("the turn of %+v", turn)
		}
		close(turn.ready)
		c.answered(i, 0)
	}
	if string(d.data[:4096]) != fresh {
		t.Error("a write was answered, and not done")
	}
	if turn := <-d.turns; !turn.write || turn.bytes != 0 {
		t.Errorf("a discard waits as %+v", turn)
	} else {
		close(turn.ready)
	}
	c.answered(20, 0)
	c.request(0, cmdCache, 21, 0, 1<<20)
	if turn := <-d.turns; turn.write || turn.bytes != 0 {
		t.Errorf("a CACHE waits as %+v", turn)
	} else {
		close(turn.ready)
	}
	c.answered(21, 0)
	c.disconnect()
}

// TestWaitingTakesBoundedMemory sends more than may wait. The receiver then waits with nothing taken, and goes on.
func TestWaitingTakesBoundedMemory(t *testing.T) {
	c, s, d := dialTurns(t, Options{})
	const size, n = 1 << 20, 12
	go func() {
		for i := range uint64(n) {
			c.request(0, cmdWrite, i, i*size, size, strings.Repeat("n", size))
		}
	}()
	const fit = 3
	for i := range uint64(n) {
		turn := <-d.turns
		switch {
		case i < fit:
			defer close(turn.ready)
			continue
		case i == fit: // the receiver waits for this one
			select {
			case <-d.turns:
				t.Fatalf("more than %d requests are received", fit)
			case <-time.After(100 * time.Millisecond): // long enough to see it happen, mostly
			}
			if got := s.held.Load(); got > heldMost {
				t.Errorf("%d bytes are held", got)
			}
		}
		close(turn.ready)
		c.answered(i, 0)
	}
}

// TestClientThatWaitsLeaves ends clients with requests that wait, in each way, and the server. What the client cannot
// have an answer for is cancelled. When the server shuts down, what was received is done and answered.
func TestClientThatWaitsLeaves(t *testing.T) {
	for _, receiver := range []bool{false, true} { // a request that the receiver itself waits for comes last
		start := func() (*client, *Server, *turnDevice, []*testTurn) {
			c, s, d := dialTurns(t, Options{})
			c.request(0, cmdWrite, 1, 0, 4096, strings.Repeat("n", 4096))
			turns := []*testTurn{<-d.turns}
			if receiver {
				c.put(reqBytes(0, cmdWrite, 2, 0, 8<<20), "the end comes behind data")
				turns = append(turns, <-d.turns)
			}
			return c, s, d, turns
		}
		t.Run("close", func(t *testing.T) {
			c, _, d, turns := start()
			c.Close()
			for _, turn := range turns {
				select {
				case <-turn.cancelled:
				case <-time.After(testwatch.Long):
					t.Fatal("the turn of a client that has gone is waited for")
				}
			}
			_ = c.ended()
			if d.data[0] != 0 || d.closes.Load() != 0 {
				t.Error("a request of a client that has gone was done")
			}
		})
		t.Run("shutdown", func(t *testing.T) {
			c, s, d, turns := start()
			shut := make(chan error, 1)
			go func() { shut <- s.Shutdown(context.Background()) }()
			for _, turn := range turns {
				<-turn.cancelled
			}
			c.answered(1, 0)
			if err := testwatch.Wait(t, testwatch.Long, "Shutdown", shut); err != nil {
				t.Fatal(err)
			}
			if d.data[0] != 'n' {
				t.Error("the request was not done")
			}
		})
		t.Run("cut", func(t *testing.T) {
			c, s, d, turns := start()
			s.mu.Lock()
			var conns []*conn
			for _, served := range s.conns {
				conns = append(conns, served.conn)
			}
			s.mu.Unlock()
			for _, conn := range conns {
				conn.cut()
			}
			for _, turn := range turns {
				<-turn.cancelled
			}
			if err := c.ended(); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the connection ended with %v", err)
			}
			if d.data[0] != 0 {
				t.Error("a request was done after the end")
			}
			if s.held.Load() != 0 || s.memory.used != 0 {
				t.Errorf("%d bytes are held, %d taken", s.held.Load(), s.memory.used)
			}
		})
	}
}
