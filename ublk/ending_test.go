package ublk

import (
	"context"
	"errors"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// slowDriver is a driver of one device that waits to be recovered. It answers nothing before answer is closed.
type slowDriver struct {
	asked   chan struct{} // gets one for each command, as far as there is room
	answer  chan struct{}
	resized atomic.Bool
}

func newSlowDriver() *slowDriver {
	return &slowDriver{asked: make(chan struct{}, 1), answer: make(chan struct{})}
}

func (s *slowDriver) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	switch op {
	case cmdGetFeatures:
		*(*uint64)(buf) = ^uint64(0)
		return 0, nil
	case cmdUpdateSize:
		s.resized.Store(true)
	}
	select {
	case s.asked <- struct{}{}:
	default:
	}
	select {
	case <-s.answer:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if op == cmdGetDevInfo2 {
		*(*devInfo)(unsafe.Add(buf, charPathSize)) = devInfo{devID: cmd.devID, state: uint16(KernelQuiesced)}
	}
	return 0, nil
}

// TestNothingBeginsAtTheEnd: while the queues have ended and the fate of the disk is not decided yet, no further
// attempt to end the device begins. Close still decides that the disk goes, and Resize does not touch a disk that may
// be gone.
func TestNothingBeginsAtTheEnd(t *testing.T) {
	t.Run("Stop and Quiesce", func(t *testing.T) {
		testNothingBegins(t, StateQuiesced, (*Device).Stop, (*Device).Quiesce)
	})
	t.Run("Close", func(t *testing.T) { testNothingBegins(t, StateDead, (*Device).Close, (*Device).Stop) })
}

func testNothingBegins(t *testing.T, want State, ends ...func(*Device, context.Context) error) {
	s := newSlowDriver()
	d := newDevice(newControl(s), &devInfo{devID: 1 << 19, flags: uint64(FeatureUserRecovery | FeatureRecoveryReissue | FeatureUpdateSize)},
		^Feature(0), Options{Size: 1 << 20}.withDefaults(), StateLive)
	close(d.started)
	broken := errors.New("the ring broke")
	d.err = broken
	go d.superviseRoutine()
	<-s.asked // there are no queues, so all have ended

	if err := d.Resize(t.Context(), 2<<20); !errors.Is(err, ErrBusy) || s.resized.Load() {
		t.Errorf("Resize: %v; the driver was asked: %v", err, s.resized.Load())
	}
	ended := make(chan error, len(ends))
	for _, end := range ends {
		go func() { ended <- end(d, t.Context()) }()
	}
	time.Sleep(50 * time.Millisecond) // for these to begin
	if got := d.State(); got != StateLive {
		t.Errorf("the device is %v", got)
	}
	close(s.answer)
	for range ends {
		if err := <-ended; !errors.Is(err, broken) {
			t.Errorf("an end: %v", err)
		}
	}
	<-d.Done()
	if got := d.State(); got != want {
		t.Errorf("in the end the device is %v, want %v", got, want)
	}
}

// waitingDriver has a STOP that waits for a request of a server that has ended. The driver fails that request when the
// char device, here one end of a pipe, is closed.
type waitingDriver struct {
	char  *os.File
	asked chan struct{} // closed when STOP has begun
}

func (w *waitingDriver) run(_ context.Context, op uint32, _ ctrlCmd, buf unsafe.Pointer) (int32, error) {
	switch op {
	case cmdGetFeatures:
		*(*uint64)(buf) = uint64(FeatureIoctlEncode)
	case cmdStopDev:
		close(w.asked)
		_, _ = w.char.Read(make([]byte, 1))
	}
	return 0, nil
}

// TestQueuesBreakInStop: the char device is closed even if the STOP of Close has not returned, because STOP may wait
// for that.
func TestQueuesBreakInStop(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	w := &waitingDriver{char: os.NewFile(uintptr(pipe[0]), "pipe"), asked: make(chan struct{})}
	defer w.char.Close()
	d := newDevice(newControl(w), &devInfo{devID: 1 << 19}, FeatureIoctlEncode, Options{Size: 1 << 20}.withDefaults(), StateLive)
	d.charFD = pipe[1]
	close(d.started)
	closed := make(chan error, 1)
	go func() { closed <- d.Close(t.Context()) }()
	<-w.asked
	broken := errors.New("the ring broke")
	d.mu.Lock()
	d.err = broken
	d.mu.Unlock()
	go d.superviseRoutine() // there are no queues, so all have ended
	err := testwatch.Wait(t, testwatch.Long, "the end of the device, which must not wait for STOP", closed)
	if !errors.Is(err, broken) || d.State() != StateDead {
		t.Errorf("%v: %v", d.State(), err)
	}
}

// heldDriver has a device 1 that some process holds. Its DEL does not end until it is given up.
type heldDriver struct {
	asked   chan struct{} // closed when the DEL of device 1 has begun
	deleted atomic.Uint32
	signals atomic.Int32 // DELs of other devices that are interrupted first
}

func (h *heldDriver) run(ctx context.Context, op uint32, cmd ctrlCmd, buf unsafe.Pointer) (int32, error) {
	switch {
	case op == cmdGetFeatures:
		*(*uint64)(buf) = uint64(FeatureIoctlEncode)
	case op == cmdDelDev && cmd.devID == 1:
		close(h.asked)
		<-ctx.Done()
		return 0, ctx.Err()
	case op == cmdDelDev && h.signals.Add(-1) >= 0:
		return -int32(unix.EINTR), nil
	case op == cmdDelDev:
		h.deleted.Add(1)
	}
	return 0, nil
}

// TestDeletionsDoNotWait: a device that some process holds does not delay the deletion of others, and callers learn of
// deletions that have not been completed.
func TestDeletionsDoNotWait(t *testing.T) {
	h := &heldDriver{asked: make(chan struct{})}
	c := newControl(h)
	device := func(id uint32) *Device {
		return newDevice(c, &devInfo{devID: id}, FeatureIoctlEncode, Options{Size: 1 << 20}.withDefaults(), StateLive)
	}
	held := make(chan error, 1)
	go func() { held <- device(1).remove(t.Context()) }()
	<-h.asked
	for id := range uint32(3) {
		h.signals.Store(int32(id)) // a DEL that was cancelled has left them
		if err := device(2 + id).remove(t.Context()); err != nil || h.deleted.Load() != 1+id {
			t.Errorf("device %d: %v; %d were deleted", 2+id, err, h.deleted.Load())
		}
	}
	if err := <-held; !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "goes when its last user closes it") {
		t.Errorf("the device that is held: %v", err)
	}
}

// TestFailedStartKeepsNoMemory: a device that fails after its queues have fetched gives its buffers back when its
// threads are gone. Before Linux 6.15 every recovery begins with such a try.
func TestFailedStartKeepsNoMemory(t *testing.T) {
	needNullCommands(t)
	status := func(field string) (kib int) {
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), field+":")
		if kib, err = strconv.Atoi(strings.Fields(rest)[0]); err != nil {
			t.Fatal(err)
		}
		return kib
	}
	// The Go heap's free memory is given back first. Otherwise the runtime does it at some time between two counts.
	anonymous := func() (kib int) {
		debug.FreeOSMemory()
		return status("RssAnon")
	}
	locked := 0
	for _, features := range []Feature{0, FeatureUserRecovery | FeatureRecoveryReissue, FeatureBatchIO} {
		s := newSlowDriver()
		close(s.answer)
		const depth, size = 64, 512 << 10
		o := Options{Size: 1 << 20, Queues: 2, Depth: depth, MaxIOBytes: size, NoAffinity: true}.withDefaults()
		d := newDevice(newControl(s), &devInfo{devID: 1 << 19, flags: uint64(features)}, ^Feature(0), o, StateRecovering)
		var err error
		if d.charFD, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		before := anonymous()
		if err := d.makeQueues(t.Context(), handlerFunc(func(*Request) error { return nil })); err != nil {
			t.Fatal(err)
		}
		const buffers = 2 * depth * size >> 10
		if got := anonymous() - before; got < buffers*7/8 { // the kernel's count is not exact
			t.Fatalf("%d KiB more are resident, and the buffers have %d", got, buffers)
		}
		err = d.startQueues() // /dev/null takes the fetches, and cannot be mapped
		if err == nil {
			t.Fatal("it started")
		}
		d.abandon(err)
		if got := anonymous() - before; got > buffers/4 {
			t.Errorf("features %v: %d KiB of %d stay", FeatureSet{Bits: features}.Names(), got, buffers)
		}
		if got := status("VmLck"); locked > 0 && got > locked {
			t.Errorf("features %v: %d KiB are locked, and were %d", FeatureSet{Bits: features}.Names(), got, locked)
		}
		locked = status("VmLck") // what every ring shares is there from the first on
	}
}
