package cow

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// TestEventDuringClose closes the store while an event waits for a chunk.
func TestEventDuringClose(t *testing.T) {
	lost, hung := 0, 0
	for range 10 {
		dir := setup(t, 64<<20, format.Raw)
		fs := newHook(t, dir)
		entered, gate := make(chan struct{}), make(chan struct{})
		var once sync.Once
		fs.onCreate = func(string) error { once.Do(func() { close(entered); <-gate }); return nil }
		s := open(t, dir, Options{fs: fs, checkpointInterval: -1})
		snapped, closed := make(chan error, 1), make(chan error, 1)
		go func() { snapped <- s.Snapshot(Ref{"v", "a"}) }()
		<-entered
		go func() { closed <- s.Close() }()
		time.Sleep(20 * time.Millisecond)
		close(gate)
		var serr error
		select {
		case serr = <-snapped:
		case <-time.After(2 * time.Second):
			hung++
			continue
		}
		cerr := <-closed
		s2 := open(t, dir, Options{checkpointInterval: -1})
		v, err := s2.Volume("v")
		must(t, err)
		if serr == nil && len(v.Snapshots) == 0 {
			lost++
		}
		if serr != nil && !errors.Is(serr, ErrClosed) || cerr != nil {
			t.Logf("snapshot: %v; close: %v; there afterwards: %d", serr, cerr, len(v.Snapshots))
		}
		must(t, s2.Close())
	}
	if lost+hung > 0 {
		t.Errorf("of 10 snapshots during Close %d were said to be durable and are lost, %d hang", lost, hung)
	}
}

// within fails the test if fn hangs.
func within(t *testing.T, what string, fn func() error) (err error) {
	t.Helper()
	testwatch.Do(t, testwatch.Long, what, func() { err = fn() })
	return err
}

// calls returns all methods of a store and of a device that return an error.
func calls(s *Store, d, ro *Device) map[string]func() error {
	ctx := context.Background()
	v, a := Ref{Volume: "v"}, Ref{"v", "a"}
	p := make([]byte, 4096)
	each := func(int64, int64, bool) bool { return true }
	return map[string]func() error{
		"create":     func() error { _, err := s.CreateVolume("w", VolumeOptions{Size: 1 << 20}); return err },
		"snapshot":   func() error { return s.Snapshot(Ref{"v", "b"}) },
		"clone":      func() error { return s.Clone(a, "c") },
		"rollback":   func() error { return s.Rollback(a) },
		"rename":     func() error { return s.Rename(v, Ref{Volume: "x"}) },
		"resize":     func() error { return s.Resize("v", 128<<20, false) },
		"shrink":     func() error { return s.Resize("v", 1<<20, true) },
		"remove":     func() error { return s.Remove(a, false) },
		"volume":     func() error { _, err := s.Volume("v"); return err },
		"check":      func() error { _, err := s.Check(ctx, CheckOptions{}, func(Problem) {}); return err },
		"checkpoint": s.Checkpoint,
		"clean":      func() error { _, err := s.Clean(ctx, 0.1); return err },
		"cold":       func() error { _, err := s.Cold(ctx); return err },
		"scrub":      func() error { _, err := s.Scrub(ctx, ScrubOptions{Rate: -1}); return err },
		"open":       func() error { _, err := s.OpenDevice(v, false); return err },
		"usage":      func() error { _, err := s.Usage(ctx); return err },
		"room":       func() error { _, err := s.Room(); return err },
		"close":      s.Close,

		"device write":    func() error { _, err := d.WriteAt(p, 0); return err },
		"device part":     func() error { _, err := d.WriteAt(p[:100], 70); return err },
		"device read":     func() error { _, err := d.ReadAt(p, 0); return err },
		"device try":      func() error { _, err := d.TryReadAt(p, 0); return err },
		"device plan":     func() error { return d.PlanRead(new(ReadPlan), p, 0) },
		"device extents":  func() error { return d.Extents(0, 4096, each) },
		"device discard":  func() error { return d.Discard(0, 4096) },
		"device zeroes":   func() error { return d.WriteZeroes(0, 4096, false) },
		"device flush":    d.Flush,
		"device close":    d.Close,
		"snapshot read":   func() error { _, err := ro.ReadAt(p, 0); return err },
		"snapshot write":  func() error { _, err := ro.WriteAt(p, 0); return err },
		"snapshot closed": ro.Close,
	}
}

// withDevices returns a store with a volume and its snapshot, both open, and with a chunk made in advance.
func withDevices(t *testing.T, o Options) (s *Store, d, ro *Device) {
	s, _ = newStore(t, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	must(t, s.Snapshot(Ref{"v", "a"}))
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	ro, err = s.OpenDevice(Ref{"v", "a"}, false)
	must(t, err)
	for i := range int64(3) {
		_, err = d.WriteAt(randomBytes(1<<20, uint64(i+1)), i<<20)
		must(t, err)
	}
	s.wal.WaitIdle()
	return s, d, ro
}

// TestCallsAfterClose: after Close, all calls are refused at once, even if the log's buffers were shared memory, which
// is gone.
func TestCallsAfterClose(t *testing.T) {
	for name, o := range map[string]Options{
		"heap":   {checkpointInterval: -1, chunkBytes: 4 << 20},
		"shared": {checkpointInterval: -1, chunkBytes: 4 << 20, Outlive: true, SharedMemory: t.TempDir()},
		"idle":   {checkpointInterval: -1},
	} {
		t.Run(name, func(t *testing.T) {
			s, d, ro := withDevices(t, o)
			must(t, errors.Join(d.Close(), ro.Close(), s.Close()))
			for what, call := range calls(s, d, ro) {
				if err := within(t, what, call); !errors.Is(err, ErrClosed) {
					t.Errorf("%s after Close: %v", what, err)
				}
			}
			s.Info() // has no error to return
			s.Volumes()
			s.Counters()
		})
	}
}

// TestCallsAfterDeviceClose: a closed device cannot be used, even while the store is open.
func TestCallsAfterDeviceClose(t *testing.T) {
	s, d, ro := withDevices(t, Options{checkpointInterval: -1})
	must(t, errors.Join(d.Close(), ro.Close()))
	for what, call := range calls(nil, d, ro) {
		if what[:4] != "devi" && what[:4] != "snap" || what == "snapshot" {
			continue
		}
		if err := within(t, what, call); !errors.Is(err, ErrClosed) {
			t.Errorf("%s after its Close: %v", what, err)
		}
	}
	mustEnd(t, s)
}

// TestCallsAfterFailure: after the log has failed, every change is refused at once, and Close returns the failure.
// After Close all calls are refused.
func TestCallsAfterFailure(t *testing.T) {
	s, d, ro := withDevices(t, Options{checkpointInterval: -1, Outlive: true, SharedMemory: t.TempDir()})
	_ = s.wal.Fail(errors.New("the disk is gone"))
	for what, call := range calls(s, d, ro) {
		switch what {
		case "close", "device close", "snapshot closed", "open": // change nothing
			continue
		}
		err := within(t, what, call)
		switch what {
		case "volume", "usage", "check", "room", "device read", "device try", "device plan", "device extents", "snapshot read":
			must(t, err)
		case "snapshot write":
			if !errors.Is(err, ErrReadOnly) {
				t.Errorf("%s: %v", what, err)
			}
		case "device flush":
			if !errors.Is(err, ErrFailed) {
				t.Errorf("%s: %v", what, err)
			}
		default:
			if !errors.Is(err, ErrFailed) {
				t.Errorf("%s after a failure: %v", what, err)
			}
		}
	}
	must(t, errors.Join(d.Close(), ro.Close()))
	if err := within(t, "close", s.Close); !errors.Is(err, ErrFailed) {
		t.Errorf("close: %v", err)
	}
	for what, call := range calls(s, d, ro) {
		if err := within(t, what, call); !errors.Is(err, ErrClosed) && !errors.Is(err, ErrFailed) {
			t.Errorf("%s after a failure and Close: %v", what, err)
		}
	}
}
