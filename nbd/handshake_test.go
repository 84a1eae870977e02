package nbd

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

func TestNegotiateGo(t *testing.T) {
	d := newRAM(1 << 20)
	m := exportMap{"disk": {Device: d, Description: "a disk", MinBlock: 512, PreferredBlock: 8192}}
	c := dial(t, m, Options{})
	c.greet(3)
	c.option(optInfo, str(""), u16(3), u16(infoName), u16(infoDescription), u16(9))
	var infos []string
	for {
		typ, data := c.optReply(optInfo)
		if typ == repAck {
			break
		}
		infos = append(infos, data)
	}
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes |
		flagMultiConn | flagSendCache | flagSendFastZero)
	want := []string{
		u16(infoExport) + u64(1<<20) + u16(flags),
		u16(infoBlockSize) + u32(512) + u32(8192) + u32(MaxPayload),
		u16(infoName) + "disk",
		u16(infoDescription) + "a disk",
	}
	if !slices.Equal(infos, want) {
		t.Fatalf("infos %q, want %q", infos, want)
	}
	if d.opens.Load() != 0 {
		t.Fatal("INFO has opened the export, which others may have for themselves")
	}
	c.option(optStructuredReply)
	c.wantOptReply(optStructuredReply, repAck)
	c.option(optGo, str("disk"), u16(0))
	if got := c.wantOptReply(optGo, repInfo); got != u16(infoExport)+u64(1<<20)+u16(flags|flagSendDF) {
		t.Fatalf("export info %x", got)
	}
	if got := c.wantOptReply(optGo, repInfo); got != want[1] {
		t.Fatalf("block size info %x", got)
	}
	c.wantOptReply(optGo, repAck)
	c.alive()
	if d.closes.Load() != 0 {
		t.Fatal("closed while in use")
	}
	c.disconnect()
	if d.opens.Load() != 1 || d.closes.Load() != 1 {
		t.Fatalf("%d opens, %d closes", d.opens.Load(), d.closes.Load())
	}
}

func TestNegotiateExportName(t *testing.T) {
	for _, noZeroes := range []bool{true, false} {
		c := dial(t, serveRAM(newRAM(1<<20)), Options{})
		zeroes := exportZeroes
		if c.greet(map[bool]uint32{true: 3, false: 1}[noZeroes]); noZeroes {
			zeroes = 0
		}
		c.option(optExportName, "disk")
		b := c.get(10 + zeroes)
		if be.Uint64(b) != 1<<20 || be.Uint16(b[8:])&flagHasFlags == 0 || strings.Trim(string(b[10:]), "\x00") != "" {
			t.Fatalf("reply %x", b)
		}
		c.want(0, 0, cmdRead, 0, 512)
		c.disconnect()
	}
	c := dial(t, serveRAM(newRAM(1<<20)), Options{})
	c.greet(3)
	c.option(optExportName, "other")
	if err := c.hungUp(); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("ServeConn: %v", err)
	}
}

func TestNegotiateList(t *testing.T) {
	d := &Export{Device: newRAM(4096)}
	c := dial(t, exportMap{"a": d, "b": d}, Options{})
	c.greet(3)
	c.option(optList)
	names := []string{c.wantOptReply(optList, repServer), c.wantOptReply(optList, repServer)}
	slices.Sort(names)
	if !slices.Equal(names, []string{str("a"), str("b")}) {
		t.Fatalf("names %q", names)
	}
	c.wantOptReply(optList, repAck)
	c.option(optList, "x")
	c.wantOptReply(optList, repErrInvalid)
	c.option(optGo, str(""), u16(0)) // which one?
	c.wantOptReply(optGo, repErrUnknown)
	c.option(optAbort)
	c.wantOptReply(optAbort, repAck)
	if err := c.hungUp(); err != nil {
		t.Fatalf("ServeConn after ABORT: %v", err)
	}
}

// describedExports list descriptions.
type describedExports struct{ exportMap }

func (describedExports) ListInfo() ([]Info, error) {
	return []Info{{Name: "a", Description: "the first"}, {Name: "b", Description: strings.Repeat("x", 5000)}, {Name: "c"}}, nil
}

func TestNegotiateListWithDescriptions(t *testing.T) {
	c := dial(t, describedExports{}, Options{})
	c.greet(3)
	c.option(optList)
	for _, want := range []string{str("a") + "the first", str("b") + strings.Repeat("x", maxNameLen), str("c")} {
		if got := c.wantOptReply(optList, repServer); got != want {
			t.Errorf("listed %q, want %q", got, want)
		}
	}
	c.wantOptReply(optList, repAck)
}

func TestNegotiateRefusals(t *testing.T) {
	d := newRAM(4096)
	c := dial(t, serveRAM(d), Options{})
	c.greet(3)
	for _, x := range []struct {
		id   uint32
		data string
		want uint32
	}{
		{optGo, str("nothing") + u16(0), repErrUnknown},
		{optInfo, str("nothing") + u16(0), repErrUnknown},
		{optGo, str("secret") + u16(0), repErrPolicy},
		{optInfo, str("secret") + u16(0), repErrPolicy},
		{optGo, str("busy") + u16(0), repErrPlatform},
		{optGo, "", repErrInvalid},
		{optGo, u32(100) + "disk", repErrInvalid},
		{optGo, u32(0xffffffff) + "disk", repErrInvalid},
		{optGo, str("disk") + u16(2) + u16(0), repErrInvalid},
		{optGo, str("disk") + u16(0) + "x", repErrInvalid},
		{optGo, str(strings.Repeat("n", maxNameLen+1)) + u16(0), repErrInvalid},
		{optSetMeta, str("disk") + u32(1) + str(contextAllocation), repErrInvalid}, // before STRUCTURED_REPLY
		{optStructuredReply, "x", repErrInvalid},
		{optStartTLS, "", repErrPolicy},
		{optExtendedHeaders, "x", repErrInvalid},
		{12345, "data", repErrUnsup}, // unknown
	} {
		c.option(x.id, x.data)
		if got, text := c.optReply(x.id); got != x.want || text == "" {
			t.Fatalf("option %d %q: reply %#x %q, want %#x", x.id, x.data, got, text, x.want)
		}
	}
	if d.opens.Load() != 0 {
		t.Fatal("opened by an option that failed")
	}
	c.option(optGo, str("disk"), u16(0))
	c.wantOptReply(optGo, repInfo)
}

func TestNegotiateMetaContext(t *testing.T) {
	c := dial(t, serveRAM(newRAM(1<<20)), Options{})
	c.structured = true
	c.greet(3)
	c.option(optStructuredReply)
	c.wantOptReply(optStructuredReply, repAck)
	for _, x := range []struct {
		id      uint32
		queries []string
		found   bool
	}{
		{optListMeta, nil, true},
		{optListMeta, []string{"base:"}, true},
		{optListMeta, []string{"qemu:"}, false},
		{optSetMeta, nil, false},
		{optSetMeta, []string{"base:"}, false},
		{optSetMeta, []string{"x-other:y", contextAllocation, contextAllocation}, true},
	} {
		data := str("disk") + u32(uint32(len(x.queries)))
		for _, q := range x.queries {
			data += str(q)
		}
		c.option(x.id, data)
		if x.found {
			if got := c.wantOptReply(x.id, repMetaContext); got[4:] != contextAllocation {
				t.Fatalf("context %q", got)
			}
		}
		c.wantOptReply(x.id, repAck)
	}
	c.option(optListMeta, str("disk"), u32(1<<31))
	c.wantOptReply(optListMeta, repErrInvalid)
	// It was set for another name, and so not for this one.
	c.option(optSetMeta, str(""), u32(1), str(contextAllocation))
	c.wantOptReply(optSetMeta, repMetaContext)
	c.wantOptReply(optSetMeta, repAck)
	c.option(optGo, str("disk"), u16(0))
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repAck)
	c.want(errnoInval, 0, cmdBlockStatus, 0, 4096)
	c.disconnect()
}

// The server closes the connection of a client that breaks the negotiation.
func TestNegotiateHostile(t *testing.T) {
	for name, x := range map[string]struct {
		send func(c *client)
	}{
		"client flags": {send: func(c *client) { c.greet(1 << 7) }},
		"option magic": {send: func(c *client) {
			c.greet(3)
			c.put(u64(magicOption+1), u32(optList), u32(0))
		}},
		"huge option": {
			send: func(c *client) {
				c.greet(3)
				c.put(u64(magicOption), u32(optGo), u32(0xffffffff))
				c.wantOptReply(optGo, repErrTooBig)
			},
		},
		"long export name": {send: func(c *client) {
			c.greet(3)
			c.option(optExportName, strings.Repeat("n", maxNameLen+1))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, serveRAM(newRAM(4096)), Options{})
			x.send(c)
			if err := c.hungUp(); !errors.Is(err, ErrProtocol) {
				t.Fatalf("ServeConn: %v", err)
			}
		})
	}
}

func TestNegotiateDisconnects(t *testing.T) {
	for name, sent := range map[string]string{
		"nothing":     "",
		"flags":       u32(3),
		"half option": u32(3) + u64(magicOption) + u32(optGo),
		"half data":   u32(3) + u64(magicOption) + u32(optGo) + u32(10) + "ab",
	} {
		t.Run(name, func(t *testing.T) {
			d := newRAM(4096)
			c := dial(t, serveRAM(d), Options{})
			c.get(18)
			c.put(sent)
			c.Close()
			_ = c.ended()
			if d.opens.Load() != 0 {
				t.Fatal("opened")
			}
		})
	}
}

func TestNegotiateTimeout(t *testing.T) {
	c := dial(t, serveRAM(newRAM(4096)), Options{HandshakeTimeout: 50 * time.Millisecond})
	c.greet(3)
	c.put(u64(magicOption)) // and nothing more
	if err := c.hungUp(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("ServeConn: %v", err)
	}
	// The timeout is over with the negotiation.
	c = dial(t, serveRAM(newRAM(4096)), Options{HandshakeTimeout: 200 * time.Millisecond})
	c.open("disk", false)
	time.Sleep(300 * time.Millisecond)
	c.alive()
}

// slowExports open an export when they are told to.
type slowExports struct {
	exportMap
	asked, release chan struct{}
}

func (s slowExports) Open(name string) (*Export, error) {
	close(s.asked)
	<-s.release
	return s.exportMap.Open(name)
}

// A server that is shutting down says so in answer to an option, also to one that is under way. One that asks for
// nothing is not waited for.
func TestShutdownAnswersOptions(t *testing.T) {
	d := newRAM(4096)
	exports := slowExports{serveRAM(d), make(chan struct{}), make(chan struct{})}
	s := New(exports, Options{})
	opening, asking, silent := connect(t, s), connect(t, s), connect(t, s)
	for _, c := range []*client{opening, asking, silent} {
		c.greet(3)
		c.option(optInfo, str("disk"), u16(0))
		for _, typ := range []uint32{repInfo, repInfo, repAck} {
			c.wantOptReply(optInfo, typ)
		}
	}
	opening.option(optGo, str("disk"), u16(0))
	<-exports.asked
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(context.Background()) }()
	for !s.isClosed() {
		time.Sleep(time.Millisecond)
	}
	asking.option(optStructuredReply)
	asking.wantOptReply(optStructuredReply, repErrShutdown)
	close(exports.release)
	opening.wantOptReply(optGo, repErrShutdown)
	for _, c := range []*client{opening, asking, silent} {
		if err := c.hungUp(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("ServeConn: %v", err)
		}
	}
	if err := testwatch.Wait(t, testwatch.Long, "Shutdown", ended); err != nil {
		t.Error(err)
	}
	if d.opens.Load() != d.closes.Load() {
		t.Errorf("%d opens, %d closes", d.opens.Load(), d.closes.Load())
	}
}

// An export that should be opened on one connection says so, in INFO and GO.
func TestNoMultiConn(t *testing.T) {
	for _, one := range []bool{false, true} {
		c := dial(t, exportMap{"disk": {Device: newRAM(4096), NoMultiConn: one}}, Options{})
		if _, flags := c.open("disk", false); flags&flagMultiConn == 0 != one {
			t.Errorf("one connection: %v; flags %#x", one, flags)
		}
		c.disconnect()
	}
}
