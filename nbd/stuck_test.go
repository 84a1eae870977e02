package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// These are clients that half-close, stop, or die, and devices that never answer. Nothing may wait for itself, and
// every end is bounded.

// A client that shuts down only one direction is served as far as possible, and its connection ends.
func TestHalfClosed(t *testing.T) {
	for name, req := range map[string]string{
		"small read":    reqBytes(0, cmdRead, 1, 0, 512),
		"large read":    reqBytes(0, cmdRead, 1, 0, 1<<19),
		"both":          strings.Repeat(reqBytes(0, cmdRead, 1, 0, 512)+reqBytes(0, cmdRead, 2, 0, 1<<19), 8),
		"flush":         reqBytes(0, cmdFlush, 1, 0, 0),
		"bad request":   reqBytes(0, 200, 1, 0, 0),
		"small write":   reqBytes(0, cmdWrite, 1, 0, 3) + "abc",
		"durable write": reqBytes(cmdFlagFUA, cmdWrite, 1, 0, 3) + "abc",
	} {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, structured %v", name, structured), func(t *testing.T) {
				d := newRAM(1 << 20)
				c, s := dialServer(t, serveRAM(d), Options{})
				c.open("disk", structured)
				if err := c.Conn.(*net.UnixConn).CloseRead(); err != nil {
					t.Fatal(err)
				}
				c.put(req)
				_ = c.ended() // although the client is still there
				if d.closes.Load() != 1 {
					t.Errorf("%d closes of the export", d.closes.Load())
				}
				testwatch.Do(t, testwatch.Long, "Shutdown", func() {
					if err := s.Shutdown(context.Background()); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
	// A client that shuts down the other direction gets its replies.
	c := dial(t, serveRAM(newRAM(1<<20)), Options{})
	c.open("disk", false)
	c.put(reqBytes(0, cmdRead, 1, 0, 1<<19) + reqBytes(0, cmdRead, 2, 0, 512))
	if err := c.Conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	c.get(2*simpleLen + 1<<19 + 512)
	if err := c.hungUp(); err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

// Clients that disconnect during their reads, at any moment, leave nothing.
func TestClientsThatDie(t *testing.T) {
	d := newRAM(1 << 20)
	s := New(serveRAM(d), Options{})
	rounds := 1500
	if testing.Short() {
		rounds = 400
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(worker)))
			for range rounds / 4 {
				c := connect(t, s)
				c.open("disk", rng.IntN(2) == 0)
				c.put(strings.Repeat(reqBytes(0, cmdRead, 1, 0, 512<<rng.IntN(8)), 1+rng.IntN(8)))
				for until := time.Now().Add(time.Duration(rng.IntN(120)) * time.Microsecond); time.Now().Before(until); {
				}
				c.Close()
				_ = c.ended()
			}
		})
	}
	wg.Wait()
	if d.opens.Load() != d.closes.Load() {
		t.Errorf("%d opens, %d closes", d.opens.Load(), d.closes.Load())
	}
	if s.memory.used != 0 {
		t.Errorf("%d bytes are charged for nothing", s.memory.used)
	}
}

// Shutdown returns when its context ends, and lets Serve return, even if a device never answers and the receiver waits
// for memory that the device's requests hold.
func TestShutdownWithStuckDevice(t *testing.T) {
	for name, then := range map[string]string{
		"":                               "",
		"a reply that waits for room":    reqBytes(0, 200, 6, 0, 0),
		"a request that waits for room":  reqBytes(0, cmdRead, 6, 0, 1<<19),
		"requests that wait for workers": strings.Repeat(reqBytes(0, cmdRead, 6, 0, 1<<16), 9),
		"a flush":                        reqBytes(0, cmdFlush, 6, 0, 0),
		"a write without its payload":    reqBytes(0, cmdWrite, 6, 0, 1<<16),
	} {
		t.Run(name, func(t *testing.T) {
			d := newRAM(1 << 20)
			entered, release := make(chan struct{}, 100), make(chan struct{})
			stuck := func() error { entered <- struct{}{}; <-release; return nil }
			d.onRead = func([]byte, int64) error { return stuck() }
			d.onFlush = stuck
			sock := t.TempDir() + "/s"
			l, err := net.Listen("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			s := New(serveRAM(d), Options{MaxInFlight: 1<<19 + 2*requestCharge, Workers: 4})
			served := make(chan error, 1)
			go func() { served <- s.Serve(context.Background(), l) }()
			nc, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			c := &client{tb: t, Conn: nc}
			c.open("disk", false)
			c.request(0, cmdRead, 5, 0, 1<<19)
			<-entered
			c.put(then)
			time.Sleep(20 * time.Millisecond) // so that the receiver waits
			testwatch.Do(t, testwatch.Long, "Shutdown", func() {
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
				defer cancel()
				if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Shutdown: %v", err)
				}
			})
			testwatch.Do(t, testwatch.Long, "Serve", func() {
				if err := <-served; !errors.Is(err, ErrServerClosed) {
					t.Errorf("Serve: %v", err)
				}
			})
			close(release)
			testwatch.Do(t, testwatch.Long, "the connection", func() {
				for d.closes.Load() == 0 {
					time.Sleep(time.Millisecond)
				}
			})
		})
	}
}

// flood sends req again and again until the server takes no more for a while.
func flood(c *client, req string) {
	b := []byte(strings.Repeat(req, 1+(64<<10)/len(req)))
	for {
		_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := c.Write(b); err != nil {
			break
		}
	}
	_ = c.SetWriteDeadline(time.Time{})
}

// theConn returns the only connection of s.
func theConn(s *Server) *conn {
	for end := time.Now().Add(testwatch.Long); time.Now().Before(end); time.Sleep(time.Millisecond) { // the client may know of it first
		s.mu.Lock()
		for _, c := range s.conns {
			if c.conn != nil {
				s.mu.Unlock()
				return c.conn
			}
		}
		s.mu.Unlock()
	}
	return nil
}

// floods are requests whose replies are larger than they.
func floods(size uint32) map[string]string {
	return map[string]string{
		"block status":         reqBytes(0, cmdBlockStatus, 1, 0, size),
		"one status":           reqBytes(cmdFlagReqOne, cmdBlockStatus, 1, 0, size),
		"status of little":     reqBytes(0, cmdBlockStatus, 1, 0, 50_000),
		"holes and data":       reqBytes(0, cmdRead, 1, 0, 600<<10),
		"just above a buffer":  reqBytes(cmdFlagDF, cmdRead, 1, 0, 64<<10+1),
		"small reads":          reqBytes(0, cmdRead, 1, 0, 512),
		"bad requests":         reqBytes(0, 200, 1, 0, 0),
		"bad and large, mixed": reqBytes(0, 200, 1, 0, 0) + reqBytes(cmdFlagDF, cmdRead, 1, 0, 64<<10),
		"cache":                reqBytes(0, cmdCache, 1, 0, 3<<20),
		"flush":                reqBytes(0, cmdFlush, 1, 0, 0),
	}
}

// newFragmented returns a device on which every second block is a hole.
func newFragmented(size int) *ramDevice {
	d := newRAM(size)
	for b := range d.present {
		d.present[b] = b%2 == 0
	}
	return d
}

// A client that takes no replies is charged for all memory that the server holds for it, whatever its requests are.
func TestChargeIsMemory(t *testing.T) {
	const size, limit = 32 << 20, 8 << 20
	for name, req := range floods(size) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, s := dialServer(t, serveRAM(newFragmented(size)), Options{MaxInFlight: limit})
			c.open("disk", true)
			flood(c, req)
			conn := theConn(s)
			held, charged := int64(0), int64(0)
			conn.out.mu.Lock()
			for _, p := range conn.out.queue {
				n := int64(unsafe.Sizeof(*p)) + int64(cap(p.head)) + int64(cap(p.vec))*int64(unsafe.Sizeof(p.vec[0]))
				if p.buf != nil {
					n += int64(cap(p.buf.b))
				}
				if n > p.charge {
					t.Errorf("a reply of %d bytes takes %d bytes and is charged %d", length(p), n, p.charge)
				}
				held, charged = held+n, charged+p.charge
			}
			conn.out.mu.Unlock()
			s.memory.mu.Lock()
			used := s.memory.used
			s.memory.mu.Unlock()
			if held > charged || charged > used || used > limit {
				t.Errorf("%d bytes are held, %d charged, %d used of %d", held, charged, used, limit)
			}
			c.Close()
			_ = c.ended()
			if s.memory.used != 0 {
				t.Errorf("%d bytes stay charged", s.memory.used)
			}
		})
	}
}

func length(p *packet) (n int) {
	for _, b := range p.vec {
		n += len(b)
	}
	return n
}

// All connections together stay within a limit, and clients that take no replies do not block others for ever.
func TestMemoryOfAll(t *testing.T) {
	const size, limit, clients = 1 << 20, 8 << 20, 40
	d := newRAM(size)
	s := New(exportMap{"disk": {Device: struct{ Device }{d}}}, Options{MaxMemory: limit, stall: 400 * time.Millisecond})
	var stopped []*client
	for range clients {
		c := connect(t, s)
		c.open("disk", false)
		_ = c.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		_, _ = c.Write([]byte(strings.Repeat(reqBytes(0, cmdRead, 1, 0, size), 100)))
		stopped = append(stopped, c)
		s.memory.mu.Lock()
		used := s.memory.used
		s.memory.mu.Unlock()
		if used > limit {
			t.Fatalf("%d bytes are used, the limit is %d", used, limit)
		}
	}
	c := connect(t, s)
	c.open("disk", false)
	for i := range 100 { // sooner or later it is served
		c.want(0, 0, cmdRead, 0, uint32(1<<(9+i%12)))
	}
	for _, c := range stopped {
		c.Close()
		_ = c.ended()
	}
	c.alive()
	c.disconnect()
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	if s.memory.used != 0 || len(s.memory.waiting) != 0 {
		t.Errorf("%d bytes stay charged, %d wait", s.memory.used, len(s.memory.waiting))
	}
}

// A client that is slow, but takes its replies, is not cut off.
func TestSlowClientStays(t *testing.T) {
	const size = 1 << 20
	s := New(serveRAM(newFragmented(size)), Options{MaxMemory: 2 << 20, stall: 300 * time.Millisecond})
	slow, other := connect(t, s), connect(t, s)
	slow.open("disk", false)
	other.open("disk", false)
	const reads = 12
	slow.put(strings.Repeat(reqBytes(0, cmdRead, 1, 0, size), reads))
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 20 {
			other.want(0, 0, cmdRead, 0, size)
		}
	})
	for range reads {
		time.Sleep(60 * time.Millisecond)
		if r := slow.reply(size); r.errno != 0 {
			t.Errorf("errno %d", r.errno)
		}
	}
	wg.Wait()
	slow.disconnect()
	other.disconnect()
}

// Shutdown is bounded even if clients take no replies, and ends all connections.
func TestShutdownWithStuckClients(t *testing.T) {
	const size = 32 << 20
	s := New(serveRAM(newFragmented(size)), Options{MaxInFlight: 2 << 20})
	var clients []*client
	for _, req := range floods(size) {
		c := connect(t, s)
		c.open("disk", true)
		_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		_, _ = c.Write([]byte(strings.Repeat(req, 3000)))
		clients = append(clients, c)
	}
	testwatch.Do(t, testwatch.Long, "Shutdown", func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
		defer cancel()
		if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Shutdown: %v", err)
		}
	})
	for _, c := range clients {
		_ = c.ended()
	}
}

// A connection that is cut off ends without waiting for a long request, or for requests that wait for a worker.
func TestCutOffGivesUp(t *testing.T) {
	d := newRAM(512 << 20)
	var reads atomic.Int64
	d.onRead = func([]byte, int64) error { reads.Add(1); time.Sleep(20 * time.Millisecond); return nil }
	c, s := dialServer(t, exportMap{"disk": {Device: struct{ Device }{d}}}, Options{Workers: 4})
	c.open("disk", true)
	c.put(strings.Repeat(reqBytes(0, cmdCache, 1, 0, 512<<20), 100)) // 20 minutes' work
	for reads.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	testwatch.Do(t, testwatch.Long, "Shutdown", func() {
		if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "took no replies") {
			t.Errorf("Shutdown: %v", err)
		}
	})
	_ = c.ended()
	if s.memory.used != 0 {
		t.Errorf("%d bytes stay charged", s.memory.used)
	}
}

// TestGivenUpIsNoSuccess: when a client has ended its sending while long zeros are being written, they are not
// acknowledged unless they are there. After DISC they are finished.
func TestGivenUpIsNoSuccess(t *testing.T) {
	for _, disc := range []bool{false, true} {
		const size = 3 * longStep
		d := newRAM(size)
		for i := range d.data {
			d.data[i] = 0xee
		}
		begun, release := make(chan struct{}), make(chan struct{})
		var once sync.Once
		d.onZero = func(int64, int64, bool) error {
			once.Do(func() { close(begun); <-release })
			return nil
		}
		c, s := dialServer(t, serveRAM(d), Options{})
		c.open("disk", false)
		c.request(cmdFlagNoHole, cmdWriteZeroes, 5, 0, size)
		<-begun
		conn := theConn(s)
		if disc {
			c.request(0, cmdDisc, 0, 0, 0)
		} else if err := c.Conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if !disc {
			for !conn.ended.Load() {
				time.Sleep(time.Millisecond)
			}
		} else {
			time.Sleep(20 * time.Millisecond) // so that the receiver has ended
		}
		close(release)
		r := c.reply(0)
		_ = c.ended()
		zeros := 0
		for _, b := range d.data {
			if b == 0 {
				zeros++
			}
		}
		if (r.errno == 0) != (zeros == size) || disc && r.errno != 0 {
			t.Errorf("after DISC: %v: error %d, and %d of %d bytes are zero", disc, r.errno, zeros, size)
		}
	}
}
