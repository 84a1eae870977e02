package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// A client that exceeds the limit gets a refusal with the reason, in whichever way it begins. The others are served.
func TestTooManyConnections(t *testing.T) {
	s := New(serveRAM(newRAM(4096)), Options{MaxConnections: 2})
	a, b := connect(t, s), connect(t, s)
	a.open("disk", false)
	b.open("disk", false)
	for _, id := range []uint32{optGo, optInfo, optList} {
		c := connect(t, s)
		c.greet(3)
		c.option(optStructuredReply)
		c.wantOptReply(optStructuredReply, repAck)
		if id == optList {
			c.option(id)
		} else {
			c.option(id, str("disk"), u16(0))
		}
		if text := c.wantOptReply(id, repErrPolicy); text != "too many NBD connections: the server takes 2 at a time" {
			t.Errorf("option %d: %q", id, text)
		}
		c.option(optAbort)
		c.wantOptReply(optAbort, repAck)
		if err := c.hungUp(); !errors.Is(err, ErrTooManyConnections) {
			t.Fatalf("third connection: %v", err)
		}
	}
	c := connect(t, s)
	c.greet(3)
	c.option(optExportName, "disk") // to which no answer is possible
	if err := c.hungUp(); !errors.Is(err, ErrTooManyConnections) {
		t.Fatalf("third connection: %v", err)
	}
	a.disconnect()
	d := connect(t, s)
	d.open("disk", false)
	d.alive()
	b.alive()
}

// Clients that are refused and do not disconnect do not accumulate, and do not prevent others from being served.
func TestRefusedThatStay(t *testing.T) {
	s := New(serveRAM(newRAM(4096)), Options{MaxConnections: 1})
	a := connect(t, s)
	a.open("disk", false)
	refused := make([]*client, maxRefused)
	for i := range refused {
		refused[i] = connect(t, s)
		refused[i].get(18) // and then nothing
	}
	if err := connect(t, s).hungUp(); !errors.Is(err, ErrTooManyConnections) {
		t.Errorf("ServeConn: %v", err)
	}
	a.disconnect()
	b := connect(t, s)
	b.open("disk", false)
	b.alive()
	for _, c := range refused {
		c.Close()
		_ = c.ended()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused != 0 || len(s.conns) != 1 {
		t.Errorf("%d refused, %d connections", s.refused, len(s.conns))
	}
}

// A listing sends several options for each export on one connection. It finds even exports that are in use exclusively.
func TestListingOfThousands(t *testing.T) {
	const n = 3000
	exports := exportMap{}
	for i := range n {
		exports[fmt.Sprintf("clone%04d", i)] = &Export{Device: newRAM(ramBlock)}
	}
	c := dial(t, exports, Options{})
	c.greet(3)
	c.option(optStructuredReply)
	c.wantOptReply(optStructuredReply, repAck)
	c.option(optList)
	var names []string
	for {
		typ, data := c.optReply(optList)
		if typ == repAck {
			break
		}
		names = append(names, data[4:])
	}
	if len(names) != n {
		t.Fatalf("%d names", len(names))
	}
	for _, name := range append(names, "busy") {
		c.option(optInfo, str(name), u16(0))
		c.wantOptReply(optInfo, repInfo)
		c.wantOptReply(optInfo, repInfo)
		c.wantOptReply(optInfo, repAck)
		c.option(optListMeta, str(name), u32(0))
		c.wantOptReply(optListMeta, repMetaContext)
		c.wantOptReply(optListMeta, repAck)
	}
	c.option(optGo, str(names[0]), u16(0))
	c.wantOptReply(optGo, repInfo)
}

// Many connections can wait cheaply: the server holds no buffer for a connection without a request.
func TestManyConnections(t *testing.T) {
	d := newRAM(1 << 20)
	s := New(serveRAM(d), Options{})
	clients := make([]*client, 500)
	var wg sync.WaitGroup
	for i := range clients {
		clients[i] = connect(t, s)
		wg.Go(func() {
			clients[i].open("disk", true)
			clients[i].want(0, 0, cmdRead, 0, 4096)
			clients[i].want(0, 0, cmdWrite, 0, 1<<16, pattern(1<<16, 1))
		})
	}
	wg.Wait()
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for _, c := range s.conns {
		conns = append(conns, c.conn)
	}
	s.mu.Unlock()
	if len(conns) != len(clients) {
		t.Fatalf("%d connections", len(conns))
	}
	for _, c := range clients {
		c.disconnect()
	}
	for _, c := range conns {
		if c.in.buf != nil || c.batch != nil {
			t.Fatal("a connection holds buffers")
		}
	}
}

// syncBuffer is a log.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A failed request is logged with its parameters and the reason, since the client gets only a number. Many failures do
// not make many lines.
func TestFailedRequestIsLogged(t *testing.T) {
	for name, x := range map[string]struct {
		typ    uint16
		length uint32
		data   string
		want   string
	}{
		"read":       {cmdRead, 512, "", "request=READ offset=4096 length=512"},
		"large read": {cmdRead, 1 << 17, "", "request=READ offset=4096 length=131072"},
		"write":      {cmdWrite, 4, "data", "request=WRITE"},
		"flush":      {cmdFlush, 0, "", "request=FLUSH"},
		"trim":       {cmdTrim, 512, "", "request=TRIM"},
		"zeroes":     {cmdWriteZeroes, 512, "", "request=WRITE_ZEROES"},
		"cache":      {cmdCache, 512, "", "request=CACHE"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newRAM(1 << 20)
			fail := func() error { return fmt.Errorf("reading chunk 7: %w", syscall.EMFILE) }
			d.onRead = func([]byte, int64) error { return fail() }
			d.onWrite = d.onRead
			d.onFlush = fail
			d.onZero = func(int64, int64, bool) error { return fail() }
			var log syncBuffer
			c := dial(t, exportMap{"disk": {Device: struct{ Device }{d}}}, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
			c.open("disk", true)
			for range 100 {
				c.want(errnoIO, 0, x.typ, 4096, x.length, x.data)
			}
			text := log.String()
			if !strings.Contains(text, `level=ERROR msg="nbd request failed" export=disk `+x.want) ||
				!strings.Contains(text, `err="reading chunk 7: too many open files"`) {
				t.Errorf("log: %s", text)
			}
			if n := strings.Count(text, "\n"); n > 50 {
				t.Errorf("%d lines for 100 failures", n)
			}
		})
	}
}

// A device that panics fails the request, and neither the connection nor the process.
func TestPanics(t *testing.T) {
	d := newRAM(1 << 20)
	for b := range d.present {
		d.present[b] = true
	}
	d.onRead = func([]byte, int64) error { panic("read") }
	d.onWrite = func([]byte, int64) error { panic("write") }
	d.onFlush = func() error { panic("flush") }
	d.onZero = func(int64, int64, bool) error { panic("zero") }
	var log syncBuffer
	exports := exportMap{"disk": {Device: d}, "tried": {Device: &sleepy{
		Device: struct{ Device }{d}, try: func([]byte, int64) (bool, error) { panic("try") },
	}}, "mapped": {Device: panicExtents{d}}}
	for name := range exports {
		for _, structured := range []bool{false, true} {
			c := dial(t, exports, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
			c.open(name, structured)
			c.want(errnoIO, 0, cmdRead, 0, 512)
			c.want(errnoIO, 0, cmdRead, 0, 1<<19)
			c.want(errnoIO, 0, cmdWrite, 0, 4, "data")
			c.want(errnoIO, 0, cmdWrite, 0, 1<<16, pattern(1<<16, 1))
			c.want(errnoIO, 0, cmdFlush, 0, 0)
			c.want(errnoIO, 0, cmdTrim, 0, 512)
			c.want(errnoIO, 0, cmdWriteZeroes, 0, 512)
			c.want(errnoIO, 0, cmdCache, 0, 512)
			if structured && name == "mapped" {
				c.want(errnoIO, 0, cmdBlockStatus, 0, 512)
			}
			c.want(errnoInval, 0, 200, 0, 0)
			c.disconnect()
		}
	}
	if text := log.String(); !strings.Contains(text, `err="panic: `) || !strings.Contains(text, "limits_test.go") {
		t.Errorf("the panic or its stack is not logged: %s", text)
	}
}

type panicExtents struct{ Device }

func (panicExtents) Extents(int64, int64, func(off, length int64, hole bool) bool) error {
	panic("extents")
}

// panicExports panic everywhere, and their device does.
type panicExports struct{ opened bool }

func (panicExports) List() ([]string, error)       { panic("list") }
func (panicExports) Describe(string) (Info, error) { panic("describe") }
func (p panicExports) Open(string) (*Export, error) {
	if !p.opened {
		panic("open")
	}
	return &Export{Device: (*ramDevice)(nil), Close: func() error { panic("close") }}, nil
}

func TestPanicsOfExports(t *testing.T) {
	for _, opened := range []bool{false, true} {
		var log syncBuffer
		c := dial(t, panicExports{opened}, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		c.greet(3)
		c.option(optList)
		c.wantOptReply(optList, repErrPlatform)
		c.option(optInfo, str("x"), u16(0))
		c.wantOptReply(optInfo, repErrPlatform)
		c.option(optGo, str("x"), u16(0))
		c.wantOptReply(optGo, repErrPlatform)
		c.Close()
		_ = c.ended()
		if !strings.Contains(log.String(), `err="panic: list"`) {
			t.Errorf("log: %s", log.String())
		}
	}
}

// The default export is for Exports to choose: it need not be the only one that is listed.
func TestDefaultExport(t *testing.T) {
	c := dial(t, defaultExports{exportMap{"a": {Device: newRAM(4096)}, "a@s": {Device: newRAM(4096)}}}, Options{})
	c.open("", true)
	c.alive()
	c.want(0, 0, cmdBlockStatus, 0, 4096)
	c.disconnect()
}

type defaultExports struct{ exportMap }

func (d defaultExports) Open(name string) (*Export, error) {
	if name == "" {
		name = "a"
	}
	return d.exportMap.Open(name)
}

// The text of a refusal names its reason.
func TestRefusalText(t *testing.T) {
	c := dial(t, failingExports{}, Options{})
	c.greet(3)
	c.option(optGo, str("x"), u16(0))
	if text := c.wantOptReply(optGo, repErrUnknown); text != "volume x: file does not exist" {
		t.Errorf("%q", text)
	}
}

type failingExports struct{ exportMap }

func (failingExports) Open(name string) (*Export, error) {
	return nil, fmt.Errorf("volume %s: %w", name, fs.ErrNotExist)
}
