package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// plainDisk has only the required methods.
type plainDisk struct {
	mu   sync.Mutex
	data []byte
}

func (d *plainDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.NewReader(d.data).ReadAt(p, off)
}

func (d *plainDisk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], p), nil
}

// fullDisk has all methods, and records the calls.
type fullDisk struct {
	plainDisk
	calls []string
	err   error
}

func (d *fullDisk) note(format string, args ...any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
	return d.err
}

func (d *fullDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.note("write %d+%d", off, len(p)); err != nil {
		return 0, err
	}
	return d.plainDisk.WriteAt(p, off)
}
func (d *fullDisk) Sync() error                    { return d.note("sync") }
func (d *fullDisk) Discard(off, n int64) error     { return d.note("discard %d+%d", off, n) }
func (d *fullDisk) WriteZeroes(off, n int64) error { return d.note("zero %d+%d", off, n) }

func adapt(t *testing.T, rw ReaderWriterAt, workers int, report func(error)) (*Adapter, *fakeQueue) {
	a := NewReaderWriterAt(rw, workers)
	t.Cleanup(func() { _ = a.Close() }) // after the queue's end
	return a, runFake(t, CopyPlain, 8, a, report)
}

func TestAdapterCalls(t *testing.T) {
	const big = 2*fakeIOMax + 4096
	for _, c := range []struct {
		d     ioDesc
		want  string
		plain syscall.Errno // what a disk answers that has no more than it must
	}{
		{desc(OpRead, 0, 0, 4096), "[]", 0},
		{desc(OpWrite, 0, 4096, 8192), "[write 4096+8192]", 0},
		{desc(OpWrite, flagFUA, 0, 512), "[write 0+512 sync]", 0},
		{desc(OpFlush, 0, 0, 0), "[sync]", 0},
		{desc(OpDiscard, 0, 0, 1<<20), "[discard 0+1048576]", syscall.EOPNOTSUPP},
		{desc(OpWriteZeroes, 0, 0, big), fmt.Sprintf("[zero 0+%d]", big), 0},
		{desc(OpWriteZeroes, flagFUA, 0, 512), "[zero 0+512 sync]", 0},
		{desc(OpWriteZeroes, flagNoUnmap, 512, big), "[write 512+65536 write 66048+65536 write 131584+4096]", 0},
	} {
		full := &fullDisk{plainDisk: plainDisk{data: make([]byte, 1<<20)}}
		_, q := adapt(t, full, 2, nil)
		want := int32(0)
		if op := Op(c.d.opFlags & 0xff); op == OpRead || op == OpWrite {
			want = int32(c.d.sectors << 9)
		}
		if res := q.do(t, c.d); res != want || fmt.Sprint(full.calls) != c.want {
			t.Errorf("%+v: result %d, calls %v; want %d, %s", c.d, res, full.calls, want, c.want)
		}
		if c.plain != 0 {
			want = -int32(c.plain)
		}
		_, q = adapt(t, &plainDisk{data: make([]byte, 1<<20)}, 2, nil)
		if res := q.do(t, c.d); res != want {
			t.Errorf("%+v on a plain disk: result %d, want %d", c.d, res, want)
		}
	}
}

func TestAdapterData(t *testing.T) {
	d := &plainDisk{data: bytes.Repeat([]byte{7}, 1<<20)}
	_, q := adapt(t, d, 2, nil)
	for tag := range q.requests {
		for i := range q.requests[tag].full {
			q.requests[tag].full[i] = byte(tag + 1)
		}
	}
	tag := q.kernel.dispatch(desc(OpWrite, 0, 4096, 4096))
	<-q.kernel.results
	if want := bytes.Repeat([]byte{byte(tag + 1)}, 4096); !bytes.Equal(d.data[4096:8192], want) {
		t.Error("the write's bytes did not arrive")
	}
	q.do(t, desc(OpWriteZeroes, 0, 8192, 3*fakeIOMax))
	zeroes := make([]byte, 3*fakeIOMax)
	if !bytes.Equal(d.data[8192:][:len(zeroes)], zeroes) || d.data[8192+len(zeroes)] != 7 || d.data[8191] == 0 {
		t.Error("the zeros are not where they should be")
	}
	tag = q.kernel.dispatch(desc(OpRead, 0, 0, 4096))
	<-q.kernel.results
	if !bytes.Equal(q.requests[tag].full[:4096], d.data[:4096]) {
		t.Error("the read's bytes did not arrive")
	}
}

func TestAdapterErrors(t *testing.T) {
	d := &fullDisk{plainDisk: plainDisk{data: make([]byte, 8192)}, err: fmt.Errorf("no: %w", syscall.ENOSPC)}
	_, q := adapt(t, d, 1, nil)
	for _, x := range []ioDesc{
		desc(OpWrite, 0, 0, 512), desc(OpFlush, 0, 0, 0), desc(OpDiscard, 0, 0, 512),
		desc(OpWriteZeroes, 0, 0, 512), desc(OpWriteZeroes, flagNoUnmap, 0, 512),
	} {
		if res := q.do(t, x); res != -int32(syscall.ENOSPC) {
			t.Errorf("%+v: result %d, want ENOSPC", x, res)
		}
	}
	if res := q.do(t, desc(OpRead, 0, 4096, 8192)); res != -int32(syscall.EIO) {
		t.Errorf("read over the end: result %d, want EIO", res)
	}
	if res := q.do(t, desc(OpRead, 0, 4096, 4096)); res != 4096 {
		t.Errorf("read up to the end: result %d", res)
	}
	short := &plainDisk{data: make([]byte, 512)}
	_, q = adapt(t, short, 1, nil)
	if res := q.do(t, desc(OpWrite, 0, 0, 1024)); res != -int32(syscall.EIO) {
		t.Errorf("short write: result %d, want EIO", res)
	}
}

type panickingDisk struct{ plainDisk }

func (*panickingDisk) ReadAt([]byte, int64) (int, error) { panic("broken") }

func TestAdapterPanic(t *testing.T) {
	reports := make(chan error, 1)
	_, q := adapt(t, &panickingDisk{plainDisk{data: make([]byte, 4096)}}, 1, func(err error) { reports <- err })
	if res := q.do(t, desc(OpRead, 0, 0, 512)); res != -int32(syscall.EIO) {
		t.Errorf("result %d, want EIO", res)
	}
	var p *PanicError
	if err := <-reports; !errors.As(err, &p) || p.Value != "broken" {
		t.Errorf("reported %v", err)
	}
	if res := q.do(t, desc(OpWrite, 0, 0, 512)); res != 512 {
		t.Errorf("after the panic: result %d", res)
	}
}

// slowDisk reports the beginning of each read, and delays the end until the test allows it.
type slowDisk struct {
	plainDisk
	begun, end chan int64
}

func (d *slowDisk) ReadAt(p []byte, off int64) (int, error) {
	d.begun <- off
	<-d.end
	return len(p), nil
}

// Three workers serve three requests at once, in the order of their arrival, and the queue goes on meanwhile.
func TestAdapterIsBounded(t *testing.T) {
	d := &slowDisk{begun: make(chan int64, 8), end: make(chan int64)}
	_, q := adapt(t, d, 3, nil)
	for i := range 8 {
		q.kernel.dispatch(desc(OpRead, 0, int64(i)<<12, 4096))
	}
	first := []int64{<-d.begun, <-d.begun, <-d.begun}
	slices.Sort(first)
	if !slices.Equal(first, []int64{0, 4096, 8192}) {
		t.Errorf("begun with %v", first)
	}
	select {
	case off := <-d.begun:
		t.Errorf("a fourth read, at %d, beside three", off)
	case <-time.After(50 * time.Millisecond):
	}
	for i := int64(3); i < 8; i++ {
		d.end <- 0
		if off := <-d.begun; off != i<<12 {
			t.Errorf("read %d is at %d", i, off)
		}
	}
	close(d.end)
	for range 8 {
		<-q.kernel.results
	}
}

func TestAdapterClose(t *testing.T) {
	d := &slowDisk{begun: make(chan int64, 8), end: make(chan int64)}
	a, q := adapt(t, d, 1, nil)
	q.kernel.dispatch(desc(OpRead, 0, 0, 4096))
	q.kernel.dispatch(desc(OpRead, 0, 4096, 4096))
	<-d.begun
	closed := make(chan error)
	go func() { closed <- a.Close() }()
	select {
	case <-closed:
		t.Error("Close did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	close(d.end)
	for range 2 {
		if r := <-q.kernel.results; r.res != 4096 {
			t.Errorf("a request from before Close: result %d", r.res)
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if res := q.do(t, desc(OpRead, 0, 0, 4096)); res != -int32(syscall.ESHUTDOWN) {
		t.Errorf("a request after Close: result %d, want ESHUTDOWN", res)
	}
	if err := a.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}

func TestAdapterDoesNotAllocate(t *testing.T) {
	a := &Adapter{rw: &plainDisk{data: make([]byte, 4096)}}
	a.work.L = &a.mu
	q := newQueue(CopyPlain, 0, 1, 4096, make([]byte, 4096), nil, a, nil)
	r := &q.requests[0]
	r.Op, r.Buf = OpWrite, r.full
	if n := testing.AllocsPerRun(100, func() {
		if err := a.ServeUBLK(r); !errors.Is(err, ErrAsync) {
			t.Fatal(err)
		}
		if err := a.serve(a.take()); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

var _ io.Closer = (*Adapter)(nil)
