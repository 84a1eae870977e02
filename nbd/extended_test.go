package nbd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// extClient is a client with extended headers.
type extClient struct{ *client }

// extend negotiates extended headers, and then the export disk with some contexts.
func extend(c *client, contexts ...string) extClient {
	c.tb.Helper()
	c.greet(3)
	c.option(optExtendedHeaders)
	c.wantOptReply(optExtendedHeaders, repAck)
	c.option(optStructuredReply)
	c.wantOptReply(optStructuredReply, repErrExtended)
	c.metaOption(optSetMeta, contexts...)
	c.option(optGo, str("disk"), u16(0))
	info := c.wantOptReply(optGo, repInfo)
	if be.Uint16([]byte(info[10:]))&flagSendDF == 0 {
		c.tb.Error("no DF with extended headers")
	}
	c.wantOptReply(optGo, repInfo)
	c.wantOptReply(optGo, repAck)
	return extClient{c}
}

func (c extClient) request(flags, typ uint16, cookie, off, length uint64, payload ...string) {
	c.tb.Helper()
	c.put(append([]string{u32(magicExtRequest), u16(flags), u16(typ), u64(cookie), u64(off), u64(length)}, payload...)...)
}

// chunks reads a whole reply, in which the offset of the request is repeated.
func (c extClient) chunks(cookie, off uint64) (chunks []chunk) {
	c.tb.Helper()
	for {
		h := c.get(extChunkLen)
		if be.Uint32(h) != magicExtReply || be.Uint64(h[8:]) != cookie || be.Uint64(h[16:]) != off {
			c.tb.Fatalf("header %x, want one for request %d at %d", h, cookie, off)
		}
		r := chunk{flags: be.Uint16(h[4:]), typ: be.Uint16(h[6:]), data: string(c.get(int(be.Uint64(h[24:]))))}
		if r.typ == chunkError || r.typ == chunkErrorOffset {
			r.errno = be.Uint32([]byte(r.data))
		}
		if chunks = append(chunks, r); r.flags&chunkFlagDone != 0 {
			return chunks
		}
	}
}

// want sends a request and checks the error of its reply, which it returns.
func (c extClient) want(errno uint32, flags, typ uint16, off, length uint64, payload ...string) []chunk {
	c.tb.Helper()
	c.request(flags, typ, 5, off, length, payload...)
	chunks := c.chunks(5, off)
	last := chunks[len(chunks)-1]
	if last.errno != errno || errno == 0 && last.typ&(1<<15) != 0 {
		c.tb.Fatalf("command %d flags %#x off %d length %d: %+v, want error %d", typ, flags, off, length, last, errno)
	}
	return chunks
}

// hugeDevice is a device of many TiB, with data in its first block, that notes what is asked of it.
type hugeDevice struct {
	*ramDevice
	calls []string
}

const hugeSize = 40 << 40

func (d *hugeDevice) Size() int64 { return hugeSize }
func (d *hugeDevice) Discard(off, n int64) error {
	d.calls = append(d.calls, fmt.Sprintf("discard %d %d", off, n))
	return nil
}

func (d *hugeDevice) WriteZeroes(off, n int64, _ bool) error {
	d.calls = append(d.calls, fmt.Sprintf("zero %d %d", off, n))
	return nil
}

func (d *hugeDevice) Extents(off, n int64, fn func(off, length int64, hole bool) bool) error {
	_ = fn(0, ramBlock, false) && fn(ramBlock, hugeSize-ramBlock, true)
	return nil
}

func TestExtendedHeaders(t *testing.T) {
	ram := newRAM(80 << 20)
	ram.WriteAt([]byte(pattern(80<<20, 4)), 0)
	d := &hugeDevice{ramDevice: ram}
	c := extend(dial(t, exportMap{"disk": {Device: d}}, Options{}), contextAllocation)

	got := c.want(0, 0, cmdBlockStatus, 0, hugeSize)
	want := u32(metaContextID(0)) + u32(2) + u64(ramBlock) + u64(0) + u64(maxStatus-ramBlock) + u64(stateHole|stateZero)
	if len(got) != 1 || got[0].typ != chunkStatusExt || got[0].data != want {
		t.Errorf("status %+v, want %x", got, want)
	}
	got = c.want(0, cmdFlagReqOne, cmdBlockStatus, 5<<32, 6<<32)
	if want := u32(metaContextID(0)) + u32(1) + u64(6<<32) + u64(3); got[0].data != want {
		t.Errorf("status %x, want %x", got[0].data, want)
	}

	if got := c.want(0, 0, cmdRead, 512, 512); len(got) != 1 || got[0].typ != chunkOffsetData || got[0].data != u64(512)+string(ram.data[512:1024]) {
		t.Errorf("read: %d chunks, the first %d", len(got), got[0].typ)
	}
	at := uint64(512)
	for _, chunk := range c.want(0, 0, cmdRead, 512, 70<<20) {
		if b := []byte(chunk.data); be.Uint64(b) != at {
			t.Fatalf("a chunk at %d, want %d", be.Uint64(b), at)
		} else if chunk.typ == chunkOffsetHole {
			at += uint64(be.Uint32(b[8:]))
		} else {
			at += uint64(len(b) - 8)
		}
	}
	if at != 512+70<<20 {
		t.Errorf("%d bytes were read", at-512)
	}
	c.want(0, cmdFlagDF, cmdRead, 512, 8192)
	c.want(0, cmdFlagPayload, cmdWrite, 100, 5, "hello")
	c.want(0, cmdFlagPayload|cmdFlagFUA, cmdWrite, 4096, 1<<20, strings.Repeat("x", 1<<20))
	if got := string(ram.content()[100:105]); got != "hello" || ram.content()[1<<20] != 'x' || ram.flushes.Load() != 1 {
		t.Errorf("written: %q, %d flushes", got, ram.flushes.Load())
	}
	c.want(0, 0, cmdFlush, 77, 0)
	c.want(0, 0, cmdCache, 0, 3<<20)
	c.want(0, 0, cmdRead, 5, 0)
	c.want(0, 0, cmdTrim, 1<<40, 1<<32+1)
	c.want(0, 0, cmdWriteZeroes, 1<<41, 2<<32)
	calls := []string{"discard 1099511627776 4294967296", "discard 1103806595072 1", "zero 2199023255552 4294967296", "zero 2203318222848 4294967296"}
	if !slices.Equal(d.calls, calls) {
		t.Errorf("calls %q, want %q", d.calls, calls)
	}
	for _, x := range []struct {
		errno       uint32
		flags, typ  uint16
		off, length uint64
	}{
		{errnoInval, 0, 99, 4096, 1},
		{errnoInval, 0, cmdRead, hugeSize, 1},
		{errnoInval, 0, cmdRead, 1, 1<<64 - 1},
		{errnoInval, 0, cmdTrim, 1, hugeSize},
		{errnoNoSpace, 0, cmdWriteZeroes, 1, hugeSize},
		{errnoOverflow, 0, cmdRead, 512, 1 << 32},
		{errnoOverflow, cmdFlagDF, cmdRead, 512, 33 << 20},
		{errnoInval, 0, cmdBlockStatus, 512, 0},
		{errnoNotSup, cmdFlagNoHole | cmdFlagFastZero, cmdWriteZeroes, 512, 1},
	} {
		c.want(x.errno, x.flags, x.typ, x.off, x.length)
	}
	c.request(0, cmdDisc, 0, 0, 0)
	if err := c.hungUp(); err != nil {
		t.Errorf("ServeConn: %v", err)
	}
}

// A payload is what the flag says. One that cannot be used is taken all the same, so that the next request is found.
func TestExtendedPayloads(t *testing.T) {
	ram := newRAM(1 << 20)
	c := extend(dial(t, exportMap{"disk": {Device: ram}}, Options{}), contextAllocation)
	c.want(0, 0, cmdWrite, 4096, 3, "old") // as QEMU does
	c.want(0, cmdFlagPayload, cmdWrite, 4096, 3, "\x00\x00\x00")
	c.want(errnoInval, cmdFlagPayload, cmdRead, 4096, 512, strings.Repeat("r", 512))
	c.want(errnoInval, cmdFlagPayload, cmdBlockStatus, 4096, 12, u64(4096)+u32(1))
	c.want(errnoInval, cmdFlagPayload, cmdFlush, 0, 1<<20, strings.Repeat("f", 1<<20))
	c.want(errnoNoSpace, cmdFlagPayload, cmdWrite, 1<<20, 100, strings.Repeat("w", 100))
	c.want(0, cmdFlagPayload, cmdWrite, 4096, 0)
	c.want(0, 0, cmdRead, 4096, 512)
	if strings.Trim(string(ram.content()), "\x00") != "" {
		t.Error("something was written")
	}
	c.request(cmdFlagPayload, cmdWrite, 1, 0, MaxPayload+1)
	if err := c.hungUp(); !errors.Is(err, ErrProtocol) {
		t.Errorf("a payload that is too long: %v", err)
	}

	c = extend(dial(t, exportMap{"disk": {Device: ram, ReadOnly: true}}, Options{}))
	c.want(errnoPerm, cmdFlagPayload, cmdWrite, 0, 3, "abc")
	c.want(errnoInval, 0, cmdBlockStatus, 0, 512) // no context
	c.put(reqBytes(0, cmdRead, 1, 0, 512), u32(0))
	if err := c.hungUp(); !errors.Is(err, ErrProtocol) {
		t.Errorf("a compact request: %v", err)
	}

	old := dial(t, serveRAM(ram), Options{})
	old.greet(3)
	old.option(optExtendedHeaders)
	old.wantOptReply(optExtendedHeaders, repAck)
	old.option(optExportName, "disk")
	if err := old.hungUp(); !errors.Is(err, ErrProtocol) {
		t.Errorf("EXPORT_NAME: %v", err)
	}
}
