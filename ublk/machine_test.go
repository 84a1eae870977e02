package ublk_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/vdisk/vdisk/internal/testwatch"
	"github.com/vdisk/vdisk/ublk"
)

// machine is a device that many goroutines end, quiesce, resize, use and recover at once. Whatever they do, every call
// returns, the states are those that the calls allow, and nothing is left.
type machine struct {
	d       *ublk.Device
	o       ublk.Options
	disk    *shmDisk
	handler ublk.Handler
	io      sync.WaitGroup // operations on the disk, which may wait for a recovery
	errs    chan error     // of calls that returned what they may not
}

// TestMachine runs random programs of concurrent calls.
func TestMachine(t *testing.T) {
	needDriver(t)
	restore := flag.Lookup("rapid.checks").Value.String()
	defer func() { _ = flag.Set("rapid.checks", restore) }()
	if err := flag.Set("rapid.checks", strconv.Itoa(rounds(6))); err != nil {
		t.Fatal(err)
	}
	_ = flag.Set("rapid.nofailfile", "true")
	_ = flag.Set("rapid.shrinktime", "10s") // what depends on time does not shrink
	modes := copyModes(t)
	memory := memoryFile(t)
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{errs: make(chan error, 100)}
		m.o = ublk.Options{
			Size: 1 << 20, Depth: 8,
			Queues:   rapid.IntRange(1, 2).Draw(rt, "queues"),
			Copy:     rapid.SampledFrom(modes).Draw(rt, "copy").mode,
			Recovery: rapid.SampledFrom([]ublk.Recovery{ublk.RecoverNone, ublk.RecoverReissue}).Draw(rt, "recovery"),
		}
		disk, err := openShmDisk(memory, 1<<20)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = unix.Munmap(disk.data) }()
		m.disk, m.handler = disk, disk
		if rapid.Bool().Draw(rt, "late") {
			m.handler = lateDisk{disk}
		}
		m.create(rt)
		defer func() { remove(t, m.d.ID()) }() // of a program that failed
		for range rapid.IntRange(2, 5).Draw(rt, "steps") {
			m.step(rt)
		}
		m.finish(rt)
	})
}

func (m *machine) create(rt *rapid.T) {
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	d, err := ublk.Create(ctx, m.o, m.handler)
	if err != nil {
		rt.Fatal(err)
	}
	m.d = d
}

// calls are the operations of the goroutines. Each checks its own result.
var calls = map[string]func(m *machine, ctx context.Context) error{
	"stop": func(m *machine, ctx context.Context) error {
		return allowed(m.d.Stop(ctx), ublk.ErrBusy)
	},
	"close": func(m *machine, ctx context.Context) error {
		return allowed(m.d.Close(ctx), ublk.ErrBusy)
	},
	"quiesce": func(m *machine, ctx context.Context) error {
		err := m.d.Quiesce(ctx)
		if err == nil && m.o.Recovery == ublk.RecoverNone {
			return errors.New("a device without recovery was quiesced")
		}
		if err == nil && m.d.State() != ublk.StateQuiesced {
			return fmt.Errorf("quiesced, and its state is %v", m.d.State())
		}
		return nil
	},
	"resize": func(m *machine, ctx context.Context) error {
		_ = m.d.Resize(ctx, 1<<19) // may come too late, or the kernel may not know it
		_ = m.d.Resize(ctx, 1<<20)
		return nil
	},
	"look": func(m *machine, ctx context.Context) error {
		_, _, _, _ = m.d.Stats(), m.d.Features(), m.d.Options(), m.d.Err()
		if s := m.d.State(); s < ublk.StateStarting || s > ublk.StateQuiesced {
			return fmt.Errorf("state %d", s)
		}
		return nil
	},
}

// allowed accepts nil, the end of a context, and errors that match one of the given ones.
func allowed(err error, may ...error) error {
	for _, m := range append(may, context.DeadlineExceeded, context.Canceled) {
		if errors.Is(err, m) {
			return nil
		}
	}
	return err
}

// step lets some goroutines make calls at once, waits for them, and looks at the state of the device.
func (m *machine) step(rt *rapid.T) {
	names := rapid.SliceOfN(rapid.SampledFrom([]string{"stop", "close", "quiesce", "quiesce", "resize", "look", "io", "io", "io"}), 1, 6).
		Draw(rt, "calls")
	limits := rapid.SliceOfN(rapid.SampledFrom([]time.Duration{0, time.Millisecond, 50 * time.Millisecond, stepLimit, stepLimit, stepLimit}),
		len(names), len(names)).Draw(rt, "limits")
	var wg sync.WaitGroup
	for i, name := range names {
		if name == "io" {
			m.startIO(i)
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), limits[i])
			defer cancel()
			if err := calls[name](m, ctx); err != nil {
				m.errs <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	bounded(rt, &wg, "calls "+strings.Join(names, " "))
	m.complain(rt)
	m.settle(rt)
}

// startIO writes and reads a block; both may fail, or wait until somebody recovers the disk.
func (m *machine) startIO(block int) {
	path := m.d.Path()
	m.io.Go(func() {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		buf := aligned(4096)
		for range 20 {
			_, _ = unix.Pwrite(fd, buf, int64(block)*4096)
			_, _ = unix.Pread(fd, buf, int64(block)*4096)
		}
	})
}

// settle waits for the operations that the calls have begun, checks their outcome, and makes the device live again.
func (m *machine) settle(rt *rapid.T) {
	err := poll(stepLimit, func() error {
		switch s := m.d.State(); s {
		case ublk.StateLive, ublk.StateDead, ublk.StateQuiesced:
			return nil
		default:
			return fmt.Errorf("the state stays %v", s)
		}
	})
	if err != nil {
		rt.Fatal(err)
	}
	var state ublk.State
	select {
	case <-m.d.Done():
		if state = m.d.State(); state == ublk.StateLive {
			rt.Fatalf("done, and %v", state)
		}
	case <-time.After(time.Second):
		if state = m.d.State(); state != ublk.StateLive {
			rt.Fatalf("%v, and not done", state)
		}
	}
	if err := m.d.Err(); err != nil {
		rt.Fatalf("%v: Err: %v", state, err)
	}
	switch state {
	case ublk.StateQuiesced:
		m.recover(rt)
	case ublk.StateDead:
		m.gone(rt)
		m.create(rt)
	}
}

// recover lets two goroutines recover the device. One succeeds.
func (m *machine) recover(rt *rapid.T) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var won []*ublk.Device
	var errs []error
	id := m.d.ID()
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	for range 2 {
		wg.Go(func() {
			d, err := ublk.Recover(ctx, id, ublk.RecoverOptions{}, m.handler)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				won = append(won, d)
				cancel() // the other one waits for the driver to let go of the device
			}
		})
	}
	bounded(rt, &wg, "two recoveries")
	if len(won) != 1 {
		rt.Fatalf("%d of two recoveries succeeded: %v", len(won), errs)
	}
	m.d = won[0]
}

// gone checks that the dead device is no longer in the driver, or goes when its users do.
func (m *machine) gone(rt *rapid.T) {
	bounded(rt, &m.io, "I/O on a dead device")
	err := poll(stepLimit, func() error {
		if _, err := os.Stat(fmt.Sprintf("/dev/ublkc%d", m.d.ID())); err == nil {
			return errors.New("a dead device is left")
		}
		return nil
	})
	if err != nil {
		rt.Fatal(err)
	}
}

func (m *machine) complain(rt *rapid.T) {
	for {
		select {
		case err := <-m.errs:
			rt.Error(err)
		default:
			return
		}
	}
}

// finish closes the device. That takes no longer than the device's requests.
func (m *machine) finish(rt *rapid.T) {
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	if err := m.d.Close(ctx); err != nil && !errors.Is(err, ublk.ErrBusy) {
		rt.Errorf("Close: %v", err)
	}
	m.gone(rt)
	m.complain(rt)
}

// bounded waits for a group. If that takes too long it fails the test, with the stacks of our goroutines and of threads
// that hang in the kernel.
func bounded(t testwatch.TB, wg *sync.WaitGroup, what string) {
	t.Helper()
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	ended(t, 2*stepLimit, what, done)
}

// ended waits for a value of c, as bounded does for a group.
func ended[T any](t testwatch.TB, limit time.Duration, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(limit):
		t.Fatalf("%s: no end in %v: %v\n%s", what, limit, noHangs(), testwatch.Stacks())
	}
	return v
}
