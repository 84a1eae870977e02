package nbd

import (
	"context"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// deviceFault is what happens at one call of the device.
type deviceFault struct {
	name  string
	err   error
	short bool
	panic bool
	late  bool
	errno uint32 // that the client gets; 0: it notices nothing
}

var deviceFaults = []deviceFault{
	{name: "EIO", err: syscall.EIO, errno: errnoIO},
	{name: "ENOSPC", err: syscall.ENOSPC, errno: errnoNoSpace},
	{name: "ENOMEM", err: syscall.ENOMEM, errno: errnoNoMem},
	{name: "EINTR", err: syscall.EINTR, errno: errnoIO},
	{name: "EOF", err: io.EOF, errno: errnoIO},
	{name: "panic", panic: true, errno: errnoIO},
	{name: "short", short: true, errno: errnoIO},
	{name: "late", late: true},
}

// faultyHandle is the victim's handle on the device. The nth call fails.
type faultyHandle struct {
	*faultDevice
	deviceFault
	nth     int
	entered chan struct{} // closed when a late call has begun
	release chan struct{}

	mu    sync.Mutex // guards what follows
	calls int
	fired bool
	call  string
	off   int64
}

// hit counts a call, and fails it if it is the one. A call that is short is the caller's to make.
func (h *faultyHandle) hit(call string, off int64) (short bool, err error) {
	h.mu.Lock()
	h.calls++
	if h.calls != h.nth {
		h.mu.Unlock()
		return false, nil
	}
	h.fired, h.call, h.off = true, call, off
	h.mu.Unlock()
	switch {
	case h.late:
		close(h.entered)
		<-h.release
	case h.panic:
		panic("as planned")
	case h.short && (call == "read" || call == "write"):
		return true, nil
	case h.short:
		return false, syscall.EIO
	}
	return false, h.err
}

func (h *faultyHandle) ReadAt(p []byte, off int64) (int, error) {
	short, err := h.hit("read", off)
	if err != nil {
		return 0, err
	}
	if short {
		p = p[:len(p)-1]
	}
	return h.ramDevice.ReadAt(p, off)
}

func (h *faultyHandle) WriteAt(p []byte, off int64) (int, error) {
	short, err := h.hit("write", off)
	if err != nil {
		return 0, err
	}
	if short {
		p = p[:len(p)-1]
	}
	return h.ramDevice.WriteAt(p, off)
}

func (h *faultyHandle) Flush() error {
	if _, err := h.hit("flush", 0); err != nil {
		return err
	}
	return h.faultDevice.Flush()
}

func (h *faultyHandle) Discard(off, n int64) error {
	if _, err := h.hit("discard", off); err != nil {
		return err
	}
	return h.ramDevice.Discard(off, n)
}

func (h *faultyHandle) WriteZeroes(off, n int64, noHole bool) error {
	if _, err := h.hit("zero", off); err != nil {
		return err
	}
	return h.ramDevice.WriteZeroes(off, n, noHole)
}

func (h *faultyHandle) Extents(off, n int64, fn func(off, length int64, hole bool) bool) error {
	if _, err := h.hit("extents", off); err != nil {
		return err
	}
	return h.ramDevice.Extents(off, n, fn)
}

// triedHandle is a faultyHandle that is a TryReader, too.
type triedHandle struct{ *faultyHandle }

func (h triedHandle) TryReadAt(p []byte, off int64) (bool, error) {
	if off == 16<<10 { // it would have to wait
		return false, nil
	}
	n, err := h.ReadAt(p, off)
	return n == len(p), err
}

// concerns reports whether a request made, or waited for, the call that failed.
func (h *faultyHandle) concerns(r faultRequest) bool {
	if h.call == "flush" {
		return r.flushes()
	}
	inRange := h.off >= int64(r.off) && h.off < int64(r.off)+int64(r.length)
	return inRange && r.errno == 0
}

// TestFaultAtEveryDeviceCall: the nth call that a client's requests make to the device fails, is short, panics, or
// takes long, for every n, with many requests in flight. That request gets the error, and no other does.
// VDISK_FAULTS=all runs every n.
func TestFaultAtEveryDeviceCall(t *testing.T) {
	count := 0
	seed := int(time.Now().UnixNano() >> 10 & 0xffff)
	t.Logf("seed %d", seed)
	var handle Device
	s := newFaultServer(t, newFaultDevice(), func() Device { return handle }, Options{Workers: 4})
	for _, tried := range []bool{false, true} {
		for _, how := range handshakes[:3] {
			for i, fault := range deviceFaults {
				step, first := 1, 1
				if !allFaults() {
					step = 9
					if testing.Short() {
						step = 31
					}
					first = 1 + (seed+i*5)%step
				}
				for nth := first; s.deviceRun(t, &handle, tried, how, fault, nth); nth += step {
					count++
				}
				if t.Failed() {
					return
				}
			}
		}
	}
	s.other.disconnect()
	t.Logf("proof: faults below NBD: %d", count)
}

// deviceRun runs the script once, and reports whether the fault came.
func (s *faultServer) deviceRun(t *testing.T, handle *Device, tried bool, how handshake, fault deviceFault, nth int) bool {
	t.Helper()
	s.disk.reset()
	h := &faultyHandle{faultDevice: s.disk, deviceFault: fault, nth: nth, entered: make(chan struct{}), release: make(chan struct{})}
	*handle = h
	if tried {
		*handle = triedHandle{h}
	}
	client, server := connPair(t)
	v := &victim{Conn: client, disk: s.disk, how: how}
	served, ended := make(chan error, 1), make(chan bool, 1)
	go func() { served <- s.ServeConn(context.Background(), server) }()
	go func() { ended <- v.run() }()
	if fault.late {
		select {
		case <-h.entered:
			s.goesOn(t, nth)
			close(h.release)
		case whole := <-ended:
			ended <- whole
		}
	}
	s.goesOn(t, nth+1)
	whole := testwatch.Wait(t, testwatch.Long, "the client", ended)
	if err := testwatch.Wait(t, testwatch.Long, "the connection", served); err != nil || !whole {
		t.Errorf("the connection ended with %v after %d replies", err, len(v.got))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	concerned := 0
	for _, r := range v.script {
		want, got := r.errno, v.got[r.cookie]
		if h.fired && h.concerns(r) && fault.errno != 0 && got == fault.errno {
			concerned++
			continue
		}
		if got != want {
			t.Errorf("request %d: error %d, want %d", r.cookie, got, want)
		}
	}
	if h.fired && fault.errno != 0 && (concerned == 0 || concerned > 1 && h.call != "flush") && !(tried && fault.short) {
		t.Errorf("%d requests got the error", concerned)
	}
	if !fault.short {
		v.check(t)
	}
	s.nothingLeft(t, nil)
	if t.Failed() {
		t.Fatalf("%s at call %d (%s at %d), %s, tried: %v", fault.name, nth, h.call, h.off, how.name, tried)
	}
	return h.fired
}
