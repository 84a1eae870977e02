package nbd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// handOver hands the connections of a server to a new one of the same exports, as if by way of another process.
func handOver(t *testing.T, s *Server) (*Server, []State) {
	t.Helper()
	list, err := s.Pause(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	next := New(s.exports, s.opts)
	var states []State
	for _, p := range list {
		f, err := p.Conn.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		nc, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(p.State)
		var state State
		if err = errors.Join(err, json.Unmarshal(text, &state), f.Close()); err != nil {
			t.Fatal(err)
		}
		serve, err := next.Adopt(context.Background(), nc, state)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- serve() }()
		t.Cleanup(func() {
			if err := testwatch.Wait(t, testwatch.Long, "an adopted connection", served); err != nil && !errors.Is(err, ErrServerClosed) {
				t.Error(err)
			}
		})
		states = append(states, state)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	return next, states
}

// modeClient is a client with one of the forms of requests and replies.
type modeClient struct {
	*client
	mode string
}

func openIn(c *client, mode string) modeClient {
	switch mode {
	case "extended":
		extend(c, contextAllocation)
	default:
		c.open("disk", mode == "structured")
	}
	return modeClient{c, mode}
}

func (c modeClient) bytes(typ uint16, cookie, off uint64, length uint32) string {
	if c.mode == "extended" {
		return u32(magicExtRequest) + u16(0) + u16(typ) + u64(cookie) + u64(off) + u64(uint64(length))
	}
	return reqBytes(0, typ, cookie, off, length)
}

// answered reads a reply of one chunk.
func (c modeClient) answered(cookie, off uint64, errno uint32, n int) string {
	c.tb.Helper()
	var r chunk
	if c.mode == "extended" {
		r = extClient{c.client}.chunks(cookie, off)[0]
	} else if r = c.reply(n); r.cookie != cookie {
		c.tb.Fatalf("a reply to %d, want %d", r.cookie, cookie)
	}
	if r.errno != errno {
		c.tb.Fatalf("request %d: errno %d, want %d", cookie, r.errno, errno)
	}
	return r.data
}

// leave disconnects a client whose connection was handed over.
func (c modeClient) leave() {
	c.tb.Helper()
	c.put(c.bytes(cmdDisc, 0, 0, 0))
	if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		c.tb.Errorf("after DISC: %d bytes, %v", n, err)
	}
	if err := c.ended(); !errors.Is(err, ErrServerClosed) {
		c.tb.Errorf("the first server: %v", err)
	}
}

// A request that has come in part when its connection is handed over is done once, by the next server; whatever part it
// is, in all forms of requests and replies.
func TestHandOverWithin(t *testing.T) {
	const large = 100 << 10
	for _, mode := range []string{"simple", "structured", "extended"} {
		d := newRAM(1 << 20)
		client, s := dialServer(t, serveRAM(d), Options{})
		c := openIn(client, mode)
		header := len(c.bytes(cmdFlush, 0, 0, 0))
		for i, x := range []struct {
			length, cut int
			off         uint64
			errno       uint32
		}{
			{4096, 0, 0, 0},          // nothing
			{4096, 5, 8192, 0},       // a part of the header
			{4096, header, 0, 0},     // all of the header
			{4096, header + 7, 5, 0}, // a part of a payload that is written from the input
			{large, header + large/2, 64 << 10, 0},
			{large, header + large - 1, 1, 0},
			{4096, header + 100, 1 << 20, errnoNoSpace}, // behind the end: its payload is skipped
			{large, header + 70<<10, 1 << 20, errnoNoSpace},
		} {
			data, cookie := pattern(x.length, byte(i)), uint64(100+i)
			text := c.bytes(cmdWrite, cookie, x.off, uint32(x.length)) + data
			first := ""
			if i%2 == 1 { // behind another one, so that the header is not at the beginning of a buffer
				first = c.bytes(cmdRead, 99, 0, 512)
			}
			c.put(first + text[:x.cut])
			if first != "" {
				c.answered(99, 0, 0, 512)
			}
			var states []State
			if s, states = handOver(t, s); len(states) != 1 {
				t.Fatalf("%s, %d: %d connections were handed over", mode, i, len(states))
			}
			c.put(text[x.cut:])
			c.answered(cookie, x.off, x.errno, 0)
			if got := d.content(); x.errno == 0 && string(got[x.off:x.off+uint64(x.length)]) != data {
				t.Fatalf("%s, %d: the data is wrong", mode, i)
			}
		}
		if got := s.Clients(); len(got) != 1 || got[0].Counters != (Counters{Requests: 12, ReadBytes: 2048, WrittenBytes: 5*4096 + 3*large, Errors: 2}) {
			t.Errorf("%s: %+v", mode, got)
		}
		c.leave()
	}
}

// Requests under way are done and answered before the hand-over, and those behind them after it. A client that takes no
// replies gets the rest of them from the next server.
func TestHandOverUnderLoad(t *testing.T) {
	d := newRAM(2 << 20)
	client, s := dialServer(t, serveRAM(d), Options{take: 20 * time.Millisecond})
	c := openIn(client, "simple")
	const n, size = 32, 64 << 10
	var asked string
	for i := range n { // much more than the socket takes
		c.want(0, 0, cmdWrite, uint64(i*size), size, pattern(size, byte(i)))
		asked += c.bytes(cmdRead, uint64(i), uint64(i*size), size)
	}
	c.put(asked)
	for s.Clients()[0].Counters.Requests < 2*n {
		time.Sleep(time.Millisecond)
	}
	s, states := handOver(t, s)
	if len(states) != 1 || len(states[0].Unsent) == 0 {
		t.Fatalf("%d connections; the client had room for all replies", len(states))
	}
	_, again := handOver(t, s) // at once, with the replies on their way
	if len(again[0].Unsent) == 0 {
		t.Error("the client had room for all replies the second time")
	}
	seen := map[uint64]bool{}
	for range n {
		r := c.reply(size)
		if r.errno != 0 || seen[r.cookie] || r.data != pattern(size, byte(r.cookie)) {
			t.Fatalf("reply %d: errno %d, seen before: %v, or wrong data", r.cookie, r.errno, seen[r.cookie])
		}
		seen[r.cookie] = true
	}
	c.leave()
}

// Clients that take nothing of long READs do not leave more behind than the server may keep. They are cut off, and others
// are handed over.
func TestHandOverOfLongReads(t *testing.T) {
	const length, most = 33 << 20, 6 << 20
	d := newRAM(length)
	d.WriteAt([]byte(pattern(length, 3)), 0)
	idle, s := dialServer(t, serveRAM(d), Options{take: 20 * time.Millisecond, MaxMemory: most})
	idle.open("disk", false)
	var greedy []*client
	for range 3 {
		c := connect(t, s)
		c.open("disk", true)
		c.request(0, cmdRead, 1, 0, length)
		greedy = append(greedy, c)
	}
	for begun := 0; begun < len(greedy); time.Sleep(time.Millisecond) {
		begun = 0
		for _, c := range s.Clients() {
			begun += int(c.Counters.Requests)
		}
	}
	list, err := s.Pause(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kept := 0
	for _, p := range list {
		kept += len(p.State.Unsent)
	}
	if len(list) != 1 || kept > most {
		t.Errorf("%d connections, which leave %d bytes", len(list), kept)
	}
	s.Continue()
	for _, c := range greedy {
		if err := c.ended(); !errors.Is(err, errUnsent) {
			t.Error(err)
		}
	}
	idle.alive()
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// A hand-over that fails because a device does not answer leaves all as it was.
func TestPauseUndone(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	exports := exportMap{"disk": {Device: newRAM(1 << 20)}, "slow": {Device: d}}
	idle, s := dialServer(t, exports, Options{})
	idle.open("disk", false)
	busy := connect(t, s)
	busy.open("slow", false)
	d.onRead = func([]byte, int64) error { close(entered); <-release; return nil }
	busy.request(0, cmdRead, 1, 0, 1<<19)
	<-entered
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Pause(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	s.Continue()
	idle.alive()
	close(release)
	busy.reply(1 << 19)
	d.onRead = nil
	busy.alive()
	greeted := connect(t, s) // and others may come
	greeted.open("disk", false)
	s, states := handOver(t, s)
	if len(states) != 3 {
		t.Errorf("%d connections were handed over", len(states))
	}
	for _, c := range []*client{idle, busy, greeted} {
		c.want(0, 0, cmdRead, 0, 512)
		modeClient{c, "simple"}.leave()
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// A listener that was paused accepts again after Continue, and clients that connected meanwhile are served.
func TestListenerContinues(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	s := New(serveRAM(newRAM(4096)), Options{})
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	for range 2 {
		if _, err := s.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = nc.SetDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a paused server greets: %v", err)
		}
		s.Continue()
		_ = nc.SetDeadline(time.Now().Add(testwatch.Long))
		c := &client{tb: t, Conn: nc}
		c.open("disk", false)
		nc.Close()
	}
	if err := errors.Join(s.Shutdown(t.Context()), ignore(<-served, ErrServerClosed)); err != nil {
		t.Error(err)
	}
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return fmt.Errorf("%w, want %w", err, expected)
}
