package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// marked is a device with contexts: in each, every second block of 4 KiB has flags, which are the context's number.
type marked struct {
	*ramDevice
	opened, closed atomic.Int64
	onStatus       func() // may be nil
}

var markedContexts = []string{"x-a:one", "x-a:b:two", "x-c:three", "x-bad:open", "x-bad:status", "x-bad:panic"}

func (d *marked) OpenContext(name string) (Context, error) {
	if name == "x-bad:open" {
		return nil, fmt.Errorf("cannot be opened: %w", syscall.EBUSY)
	}
	d.opened.Add(1)
	return mark{d, name}, nil
}

type mark struct {
	d    *marked
	name string
}

func (m mark) Status(off, length int64, fn func(off, length int64, flags uint32) bool) error {
	if m.d.onStatus != nil {
		m.d.onStatus()
	}
	switch m.name {
	case "x-bad:status":
		return syscall.EOVERFLOW
	case "x-bad:panic":
		panic("status")
	}
	flags := uint32(slices.Index(markedContexts, m.name)) + 1
	for off, end := off/ramBlock*ramBlock, off+length; off < end; off += ramBlock {
		if off/ramBlock%2 == 1 && !fn(off, ramBlock, flags) {
			break
		}
	}
	return nil
}

func (m mark) Close() error { m.d.closed.Add(1); return nil }

// markedExports are an export that lists its contexts.
type markedExports struct{ exportMap }

func (m markedExports) Describe(name string) (Info, error) {
	info, err := m.exportMap.Describe(name)
	if err == nil {
		info.Contexts = markedContexts
	}
	return info, err
}

func newMarked() (*marked, Exports) {
	d := &marked{ramDevice: newRAM(64 << 20)}
	return d, markedExports{exportMap{"disk": {Device: d}, "other": {Device: newRAM(4096)}}}
}

// metaOption sends LIST_META_CONTEXT or SET_META_CONTEXT, and returns the names in the answer.
func (c *client) metaOption(id uint32, queries ...string) (names []string) {
	c.tb.Helper()
	data := str("disk") + u32(uint32(len(queries)))
	for _, q := range queries {
		data += str(q)
	}
	c.option(id, data)
	for {
		typ, data := c.optReply(id)
		switch typ {
		case repAck:
			return names
		case repMetaContext:
			names = append(names, data[4:])
			if got := be.Uint32([]byte(data)); id == optSetMeta && got != metaContextID(len(names)-1) {
				c.tb.Fatalf("context %s has the id %d", data[4:], got)
			}
		default:
			c.tb.Fatalf("option %d %q: %#x %q", id, queries, typ, data)
		}
	}
}

func (c *client) structure() {
	c.tb.Helper()
	c.greet(3)
	c.structured = true
	c.option(optStructuredReply)
	c.wantOptReply(optStructuredReply, repAck)
}

func TestListMetaContexts(t *testing.T) {
	_, exports := newMarked()
	c := dial(t, exports, Options{})
	c.structure()
	all := append([]string{contextAllocation}, markedContexts...)
	for _, x := range []struct {
		queries   []string
		list, set []string
	}{
		{nil, all, nil},
		{[]string{"base:"}, all[:1], nil},
		{[]string{"x-a:"}, all[1:3], nil},
		{[]string{"x-a:b:"}, all[2:3], nil},
		{[]string{"x-a", "x-a:o", ":", "", "x-b:"}, nil, nil},
		{[]string{"x-c:three", "x-a:", "x-c:three", "base:allocation", "x-a:one"}, all[:4], []string{all[0], all[1], all[3]}},
	} {
		if got := c.metaOption(optListMeta, x.queries...); !slices.Equal(got, x.list) {
			t.Errorf("list of %q: %q, want %q", x.queries, got, x.list)
		}
		if got := c.metaOption(optSetMeta, x.queries...); !slices.Equal(got, x.set) {
			t.Errorf("selection of %q: %q, want %q", x.queries, got, x.set)
		}
	}
	c.option(optListMeta, str("nosuch"), u32(0)) // only GO says that an export does not exist
	c.wantOptReply(optListMeta, repMetaContext)
	c.wantOptReply(optListMeta, repAck)
}

// Each context has its chunk in a reply, and is closed with the export.
func TestSeveralContexts(t *testing.T) {
	d, exports := newMarked()
	d.WriteAt(make([]byte, 4096), 0)
	c, srv := dialServer(t, exports, Options{})
	c.structure()
	c.metaOption(optSetMeta, "x-a:one")
	c.metaOption(optSetMeta, "x-a:b:two", "base:allocation", "x-c:three")
	c.option(optGo, str("disk"), u16(0))
	for _, typ := range []uint32{repInfo, repInfo, repAck} {
		c.wantOptReply(optGo, typ)
	}
	status := func(flags uint16, off uint64, length uint32) (chunks []string) {
		t.Helper()
		c.request(flags, cmdBlockStatus, 5, off, length)
		for {
			r := c.reply(0)
			if r.typ != chunkBlockStatus || r.cookie != 5 {
				t.Fatalf("%+v", r)
			}
			chunks = append(chunks, r.data)
			if r.flags&chunkFlagDone != 0 {
				return chunks
			}
		}
	}
	block := func(flags uint32) string { return u32(ramBlock) + u32(flags) }
	want := []string{
		u32(1) + block(0) + u32(3*ramBlock) + u32(3),
		u32(2) + block(0) + block(2) + block(0) + block(2),
		u32(3) + block(0) + block(3) + block(0) + block(3),
	}
	if got := status(0, 0, 4*ramBlock); !slices.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	want = []string{u32(1) + u32(ramBlock-10) + u32(0), u32(2) + u32(ramBlock-10) + u32(0), u32(3) + u32(ramBlock-10) + u32(0)}
	if got := status(cmdFlagReqOne, 10, 4*ramBlock); !slices.Equal([]string{got[1], got[2]}, want[1:]) || len(got[0]) != 12 {
		t.Errorf("REQ_ONE: %x, want %x", got, want)
	}
	for _, chunk := range status(0, 0, 64<<20)[1:] {
		if len(chunk) != 4+8*maxDescriptors {
			t.Errorf("%d bytes for many extents", len(chunk))
		}
	}
	conn := theConn(srv)
	c.disconnect()
	if d.opened.Load() != 2 || d.closed.Load() != 2 {
		t.Errorf("%d contexts were opened, and %d closed", d.opened.Load(), d.closed.Load())
	}
	if conn.budget.used != 0 {
		t.Errorf("%d bytes stay charged", conn.budget.used)
	}
}

// A context that cannot be opened or asked is an error for the client, and what was opened is closed.
func TestContextsThatFail(t *testing.T) {
	for _, x := range []struct {
		names []string
		open  uint32
		errno uint32
	}{
		{[]string{"x-a:one", "x-bad:open"}, repErrPlatform, 0},
		{[]string{"x-a:one", "x-bad:status"}, 0, errnoOverflow},
		{[]string{"base:allocation", "x-bad:panic"}, 0, errnoIO},
	} {
		d, exports := newMarked()
		c := dial(t, exports, Options{})
		c.structure()
		c.metaOption(optSetMeta, x.names...)
		c.option(optGo, str("disk"), u16(0))
		if x.open != 0 {
			if text := c.wantOptReply(optGo, x.open); !strings.Contains(text, x.names[1]) {
				t.Errorf("%q: %q", x.names, text)
			}
			if d.opens.Load() != d.closes.Load() || d.closed.Load() != 1 {
				t.Errorf("%q: not everything was closed", x.names)
			}
			c.metaOption(optSetMeta)
			c.option(optGo, str("disk"), u16(0)) // the negotiation goes on
		}
		for _, typ := range []uint32{repInfo, repInfo, repAck} {
			c.wantOptReply(optGo, typ)
		}
		if x.open == 0 {
			c.request(0, cmdBlockStatus, 7, 0, 4096)
			if r := c.reply(0); r.typ != chunkBlockStatus || r.flags != 0 {
				t.Errorf("%q: %+v", x.names, r)
			}
			if r := c.reply(0); r.errno != x.errno || r.flags != chunkFlagDone {
				t.Errorf("%q: %+v", x.names, r)
			}
		}
		c.alive()
		c.disconnect()
		if d.opened.Load() != d.closed.Load() {
			t.Errorf("%q: %d contexts were opened, and %d closed", x.names, d.opened.Load(), d.closed.Load())
		}
	}
}

// manyContexts are an export with more contexts than can be selected.
type manyContexts struct{ exportMap }

func (m manyContexts) Describe(name string) (Info, error) {
	info, err := m.exportMap.Describe(name)
	for i := range maxContexts {
		info.Contexts = append(info.Contexts, fmt.Sprint("x-many:", i))
	}
	return info, err
}

func TestTooManyContexts(t *testing.T) {
	c := dial(t, manyContexts{serveRAM(newRAM(4096))}, Options{})
	c.structure()
	all := c.metaOption(optListMeta)
	if len(all) != maxContexts+1 {
		t.Fatalf("%d contexts are listed", len(all))
	}
	data := str("disk") + u32(uint32(len(all)))
	for _, name := range all {
		data += str(name)
	}
	c.option(optSetMeta, data)
	c.wantOptReply(optSetMeta, repErrTooBig)
	c.option(optGo, str("disk"), u16(0)) // nothing is selected, or GO would fail
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repAck)
	c.want(errnoInval, 0, cmdBlockStatus, 0, 512)
}

// A client that goes away in the negotiation leaves no context open.
func TestContextsOfAClientThatGoes(t *testing.T) {
	d, exports := newMarked()
	c := dial(t, exports, Options{})
	c.structure()
	c.metaOption(optSetMeta, "x-a:one")
	c.option(optGo, str("disk"), u16(0))
	c.Close()
	if err := c.ended(); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Log(err)
	}
	for began := time.Now(); d.opened.Load() != d.closed.Load(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatal("a context stays open")
		}
	}
}

// patientExports tell their device when a client has gone.
type patientExports struct{ exportMap }

func (p patientExports) ForClient(ctx context.Context, _ net.Conn) Exports {
	return patientExports{exportMap{"disk": {Device: patient{p.exportMap["disk"].Device.(*ramDevice), ctx, make(chan struct{})}}}}
}

func (p patientExports) Describe(name string) (Info, error) {
	info, err := p.exportMap.Describe(name)
	info.Contexts = []string{"x-long:search", "x-long:again"}
	return info, err
}

// patient is a device whose contexts are found out for as long as the client is there, and only once.
type patient struct {
	*ramDevice
	client context.Context
	asked  chan struct{}
}

func (p patient) OpenContext(string) (Context, error) { return p, nil }
func (p patient) Close() error                        { return nil }

func (p patient) Status(int64, int64, func(off, length int64, flags uint32) bool) error {
	close(p.asked)
	<-p.client.Done()
	return p.client.Err()
}

// A BLOCK_STATUS that takes long ends when its client has gone, which is no failure to be logged. A client that has only
// ended its sending gets an answer.
func TestLongStatusOfAClientThatGoes(t *testing.T) {
	for _, halfClosed := range []bool{true, false} {
		var log syncBuffer
		c := dial(t, patientExports{serveRAM(newRAM(4096))}, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		c.structure()
		c.metaOption(optSetMeta, "x-long:search", "x-long:again")
		c.option(optGo, str("disk"), u16(0))
		for _, typ := range []uint32{repInfo, repInfo, repAck} {
			c.wantOptReply(optGo, typ)
		}
		c.request(0, cmdBlockStatus, 7, 0, 4096)
		if halfClosed {
			_ = c.Conn.(*net.UnixConn).CloseWrite()
			if r := c.reply(0); r.errno != errnoShutdown || r.flags != chunkFlagDone {
				t.Errorf("%+v", r)
			}
		} else {
			_ = c.Close()
		}
		_ = c.ended()
		if text := log.String(); strings.Contains(text, "request failed") {
			t.Errorf("log: %s", text)
		}
	}
}

// Between the contexts of a BLOCK_STATUS, a client that has gone ends it.
func TestStatusOfSeveralContextsIsGivenUp(t *testing.T) {
	d, exports := newMarked()
	asked, release := make(chan struct{}), make(chan struct{})
	d.onStatus = func() { close(asked); <-release } // of the first context; another call would panic
	c, s := dialServer(t, exports, Options{})
	c.structure()
	c.metaOption(optSetMeta, "x-a:one", "x-a:b:two")
	c.option(optGo, str("disk"), u16(0))
	for _, typ := range []uint32{repInfo, repInfo, repAck} {
		c.wantOptReply(optGo, typ)
	}
	c.request(0, cmdBlockStatus, 7, 0, 4096)
	<-asked
	conn := theConn(s)
	_ = c.Conn.(*net.UnixConn).CloseWrite()
	for !conn.ended.Load() {
		time.Sleep(time.Millisecond)
	}
	close(release)
	if r := c.reply(0); r.typ != chunkBlockStatus || r.flags != 0 {
		t.Errorf("%+v", r)
	}
	if r := c.reply(0); r.errno != errnoShutdown || r.flags != chunkFlagDone {
		t.Errorf("%+v", r)
	}
	_ = c.ended()
}
