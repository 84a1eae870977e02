package ublk_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/vdisk/vdisk/ublk"
)

// The device of the server processes of these tests.
const (
	killID   = 11
	killPath = "/dev/ublkb11"
)

// waiting is the state of a device without a server.
func waiting(r ublk.Recovery) ublk.KernelState {
	switch r {
	case ublk.RecoverNone:
		return ublk.KernelDead
	case ublk.RecoverFailIO:
		return ublk.KernelFailIO
	}
	return ublk.KernelQuiesced
}

// TestAllTagsHeld: when a server that holds every request of a queue is killed, the users get errors, and the device
// goes: at once if the driver needs no free tag to notice (see mustBecome).
func TestAllTagsHeld(t *testing.T) {
	needDriver(t)
	for _, mode := range copyModes(t) {
		for _, depth := range []int{2, 8} {
			t.Run(fmt.Sprintf("%s depth %d", mode.name, depth), func(t *testing.T) {
				s := startProcess(t, serverConfig{
					ID: new(killID), Memory: memoryFile(t), Size: 1 << 20, Queues: 2, Depth: depth,
					Copy: mode.mode, Handler: "hold",
				})
				w := startWriters(killPath, 4*depth) // two queues: more than there are tags
				within(t, stepLimit, "requests under way", func() error {
					if n := inFlight(killPath); n < depth {
						return fmt.Errorf("%d, want at least %d", n, depth)
					}
					return nil
				})
				time.Sleep(100 * time.Millisecond)
				if ended := w.ended(); len(ended) > 0 {
					t.Fatalf("writes ended while the server held them: %v", ended)
				}
				begin := time.Now()
				s.kill(t)
				for _, err := range w.wait(t) {
					if err == nil {
						t.Error("a write that nobody answered succeeded")
					}
				}
				mustBecome(t, killID, ublk.KernelDead)
				remove(t, killID)
				t.Logf("all ended after %v", time.Since(begin).Round(time.Millisecond))
			})
		}
	}
}

// TestScanHangs: Create does not outlast its context when a server does not answer the first read of the partition
// table, and such a server can be killed, where the driver's scan is not part of START (Linux 6.19). Before, it holds
// the driver's lock and the process until the read is answered: a deadlock that only a reboot ends (docs/testing.md,
// Limits of the drivers).
func TestScanHangs(t *testing.T) {
	needDriver(t)
	scansLater := kernelFrom(t, 6, 19)
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		release := make(chan struct{})
		disk := newRAMDisk(1 << 20)
		go func() { time.Sleep(4 * time.Second); close(release) }()
		begin := time.Now()
		d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 20}, handlerFunc(func(r *ublk.Request) error {
			go func() { <-release; r.Complete(disk.ServeUBLK(r)) }()
			return ublk.ErrAsync
		}))
		if err == nil {
			closeDevice(t, d)
		} else if !errors.Is(err, context.DeadlineExceeded) { // a slow machine may not come as far as START
			t.Error(err)
		}
		if took := time.Since(begin); took > stepLimit {
			t.Errorf("Create and Close took %v", took)
		}
	})
	for _, recovery := range []ublk.Recovery{ublk.RecoverNone, ublk.RecoverReissue} {
		t.Run(fmt.Sprint("recovery ", recovery), func(t *testing.T) {
			if !scansLater {
				t.Skip("this kernel's driver reads the partition table in START: a server that is killed in it never ends")
			}
			s := spawn(t, serverConfig{ID: new(killID), Memory: memoryFile(t), Size: 1 << 20, Recovery: recovery, Handler: "deaf"})
			within(t, stepLimit, "the disk", func() error { _, err := os.Stat("/dev/ublkc11"); return err })
			time.Sleep(500 * time.Millisecond) // START is on its way, or done
			s.kill(t)
			within(t, stepLimit, "no live device", func() error {
				if state, err := stateOf(killID); err == nil && state == ublk.KernelLive {
					return errors.New("still live")
				}
				return nil
			})
			remove(t, killID)
		})
	}
}

// kernelFrom reports whether the kernel is of this version or a later one.
func kernelFrom(t *testing.T, major, minor int) bool {
	t.Helper()
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(set.Kernel, "%d.%d", &a, &b); err != nil {
		t.Fatalf("kernel %q: %v", set.Kernel, err)
	}
	return a > major || a == major && b >= minor
}
