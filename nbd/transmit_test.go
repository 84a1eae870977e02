package nbd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// pattern is n bytes that differ by offset and seed.
func pattern(n int, seed byte) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>8) ^ byte(i) ^ seed
	}
	return string(b)
}

// sizes has sizes that the receiver handles itself, and larger ones, aligned and not.
var sizes = []int{1, 511, 512, 4096, 4097, inlineMax, inlineMax + 1, 100_000, 1 << 20, 3<<20 + 7}

func TestReadWrite(t *testing.T) {
	for _, structured := range []bool{false, true} {
		d := newRAM(8 << 20)
		c := dial(t, serveRAM(d), Options{})
		c.open("disk", structured)
		for i, n := range sizes {
			off := uint64(i * 1001)
			p := pattern(n, byte(i))
			c.want(0, 0, cmdWrite, off, uint32(n), p)
			c.request(cmdFlagDF*uint16(btoi(structured)), cmdRead, 5, off, uint32(n))
			r := c.reply(n)
			if structured {
				if r.typ != chunkOffsetData || r.flags != chunkFlagDone || r.data[:8] != u64(off) {
					t.Fatalf("chunk type %d flags %d", r.typ, r.flags)
				}
				r.data = r.data[8:]
			}
			if r.cookie != 5 || r.data != p {
				t.Fatalf("%d bytes at %d differ", n, off)
			}
		}
		c.disconnect()
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// A READ of holes and data is answered in chunks that together cover the range.
func TestReadHoles(t *testing.T) {
	d := newRAM(8 << 20)
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", true)
	c.want(0, 0, cmdWrite, 1<<20, 100_000, pattern(100_000, 3))
	c.want(0, 0, cmdWrite, 2<<20, 4096, pattern(4096, 4))

	read := func(off, n int) (data []byte, types []uint16) {
		c.request(0, cmdRead, 8, uint64(off), uint32(n))
		data = bytes.Repeat([]byte{0xee}, n)
		for {
			r := c.reply(0)
			if r.cookie != 8 || r.errno != 0 {
				t.Fatalf("chunk %+v", r)
			}
			types = append(types, r.typ)
			at := int(be.Uint64([]byte(r.data))) - off
			switch r.typ {
			case chunkOffsetData:
				copy(data[at:], r.data[8:])
			case chunkOffsetHole:
				clear(data[at:][:be.Uint32([]byte(r.data[8:]))])
			}
			if r.flags&chunkFlagDone != 0 {
				return data, types
			}
		}
	}
	for _, x := range []struct {
		off, n int
		types  string
	}{
		{0, 4 << 20, "[2 1 2 1 2]"},
		{1<<20 + 100, 70_000, "[1]"},
		{3 << 20, 1 << 20, "[2]"},
		{1<<20 - 10, 1 << 20, "[2 1 2]"},
	} {
		got, types := read(x.off, x.n)
		if !bytes.Equal(got, d.content()[x.off:][:x.n]) {
			t.Errorf("%d bytes at %d differ", x.n, x.off)
		}
		if fmt.Sprint(types) != x.types {
			t.Errorf("%d bytes at %d: chunks %v, want %s", x.n, x.off, types, x.types)
		}
	}
	if r := c.want(0, cmdFlagDF, cmdRead, 0, 4<<20); r.typ != chunkOffsetData || len(r.data) != 8+4<<20 {
		t.Errorf("DF: chunk type %d with %d bytes", r.typ, len(r.data))
	}
	// More extents than a reply has pieces.
	for off := 4 << 20; off < 5<<20; off += 8192 {
		d.WriteAt([]byte{1}, int64(off))
	}
	got, types := read(4<<20, 1<<20)
	if !bytes.Equal(got, d.content()[4<<20:][:1<<20]) || len(types) != maxPieces {
		t.Errorf("fragmented: %d pieces, or data differ", len(types))
	}
}

func TestBlockStatus(t *testing.T) {
	d := newRAM(8 << 20)
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", true)
	d.WriteAt(make([]byte, 8192), 1<<20)
	status := func(flags uint16, off uint64, n uint32) string {
		r := c.want(0, flags, cmdBlockStatus, off, n)
		if r.typ != chunkBlockStatus || r.flags != chunkFlagDone || r.data[:4] != u32(metaContextID(0)) {
			t.Fatalf("chunk %+v", r)
		}
		return r.data[4:]
	}
	hole := u32(stateHole | stateZero)
	data := u32(0)
	if got := status(0, 0, 8<<20); got != u32(1<<20)+hole+u32(8192)+data+u32(7<<20-8192)+hole {
		t.Errorf("all: %x", got)
	}
	if got := status(cmdFlagReqOne, 0, 8<<20); got != u32(1<<20)+hole {
		t.Errorf("REQ_ONE: %x", got)
	}
	if got := status(cmdFlagReqOne, 1<<20+5, 10); got != u32(10)+data {
		t.Errorf("unaligned: %x", got)
	}
	c.want(errnoInval, 0, cmdBlockStatus, 0, 0)
	c.want(errnoInval, 0, cmdBlockStatus, 8<<20, 1)
	c.disconnect()

	// A device that does not know its holes has none.
	c = dial(t, exportMap{"disk": {Device: struct{ Device }{d}}}, Options{})
	c.open("disk", true)
	if got := status(0, 0, 8<<20); got != u32(8<<20)+data {
		t.Errorf("no Extenter: %x", got)
	}
}

// The result is right even if an Extenter leaves gaps, reports overlapping extents, or goes beyond the range.
func TestExtents(t *testing.T) {
	for _, x := range []struct {
		in   []piece
		most int
		want string
	}{
		{nil, 9, "[{100 1000 0}]"},
		{[]piece{{100, 1000, 3}}, 9, "[{100 1000 3}]"},
		{[]piece{{0, 5000, 3}}, 9, "[{100 1000 3}]"},
		{[]piece{{200, 100, 3}}, 9, "[{100 100 0} {200 100 3} {300 800 0}]"},
		{[]piece{{200, 100, 3}}, 2, "[{100 100 0} {200 100 3}]"},
		{[]piece{{100, 100, 3}, {200, 100, 3}, {250, 100, 3}, {350, 1, 0}}, 9, "[{100 250 3} {350 750 0}]"},
		{[]piece{{100, 100, 3}, {200, 100, 0}, {300, 800, 3}}, 1, "[{100 100 3}]"},
		{[]piece{{2000, 10, 3}}, 9, "[{100 1000 0}]"},
	} {
		got, err := extents(fakeExtents(x.in), 100, 1000, x.most, nil)
		if err != nil || fmt.Sprint(got) != x.want {
			t.Errorf("%v: %v %v, want %s", x.in, got, err, x.want)
		}
	}
}

type fakeExtents []piece

func (f fakeExtents) Extents(_, _ int64, fn func(off, length int64, hole bool) bool) error {
	for _, p := range f {
		if !fn(p.off, p.length, p.hole()) {
			break
		}
	}
	return nil
}

func TestTrimAndZeroes(t *testing.T) {
	d := newRAM(1 << 20)
	var noHoles []bool
	d.onZero = func(_, _ int64, noHole bool) error { noHoles = append(noHoles, noHole); return nil }
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	for i := range d.data {
		d.data[i] = 9
	}
	c.want(0, cmdFlagFUA, cmdTrim, 4096, 4096)
	c.want(0, cmdFlagNoHole, cmdWriteZeroes, 16384, 100)
	c.want(0, cmdFlagFastZero, cmdWriteZeroes, 65536, 100)
	c.want(errnoNotSup, cmdFlagNoHole|cmdFlagFastZero, cmdWriteZeroes, 131072, 100) // not both
	c.want(0, 0, cmdWriteZeroes, 32768, 100)
	c.want(0, 0, cmdTrim, 0, 0)
	for i, b := range d.content() {
		zero := i >= 4096 && i < 8192 || i >= 16384 && i < 16484 || i >= 32768 && i < 32868 || i >= 65536 && i < 65636
		if zero != (b == 0) {
			t.Fatalf("byte %d is %d", i, b)
		}
	}
	if fmt.Sprint(noHoles) != "[false true false false]" {
		t.Errorf("noHole: %v", noHoles)
	}
	if n := d.flushes.Load(); n != 1 {
		t.Errorf("%d flushes, want the one of the FUA", n)
	}
	reads := 0
	d.onRead = func([]byte, int64) error { reads++; return nil }
	c.want(0, 0, cmdCache, 0, 1<<20)
	if reads == 0 {
		t.Error("CACHE read nothing")
	}
}

// With FUA, the reply comes after a flush that began after the write.
func TestFUA(t *testing.T) {
	d := newRAM(4 << 20)
	var written, flushed atomic.Bool
	d.onWrite = func([]byte, int64) error { written.Store(true); return nil }
	d.onFlush = func() error {
		time.Sleep(10 * time.Millisecond)
		flushed.Store(written.Load())
		return nil
	}
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	for _, n := range sizes {
		written.Store(false)
		flushed.Store(false)
		c.want(0, cmdFlagFUA, cmdWrite, 0, uint32(n), pattern(n, 1))
		if !flushed.Load() {
			t.Errorf("%d bytes: acknowledged before they were flushed", n)
		}
	}
	d.onFlush = func() error { return syscall.EIO }
	c.want(errnoIO, cmdFlagFUA, cmdWrite, 0, 512, pattern(512, 1))
	c.want(errnoIO, cmdFlagFUA, cmdWrite, 0, 1<<20, pattern(1<<20, 1))
	c.want(errnoIO, 0, cmdFlush, 0, 0)
}

// A flush that hangs delays only the requests that wait for it, however many there are.
func TestFlushHoldsUpNothing(t *testing.T) {
	d := newRAM(4 << 20)
	release := make(chan struct{})
	d.onFlush = func() error { <-release; return nil }
	c := dial(t, serveRAM(d), Options{Workers: 2})
	c.open("disk", false)
	for i := range 50 {
		c.request(0, cmdFlush, uint64(1000+i), 0, 0)
		c.request(cmdFlagFUA, cmdWrite, uint64(2000+i), 0, 1<<16, pattern(1<<16, 2))
	}
	for _, n := range sizes {
		c.want(0, 0, cmdWrite, 0, uint32(n), pattern(n, 9))
		c.want(0, 0, cmdRead, 0, uint32(n))
	}
	close(release)
	seen := map[uint64]bool{}
	for range 100 {
		seen[c.reply(0).cookie] = true
	}
	if len(seen) != 100 {
		t.Errorf("%d replies", len(seen))
	}
	if n := d.flushes.Load(); n > 50 {
		t.Errorf("%d flushes for 100 that wait at the same time", n)
	}
	c.disconnect()
}

// A flush request covers the writes acknowledged before it, even if a flush is already under way.
func TestFlushBeginsAfterRequest(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}, 10), make(chan struct{}, 10)
	d.onFlush = func() error { entered <- struct{}{}; <-release; return nil }
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", false)
	c.request(0, cmdFlush, 1, 0, 0)
	<-entered
	c.request(0, cmdFlush, 2, 0, 0)
	c.want(0, 0, cmdRead, 0, 512) // the second flush request is received by now
	release <- struct{}{}
	if r := c.reply(0); r.cookie != 1 {
		t.Fatalf("reply to %d", r.cookie)
	}
	testwatch.Wait(t, testwatch.Long, "the second flush of the device", entered)
	release <- struct{}{}
	if r := c.reply(0); r.cookie != 2 {
		t.Fatalf("reply to %d", r.cookie)
	}
}

// Slow requests are executed at the same time, up to Workers of them, and answered in the order in which they end.
func TestOutOfOrder(t *testing.T) {
	const workers = 8
	d := newRAM(8 << 20)
	var now, most atomic.Int64
	gate := make(chan struct{})
	d.onRead = func(_ []byte, off int64) error {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if off == 0 {
			<-gate
		}
		return nil
	}
	c := dial(t, serveRAM(d), Options{Workers: workers})
	c.open("disk", false)
	const big = inlineMax + 1
	for i := range workers - 1 { // one worker stays free
		c.request(0, cmdRead, uint64(i), 0, big)
	}
	for i := range 20 {
		c.request(0, cmdRead, uint64(100+i), 4096, big)
	}
	for i := range 20 {
		if r := c.reply(big); r.cookie != uint64(100+i) {
			t.Fatalf("reply to %d", r.cookie)
		}
	}
	for i := range 5 {
		c.request(0, cmdRead, uint64(200+i), 0, big)
	}
	time.Sleep(20 * time.Millisecond)
	close(gate)
	for range workers - 1 + 5 {
		c.reply(big)
	}
	if most.Load() != workers {
		t.Errorf("%d requests at a time, want %d", most.Load(), workers)
	}
	c.disconnect()
}

// sleepy is a device that takes time for a part of its reads.
type sleepy struct {
	Device
	try    func(p []byte, off int64) (bool, error)
	begun  atomic.Int64
	waited atomic.Int64
}

func (d *sleepy) TryReadAt(p []byte, off int64) (bool, error) {
	done, err := d.try(p, off)
	if !done && err == nil {
		clear(p) // it is arbitrary
		d.begun.Add(1)
	}
	return done, err
}

func (d *sleepy) ReadAt(p []byte, off int64) (int, error) {
	d.waited.Add(1)
	return d.Device.ReadAt(p, off)
}

// Small reads that have to wait begin in the order of their arrival, and do not delay reads that need not wait.
func TestTryReader(t *testing.T) {
	ram := newRAM(1 << 20)
	for i := range ram.data {
		ram.data[i] = byte(i / 512)
	}
	const slow, bad = 16 << 10, 32 << 10
	gate := make(chan struct{})
	ram.onRead = func(_ []byte, off int64) error {
		if off == slow {
			<-gate
		}
		return nil
	}
	d := &sleepy{Device: struct{ Device }{ram}}
	d.try = func(p []byte, off int64) (bool, error) {
		switch off {
		case slow:
			return false, nil
		case bad:
			return false, syscall.ENOMEM
		}
		_, err := ram.ReadAt(p, off)
		return true, err
	}
	c := dial(t, exportMap{"disk": {Device: d}}, Options{})
	c.open("disk", false)
	for i := range 5 {
		c.request(0, cmdRead, uint64(100+i), slow, 4096)
	}
	for off := 0; off < slow; off += 4096 {
		c.want(0, 0, cmdRead, uint64(off), 4096)
	}
	c.want(errnoNoMem, 0, cmdRead, bad, 512)
	if d.begun.Load() != 5 {
		t.Errorf("%d reads were begun", d.begun.Load())
	}
	close(gate)
	for range 5 {
		if r := c.reply(4096); r.errno != 0 || r.cookie < 100 || r.data != string(ram.data[slow:][:4096]) {
			t.Errorf("reply %+v", r)
		}
	}
	if d.waited.Load() != 5 {
		t.Errorf("%d reads waited", d.waited.Load())
	}
	c.disconnect()
}

// Reads return what was written, with one request at a time and with many at once.
func TestPipelining(t *testing.T) {
	d := newRAM(1 << 20)
	c := dial(t, serveRAM(d), Options{})
	c.open("disk", true)
	rng := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, 1<<20)
	var out bytes.Buffer
	for round := range 50 {
		out.Reset()
		n := 1 + rng.IntN(100)
		for i := range n { // ranges that do not overlap, since the order of what is in flight is free
			size := 1 + rng.IntN(10000)
			p := pattern(size, byte(round+i))
			off := i * 10000
			copy(model[off:], p)
			out.WriteString(reqBytes(0, cmdWrite, uint64(i), uint64(off), uint32(size)) + p)
		}
		// In pieces that do not respect requests.
		var sent sync.WaitGroup
		sent.Go(func() {
			for b := out.Bytes(); len(b) > 0; {
				k := min(len(b), 1+rng.IntN(50000))
				c.Write(b[:k])
				b = b[k:]
			}
		})
		for range n {
			if r := c.reply(0); r.errno != 0 {
				t.Fatalf("reply %+v", r)
			}
		}
		sent.Wait()
	}
	if !bytes.Equal(d.content(), model) {
		t.Fatal("data differ")
	}
	c.disconnect()
}

func TestDeviceErrors(t *testing.T) {
	d := newRAM(1 << 20)
	for i := range d.present { // no hole that is told without a read
		d.present[i] = true
	}
	var fail error
	d.onRead = func([]byte, int64) error { return fail }
	d.onWrite = func([]byte, int64) error { return fail }
	d.onFlush = func() error { return fail }
	d.onZero = func(int64, int64, bool) error { return fail }
	for _, structured := range []bool{false, true} {
		c := dial(t, serveRAM(d), Options{})
		c.open("disk", structured)
		for _, x := range []struct {
			err  error
			want uint32
		}{
			{syscall.ENOSPC, errnoNoSpace},
			{syscall.EDQUOT, errnoNoSpace},
			{syscall.EFBIG, errnoNoSpace},
			{syscall.EPERM, errnoPerm},
			{syscall.EROFS, errnoPerm},
			{syscall.EINVAL, errnoInval},
			{syscall.ENOMEM, errnoNoMem},
			{syscall.EOVERFLOW, errnoOverflow},
			{syscall.EOPNOTSUPP, errnoNotSup},
			{fmt.Errorf("volume: %w", syscall.ESHUTDOWN), errnoShutdown},
			{syscall.EBUSY, errnoIO},
			{errors.New("anything"), errnoIO},
		} {
			fail = x.err
			c.want(x.want, 0, cmdRead, 0, 512)
			c.want(x.want, 0, cmdRead, 0, 1<<19)
			c.want(x.want, 0, cmdWrite, 0, 512, pattern(512, 0))
			c.want(x.want, cmdFlagFUA, cmdWrite, 0, 1<<19, pattern(1<<19, 0))
			c.want(x.want, 0, cmdFlush, 0, 0)
			c.want(x.want, 0, cmdTrim, 0, 512)
			c.want(x.want, 0, cmdWriteZeroes, 0, 512)
			c.want(x.want, 0, cmdCache, 0, 512)
		}
		fail = nil
		c.alive()
	}
}
