package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// Requests that cannot be served get their error, and the connection goes on.
func TestBadRequests(t *testing.T) {
	const size = 64 << 20
	d := newRAM(size)
	big := strings.Repeat("x", 33<<20)
	for _, structured := range []bool{false, true} {
		c := dial(t, serveRAM(d), Options{})
		c.open("disk", structured)
		c.want(errnoInval, 0, cmdRead, size, 1)
		c.want(errnoInval, 0, cmdRead, size-1, 2)
		c.want(errnoInval, 0, cmdRead, 1<<63, 512)
		c.want(errnoInval, 0, cmdRead, ^uint64(0), 512)
		c.want(map[bool]uint32{false: errnoInval, true: errnoOverflow}[structured], uint16(btoi(structured))*cmdFlagDF, cmdRead, 0, 33<<20)
		c.want(errnoInval, 0, cmdRead, 0, ^uint32(0))
		c.want(errnoNoSpace, 0, cmdWrite, size-1, 2, "xx")
		c.want(errnoNoSpace, 0, cmdWrite, size, 1<<20, big[:1<<20])
		c.want(errnoNoSpace, 0, cmdWrite, ^uint64(0)-100, 200, big[:200])
		c.want(errnoInval, 0, cmdWrite, 0, 33<<20, big)
		c.want(errnoInval, 0, cmdTrim, size-1, 2)
		c.want(errnoInval, cmdFlagFUA, cmdTrim, size, 512)
		c.want(errnoNoSpace, 0, cmdWriteZeroes, 0, ^uint32(0))
		c.want(errnoInval, 0, cmdCache, size, 1)
		c.want(errnoInval, 0, 8, 0, 512)
		c.want(errnoInval, 0, 0xffff, 0, 512)
		c.want(errnoInval, 1<<15, cmdRead, 0, 512)
		c.want(errnoInval, cmdFlagDF, cmdWrite, 0, 4, "data")
		c.want(errnoInval, cmdFlagReqOne, cmdRead, 0, 512)
		c.want(errnoInval, cmdFlagNoHole, cmdTrim, 0, 512)
		if !structured {
			c.want(errnoInval, cmdFlagDF, cmdRead, 0, 512)
			c.want(errnoInval, 0, cmdBlockStatus, 0, 512)
		}
		c.want(0, cmdFlagFUA, cmdRead, 0, 512) // ignored there
		if r := c.want(0, cmdFlagFUA, cmdRead, 0, 0); structured && (r.typ != chunkNone || r.data != "") {
			t.Errorf("READ of nothing with FUA: chunk type %d with %d bytes", r.typ, len(r.data))
		}
		c.want(0, cmdFlagFUA, cmdCache, 0, 0)
		c.want(0, cmdFlagFUA, cmdTrim, size, 0)
		c.want(0, cmdFlagFUA, cmdWriteZeroes, 0, 0)
		c.want(0, 0, cmdRead, 0, 0)
		c.want(0, 0, cmdRead, size, 0)
		c.want(0, 0, cmdWrite, 0, 0)
		c.want(0, cmdFlagFUA, cmdWrite, 0, 0)
		c.want(0, 0, cmdRead, 0, 32<<20)
		c.want(0, 0, cmdFlush, ^uint64(0), 1) // reserved, ignored
		c.alive()
		c.disconnect()
	}
	if i := bytes.IndexByte(d.content(), 'x'); i >= 0 {
		t.Errorf("something was written at %d", i)
	}
}

func TestReadOnly(t *testing.T) {
	d := newRAM(1 << 20)
	c := dial(t, exportMap{"disk": {Device: d, ReadOnly: true}}, Options{})
	if _, flags := c.open("disk", false); flags&(flagReadOnly|flagSendTrim|flagSendWriteZeroes) != flagReadOnly {
		t.Errorf("flags %#x", flags)
	}
	c.want(errnoPerm, 0, cmdWrite, 0, 4, "data")
	c.want(errnoPerm, cmdFlagFUA, cmdWrite, 0, 1<<20, pattern(1<<20, 1))
	c.want(errnoPerm, 0, cmdTrim, 0, 512)
	c.want(errnoPerm, 0, cmdWriteZeroes, 0, 512)
	if c.want(0, 0, cmdRead, 0, 4).data != "\x00\x00\x00\x00" {
		t.Error("written")
	}
	c.alive()
}

func TestBadMagic(t *testing.T) {
	d := newRAM(1 << 20)
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	c.put(strings.Repeat("A", requestLen))
	if err := c.hungUp(); !errors.Is(err, ErrProtocol) {
		t.Fatalf("ServeConn: %v", err)
	}
	if d.closes.Load() != 1 {
		t.Fatal("export not closed")
	}
}

// Clients may disconnect at any point. Nothing is left behind, and half a write is not executed.
func TestDisconnects(t *testing.T) {
	for name, sent := range map[string]struct {
		data string
		want error
	}{
		"between requests":    {"", nil},
		"half a header":       {reqBytes(0, cmdRead, 1, 0, 512)[:11], io.ErrUnexpectedEOF},
		"half a payload":      {reqBytes(0, cmdWrite, 1, 0, 4096) + "abc", io.ErrUnexpectedEOF},
		"no payload":          {reqBytes(0, cmdWrite, 1, 0, 4096), io.ErrUnexpectedEOF},
		"half a big payload":  {reqBytes(0, cmdWrite, 1, 0, 1<<20) + pattern(1<<19, 1), io.ErrUnexpectedEOF},
		"no big payload":      {reqBytes(0, cmdWrite, 1, 0, 1<<20), io.ErrUnexpectedEOF},
		"half a bad payload":  {reqBytes(0, cmdWrite, 1, 1<<40, 4096) + "abc", io.ErrUnexpectedEOF},
		"replies not awaited": {strings.Repeat(reqBytes(0, cmdRead, 1, 0, 1<<19), 40), nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := newRAM(1 << 20)
			writes := 0
			d.onWrite = func([]byte, int64) error { writes++; return nil }
			c := dial(t, serveRAM(d), Options{})
			c.open("disk", true)
			c.put(sent.data)
			c.Close()
			if err := c.ended(); sent.want != nil && !errors.Is(err, sent.want) {
				t.Errorf("ServeConn: %v, want %v", err, sent.want)
			}
			if d.closes.Load() != 1 || writes != 0 {
				t.Errorf("%d closes, %d writes", d.closes.Load(), writes)
			}
		})
	}
}

// The export is closed only after its last request, even if the client has gone long before.
func TestCloseWaitsForRequests(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	d.onRead = func([]byte, int64) error { close(entered); <-release; return nil }
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	c.request(0, cmdRead, 1, 0, 1<<19)
	<-entered
	c.Close()
	select {
	case <-c.served:
		t.Fatal("ended with a request under way")
	case <-time.After(50 * time.Millisecond):
	}
	if d.closes.Load() != 0 {
		t.Fatal("closed with a request under way")
	}
	close(release)
	_ = c.ended()
	if d.closes.Load() != 1 {
		t.Fatal("not closed")
	}
}

// A client that sends and never receives is held at MaxInFlight.
func TestInFlightBound(t *testing.T) {
	const size, limit = 1 << 20, 4 << 20
	d := newRAM(size)
	var reads atomic.Int64
	d.onRead = func([]byte, int64) error { reads.Add(1); return nil }
	c := dial(t, exportMap{"disk": {Device: struct{ Device }{d}}}, Options{MaxInFlight: limit, Workers: 64})
	c.open("disk", false)
	_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	for req := []byte(strings.Repeat(reqBytes(0, cmdRead, 1, 0, size), 100)); ; {
		if _, err := c.Write(req); err != nil {
			break
		}
	}
	// One may be in the socket.
	if n := reads.Load(); n > limit/size+1 {
		t.Errorf("%d MiB are read for a client that takes none, the limit is %d MiB", n, limit>>20)
	}
	got := 0
	for buf := make([]byte, 1<<20); got < 3*limit; { // it goes on when the client receives
		n, err := c.Read(buf)
		if err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		got += n
	}
	c.Close()
	_ = c.ended()
}

func TestBudget(t *testing.T) {
	b := newBudget(&memory{max: 1 << 20}, 100)
	if !b.tryAcquire(1000) {
		t.Fatal("one request must always be possible")
	}
	if b.tryAcquire(1) {
		t.Fatal("past the limit")
	}
	done := make(chan struct{})
	go func() { b.acquire(60, time.Hour, nil); close(done) }()
	select {
	case <-done:
		t.Fatal("did not wait")
	case <-time.After(20 * time.Millisecond):
	}
	b.release(1000)
	<-done
	if b.tryAcquire(41) || !b.tryAcquire(40) {
		t.Fatal("the limit is not exact")
	}
}

// Shutdown finishes and answers the requests that were received, and no others.
func TestShutdown(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	d.onRead = func([]byte, int64) error { close(entered); <-release; return nil }
	busy, s := dialServer(t, serveRAM(d), Options{})
	busy.open("disk", false)
	idle, greeted := connect(t, s), connect(t, s)
	idle.open("disk", false)
	greeted.greet(3)
	busy.request(0, cmdRead, 5, 0, 1<<19)
	<-entered

	short, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	shut := make(chan error, 1)
	go func() { shut <- s.Shutdown(context.Background()) }()
	if err := idle.hungUp(); !errors.Is(err, ErrServerClosed) {
		t.Errorf("idle connection: %v", err)
	}
	if err := greeted.hungUp(); !errors.Is(err, ErrServerClosed) {
		t.Errorf("negotiating connection: %v", err)
	}
	<-short.Done()
	select {
	case err := <-shut:
		t.Fatalf("Shutdown returned %v with a request under way", err)
	default:
	}
	close(release)
	if r := busy.reply(1 << 19); r.cookie != 5 || r.errno != 0 {
		t.Errorf("reply %d errno %d", r.cookie, r.errno)
	}
	if err := <-shut; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := connect(t, s).hungUp(); !errors.Is(err, ErrServerClosed) {
		t.Errorf("new connection: %v", err)
	}
}

func TestServe(t *testing.T) {
	for name, end := range map[string]func(s *Server, cancel func()){
		"cancel":   func(_ *Server, cancel func()) { cancel() },
		"shutdown": func(s *Server, _ func()) { _ = s.Shutdown(context.Background()) },
	} {
		t.Run(name, func(t *testing.T) {
			sock := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			s := New(serveRAM(newRAM(1<<20)), Options{})
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- s.Serve(ctx, l) }()
			nc, err := net.Dial("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			c := &client{tb: t, Conn: nc}
			c.open("disk", true)
			c.alive()
			end(s, cancel)
			err = testwatch.Wait(t, testwatch.Long, "Serve", done)
			if !errors.Is(err, context.Canceled) && !errors.Is(err, ErrServerClosed) {
				t.Errorf("Serve: %v", err)
			}
			if _, err := net.Dial("unix", sock); err == nil {
				t.Error("still listening")
			}
		})
	}
}

// Connections that are not sockets are served too.
func TestPipeConn(t *testing.T) {
	a, b := net.Pipe()
	d := newRAM(1 << 20)
	c := &client{tb: t, Conn: a, served: make(chan error, 1)}
	go func() { c.served <- New(serveRAM(d), Options{}).ServeConn(context.Background(), b) }()
	c.open("disk", true)
	c.want(0, 0, cmdWrite, 5, 100, pattern(100, 5))
	if r := c.want(0, 0, cmdRead, 5, 100); r.data[8:] != pattern(100, 5) {
		t.Error("data differ")
	}
	c.disconnect()
}
