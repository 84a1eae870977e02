package nbd

import (
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A READ of more than a payload is answered in chunks that each fit in one, without more memory than one of them.
func TestLongRead(t *testing.T) {
	const size, off, length = 80 << 20, 1<<20 + 5, 70 << 20
	d := newRAM(size)
	d.WriteAt([]byte(pattern(45<<20, 3)), 2<<20)
	c, srv := dialServer(t, serveRAM(d), Options{MaxInFlight: 1 << 20, MaxMemory: 1 << 20})
	c.open("disk", true)
	conn := theConn(srv)
	for range 2 {
		c.request(0, cmdRead, 9, off, length)
		got, chunks := make([]byte, length), 0
		for at, done := uint64(off), false; !done; chunks++ {
			r := c.reply(0)
			from := be.Uint64([]byte(r.data))
			switch {
			case from != at || r.errno != 0 || r.cookie != 9:
				t.Fatalf("chunk %d at %d, error %d, want one at %d", r.typ, from, r.errno, at)
			case r.typ == chunkOffsetData && len(r.data) <= MaxPayload+8:
				at += uint64(copy(got[at-off:], r.data[8:]))
			case r.typ == chunkOffsetHole:
				at += uint64(be.Uint32([]byte(r.data[8:])))
			default:
				t.Fatalf("chunk %d of %d bytes", r.typ, len(r.data))
			}
			done = r.flags&chunkFlagDone != 0
			if done != (at == off+length) {
				t.Fatalf("done %v at %d of %d", done, at-off, length)
			}
			conn.budget.all.mu.Lock()
			if used := conn.budget.used; used > 2*longRead {
				t.Errorf("%d bytes are charged", used)
			}
			conn.budget.all.mu.Unlock()
		}
		if chunks < length/MaxPayload || string(got) != string(d.content()[off:][:length]) {
			t.Errorf("%d chunks, or wrong content", chunks)
		}
	}
	c.want(errnoOverflow, cmdFlagDF, cmdRead, off, length)
	c.want(errnoInval, 0, cmdRead, 20<<20, length)
	c.disconnect()
	if conn.budget.used != 0 {
		t.Errorf("%d bytes stay charged", conn.budget.used)
	}

	c = dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	c.want(errnoInval, 0, cmdRead, off, length)
	c.disconnect()
}

// A long READ that fails is answered with what lies before the failure, and with where and why it failed.
func TestLongReadFails(t *testing.T) {
	const bad = 50<<20 + 3*ramBlock
	d := newRAM(80 << 20)
	d.WriteAt([]byte(pattern(80<<20, 3)), 0)
	d.onRead = func(p []byte, off int64) error {
		if off <= bad && bad < off+int64(len(p)) {
			return fmt.Errorf("the disk is bad: %w", syscall.ENOMEM)
		}
		return nil
	}
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", true)
	c.request(0, cmdRead, 9, 0, 70<<20)
	at := 0
	for {
		r := c.reply(0)
		if r.typ == chunkOffsetData {
			at += len(r.data) - 8
			continue
		}
		want := u32(errnoNoMem) + u16(uint16(len(r.data)-14)) + "the disk is bad: cannot allocate memory" + u64(uint64(at))
		if r.typ != chunkErrorOffset || r.flags != chunkFlagDone || r.data != want {
			t.Errorf("after %d bytes: %+v", at, r)
		}
		break
	}
	if at > bad || at < bad-longRead {
		t.Errorf("%d bytes before the failure at %d", at, bad)
	}
	c.alive()
	c.disconnect()
}

// Of a long READ whose client takes nothing, no more is read than a part, and a client that goes leaves nothing behind.
func TestLongReadOfAClientThatGoes(t *testing.T) {
	const requests = 5
	d := newRAM(80 << 20)
	d.WriteAt([]byte(pattern(80<<20, 3)), 0)
	var read atomic.Int64
	d.onRead = func(p []byte, _ int64) error { read.Add(int64(len(p))); return nil }
	c, srv := dialServer(t, serveRAM(d), Options{})
	c.open("disk", true)
	conn := theConn(srv)
	for i := range uint64(requests) {
		c.request(0, cmdRead, i, 0, 80<<20)
	}
	c.get(1 << 20)
	for read.Load() < requests*longRead {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // for a server that does not wait
	if n := read.Load(); n > (requests+1)*longRead {
		t.Errorf("%d bytes were read for a client that took 1 MiB", n)
	}
	c.Close()
	_ = c.ended()
	if conn.budget.used != 0 || d.opens.Load() != d.closes.Load() {
		t.Errorf("%d bytes stay charged, %d of %d opens are closed", conn.budget.used, d.closes.Load(), d.opens.Load())
	}
}

// An error chunk says why; what a panic says is the server's own.
func TestErrorTexts(t *testing.T) {
	long := strings.Repeat("\xff", 5000)
	d := newRAM(1 << 20)
	for _, x := range []struct {
		length uint32
		err    any
		text   string
		errno  uint32
	}{
		{512, syscall.ENOSPC, "no space left on device", errnoNoSpace},
		{512, io.ErrUnexpectedEOF, "unexpected EOF", errnoIO},
		{1 << 20, fmt.Errorf("%s%w", long, syscall.EPERM), "?", errnoPerm},
		{512, "secret", "the server has failed, and its log says how", errnoIO},
	} {
		d.onRead = func(p []byte, off int64) error {
			if err, ok := x.err.(error); ok {
				return err
			}
			panic(x.err)
		}
		c := dial(t, serveRAM(d), Options{})
		c.open("disk", true)
		for _, flags := range []uint16{0, cmdFlagDF} { // a hole is not read
			if flags == 0 && x.length > 4096 {
				continue
			}
			r := c.want(x.errno, flags, cmdRead, 0, x.length)
			if n := int(be.Uint16([]byte(r.data[4:]))); n > maxErrorText || !strings.HasPrefix(r.data[6:][:n], x.text) {
				t.Errorf("%v: %q", x.err, r.data)
			}
		}
		r := c.want(errnoInval, 0, cmdRead, 1<<20, 1)
		if r.typ != chunkError || !strings.Contains(r.data, "behind the end") {
			t.Errorf("behind the end: %+v", r)
		}
		c.disconnect()
	}
}

// With extended headers, every error has a text, that of a flush for several requests, too.
func TestExtendedErrorTexts(t *testing.T) {
	d := newRAM(1 << 20)
	fail := func() error { return fmt.Errorf("the disk is full: %w", syscall.ENOSPC) }
	d.onWrite = func([]byte, int64) error { return fail() }
	d.onFlush = fail
	c := extend(dial(t, serveRAM(d), Options{}))
	want := func(flags, typ uint16, length uint64, payload ...string) {
		t.Helper()
		if r := c.want(errnoNoSpace, flags, typ, 0, length, payload...); !strings.Contains(r[0].data, "the disk is full") {
			t.Errorf("command %d: %q", typ, r[0].data)
		}
	}
	want(0, cmdWrite, 512, pattern(512, 1))
	want(0, cmdFlush, 0)
	d.onWrite = nil
	want(cmdFlagFUA, cmdWrite, 512, pattern(512, 1))
	want(cmdFlagFUA, cmdTrim, 512)
}

// The longest error has room in a batch, whose buffer must not move.
func TestErrorFits(t *testing.T) {
	f := failure{errno: errnoIO, text: strings.Repeat("x", maxErrorText), located: true}
	for _, s := range []session{{structured: true}, {structured: true, extended: true}} {
		if n := len(s.appendErrorChunk(nil, request{}, f)); n > replyRoom {
			t.Errorf("extended %v: %d bytes, and there is room for %d", s.extended, n, replyRoom)
		}
	}
}

// libnbd reads more than a payload, and goes on after an error that has an offset and a text.
func TestLongReadOfNbdsh(t *testing.T) {
	d := newRAM(64 << 20)
	d.WriteAt([]byte(pattern(40<<20, 9)), 1<<20)
	d.onRead = func(p []byte, off int64) error {
		if off+int64(len(p)) > 60<<20 {
			return syscall.EIO
		}
		return nil
	}
	d.WriteAt([]byte("x"), 63<<20)
	uri := serveURI(t, serveRAM(d))("disk")
	run(t, "nbdsh", "-u", uri, "-c", `
import errno
h.set_strict_mode(0)
whole = h.pread(48 << 20, 0)
step = b"".join(h.pread(1 << 20, i << 20) for i in range(48))
assert whole == step
seen = []
def chunk(buf, off, status, err):
    seen.append((off, len(buf), status))
    return 0
try: h.pread_structured(64 << 20, 0, chunk)
except nbd.Error as e: assert e.errnum == errno.EIO, e
else: assert False
assert seen[-1][2] == nbd.READ_ERROR and seen[-1][0] >= 60 << 20, seen[-1]
assert h.pread(4096, 1 << 20) == whole[1 << 20:][:4096]
`)
	out, err := try(t, "qemu-io", "-f", "raw", "-c", "read 0 48M", "-c", "read 63M 64k", "-c", "read 1M 1M", uri)
	if strings.Count(out, "bytes at offset") != 2 || !strings.Contains(out+fmt.Sprint(err), "Input/output error") {
		t.Errorf("qemu-io: %s %v", out, err)
	}
}
