package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

func TestMain(m *testing.M) { os.Exit(testwatch.Run(m)) }

// client speaks the protocol by hand, so that it can also break it.
type client struct {
	tb testing.TB
	net.Conn
	served     chan error // what ServeConn returned
	structured bool
	secure     *tls.Config // not nil: greet begins TLS
}

// dial connects a client to a new server of exports; the greeting is not yet read.
func dial(tb testing.TB, exports Exports, opts Options) *client {
	tb.Helper()
	c, _ := dialServer(tb, exports, opts)
	return c
}

func dialServer(tb testing.TB, exports Exports, opts Options) (*client, *Server) {
	tb.Helper()
	s := New(exports, opts)
	return connect(tb, s), s
}

// connect connects a client to s over a unix socket, and ends both with the test.
func connect(tb testing.TB, s *Server) *client {
	tb.Helper()
	l, err := net.Listen("unix", filepath.Join(tb.TempDir(), "s"))
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	c := &client{tb: tb, Conn: nc, served: make(chan error, 1)}
	go func() { c.served <- s.ServeConn(context.Background(), server) }()
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second)) // a test that hangs says where
	tb.Cleanup(func() { nc.Close() })
	return c
}

// ended waits until ServeConn returns, and returns its error.
func (c *client) ended() error {
	c.tb.Helper()
	err := testwatch.Wait(c.tb, testwatch.Long, "the end of the connection", c.served)
	c.served <- err
	return err
}

// hungUp checks that the server closes the connection and sends nothing more.
func (c *client) hungUp() error {
	c.tb.Helper()
	b, err := io.ReadAll(c.Conn)
	if len(b) != 0 {
		c.tb.Fatalf("%d more bytes: %x", len(b), b)
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		c.tb.Fatal("the server does not hang up")
	}
	return c.ended()
}

func (c *client) put(parts ...string) {
	c.tb.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		b.WriteString(p)
	}
	if _, err := c.Write(b.Bytes()); err != nil {
		c.tb.Fatalf("send: %v", err)
	}
}

func (c *client) get(n int) []byte {
	c.tb.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.Conn, b); err != nil {
		c.tb.Fatalf("receive %d bytes: %v", n, err)
	}
	return b
}

// greet does the greeting.
func (c *client) greet(flags uint32) {
	c.tb.Helper()
	if got, want := string(c.get(18)), u64(magicInit)+u64(magicOption)+u16(3); got != want {
		c.tb.Fatalf("greeting %x, want %x", got, want)
	}
	c.put(u32(flags))
	if c.secure != nil {
		if err := c.startTLS(c.secure); err != nil {
			c.tb.Fatal(err)
		}
	}
}

func (c *client) option(id uint32, data ...string) {
	c.tb.Helper()
	n := 0
	for _, d := range data {
		n += len(d)
	}
	c.put(append([]string{u64(magicOption), u32(id), u32(uint32(n))}, data...)...)
}

// optReply reads one reply to option id.
func (c *client) optReply(id uint32) (typ uint32, data string) {
	c.tb.Helper()
	h := c.get(optReplyLen)
	if be.Uint64(h) != magicOptReply || be.Uint32(h[8:]) != id {
		c.tb.Fatalf("not a reply to option %d: %x", id, h)
	}
	return be.Uint32(h[12:]), string(c.get(int(be.Uint32(h[16:]))))
}

func (c *client) wantOptReply(id, typ uint32) string {
	c.tb.Helper()
	got, data := c.optReply(id)
	if got != typ {
		c.tb.Fatalf("option %d: reply %#x %q, want %#x", id, got, data, typ)
	}
	return data
}

func str(s string) string { return u32(uint32(len(s))) + s }

// open negotiates the export, with structured replies and base:allocation if wanted.
func (c *client) open(name string, structured bool) (size uint64, flags uint16) {
	c.tb.Helper()
	c.greet(3)
	if structured {
		c.structured = true
		c.option(optStructuredReply)
		c.wantOptReply(optStructuredReply, repAck)
		c.option(optSetMeta, str(name), u32(1), str(contextAllocation))
		if got := c.wantOptReply(optSetMeta, repMetaContext); got != u32(1)+contextAllocation {
			c.tb.Fatalf("meta context %q", got)
		}
		c.wantOptReply(optSetMeta, repAck)
	}
	c.option(optGo, str(name), u16(0))
	info := []byte(c.wantOptReply(optGo, repInfo))
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repAck)
	return be.Uint64(info[2:]), be.Uint16(info[10:])
}

func reqBytes(flags, typ uint16, cookie, off uint64, length uint32) string {
	return u32(magicRequest) + u16(flags) + u16(typ) + u64(cookie) + u64(off) + u32(length)
}

func (c *client) request(flags, typ uint16, cookie, off uint64, length uint32, payload ...string) {
	c.tb.Helper()
	c.put(append([]string{reqBytes(flags, typ, cookie, off, length)}, payload...)...)
}

// chunk is a structured reply chunk, or a simple reply with typ simpleReply.
type chunk struct {
	flags, typ uint16
	cookie     uint64
	errno      uint32
	data       string
}

const simpleReply = 0xffff

// reply reads one chunk or simple reply; n is the payload that a simple reply has if it succeeds.
func (c *client) reply(n int) chunk {
	c.tb.Helper()
	h := c.get(simpleLen)
	switch be.Uint32(h) {
	case magicSimple:
		r := chunk{typ: simpleReply, flags: chunkFlagDone, errno: be.Uint32(h[4:]), cookie: be.Uint64(h[8:])}
		if r.errno == 0 {
			r.data = string(c.get(n))
		}
		return r
	case magicChunk:
		if !c.structured {
			c.tb.Fatal("structured reply, not negotiated")
		}
		r := chunk{flags: be.Uint16(h[4:]), typ: be.Uint16(h[6:]), cookie: be.Uint64(h[8:])}
		r.data = string(c.get(int(be.Uint32(c.get(4)))))
		if r.typ == chunkError || r.typ == chunkErrorOffset {
			r.errno = be.Uint32([]byte(r.data))
		}
		return r
	}
	c.tb.Fatalf("no reply: %x", h)
	return chunk{}
}

// want sends a request and checks the error of its one reply.
func (c *client) want(errno uint32, flags, typ uint16, off uint64, length uint32, payload ...string) chunk {
	c.tb.Helper()
	c.request(flags, typ, 77, off, length, payload...)
	n := 0
	if typ == cmdRead {
		n = int(length)
	}
	r := c.reply(n)
	if r.errno != errno || r.cookie != 77 {
		c.tb.Fatalf("command %d flags %#x off %d length %d: errno %d cookie %d, want errno %d",
			typ, flags, off, length, r.errno, r.cookie, errno)
	}
	return r
}

// disconnect ends the connection properly.
func (c *client) disconnect() {
	c.tb.Helper()
	c.request(0, cmdDisc, 0, 0, 0)
	if err := c.hungUp(); err != nil {
		c.tb.Fatalf("ServeConn: %v", err)
	}
}

// alive checks that the connection still works.
func (c *client) alive() {
	c.tb.Helper()
	c.request(0, cmdFlush, 99, 0, 0)
	if r := c.reply(0); r.errno != 0 || r.cookie != 99 {
		c.tb.Fatalf("flush: %+v", r)
	}
}
