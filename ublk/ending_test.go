package ublk

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
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

// TestNothingBeginsAtTheEnd: when the queues have ended, and it is not settled yet what becomes of the disk, no attempt begins
// to end the device a second time, though Close has its say, and Resize leaves alone what may be gone.
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
	<-s.asked // the queues, of which there are none, have ended

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
