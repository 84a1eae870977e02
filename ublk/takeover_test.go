package ublk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/vdisk/vdisk/ublk"
)

// recoveries lists the ways of recovery of the running kernel.
func recoveries(t testing.TB) map[string]ublk.Recovery {
	t.Helper()
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]ublk.Recovery{"reissue": ublk.RecoverReissue, "eio": ublk.RecoverEIO}
	if set.Has(ublk.FeatureRecoveryFailIO) {
		all["fail-io"] = ublk.RecoverFailIO
	}
	return all
}

// TestDeathWhileFetching: nothing hangs after a server has died with some tags offered and some not, while it made a
// device or recovered one.
func TestDeathWhileFetching(t *testing.T) {
	needDriver(t)
	if set, err := ublk.Features(); err != nil {
		t.Fatal(err)
	} else if !set.Has(ublk.FeatureQuiesce) { // 6.16, the next to be seen after the change, which came with 6.15
		t.Skip("this kernel's driver does not cancel the commands of a queue before all of them are there: the server's ring never ends")
	}
	for _, mode := range copyModes(t) {
		if mode.mode == ublk.CopyBatch {
			continue // it offers no single tags; TestKillRecover covers it
		}
		t.Run(mode.name, func(t *testing.T) {
			c := serverConfig{ID: new(killID), Memory: memoryFile(t), Size: 1 << 20, Depth: 8, Copy: mode.mode, FetchOnly: 3}
			dies := func(c serverConfig) {
				t.Helper()
				s := spawn(t, c)
				if line := s.line(t); line != "FETCHED" {
					t.Fatalf("the server says %q", line)
				}
				s.wait(t)
			}
			dies(c)
			remove(t, killID)

			c.Recovery, c.FetchOnly = ublk.RecoverReissue, 0
			s := startProcess(t, c)
			w := startWriters(killPath, 1)
			if errs := w.wait(t); errs[0] != nil {
				t.Fatal(errs[0])
			}
			s.kill(t)
			mustBecome(t, killID, ublk.KernelQuiesced)
			w = startWriters(killPath, 1) // waits over the death in the middle of a recovery, too
			c.Recover, c.FetchOnly = true, 3
			dies(c)
			c.FetchOnly = 0
			startProcess(t, c)
			if errs := w.wait(t); errs[0] != nil {
				t.Error("the write that waited:", errs[0])
			}
		})
	}
}

// TestKillRecover kills a server in a write, before or after the write is applied, under load, in each way of copying
// and of recovery, and lets another one take over. Users of the disk see what Recovery promises.
func TestKillRecover(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		for name, recovery := range recoveries(t) {
			t.Run(mode.name+" "+name, func(t *testing.T) {
				killRecover(t, mode.mode, recovery)
			})
		}
	}
}

func killRecover(t *testing.T, mode ublk.CopyMode, recovery ublk.Recovery) {
	c := serverConfig{
		ID: new(killID), Memory: memoryFile(t), Size: 16 << 20, Queues: 2, Depth: 8, Copy: mode, Recovery: recovery,
		Handler: "later", DieAt: 40, DieAfter: recovery != ublk.RecoverReissue,
	}
	s := startProcess(t, c)
	load := startLoad(t, killPath, 16<<20)
	s.wait(t) // it kills itself
	mustBecome(t, killID, waiting(recovery))
	c.Recover, c.DieAt = true, 0
	failed := 0
	switch recovery {
	case ublk.RecoverFailIO: // everything fails
		within(t, stepLimit, "errors", func() error {
			if failed = load.failures(); failed < 20 {
				return fmt.Errorf("%d writes failed", failed)
			}
			return nil
		})
	default: // after what was under way, everybody waits
		time.Sleep(300 * time.Millisecond)
		done := load.done.Load()
		time.Sleep(300 * time.Millisecond)
		if n := load.done.Load() - done; n > 0 {
			t.Errorf("%d writes were answered without a server", n)
		}
	}
	// Recover from this process: the library returns the options that the device was made with.
	h, err := c.handler()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	d, err := ublk.Recover(ctx, killID, ublk.RecoverOptions{}, h)
	if err != nil {
		t.Fatal(err)
	}
	defer closeDevice(t, d)
	if o := d.Options(); o.Size != c.Size || o.Queues != c.Queues || o.Depth != c.Depth || o.Recovery != recovery || o.Copy != mode {
		t.Errorf("recovered with %+v", o)
	}
	failed = load.failures()
	load.advance(t, 200)
	later := load.failures()
	load.stop(t)
	switch {
	case recovery == ublk.RecoverReissue && later > 0:
		t.Errorf("%d writes failed", later)
	case recovery == ublk.RecoverEIO && (later == 0 || later > c.Queues*c.Depth):
		t.Errorf("%d writes failed, want those that the server had not answered, at most %d", later, c.Queues*c.Depth)
	case recovery == ublk.RecoverFailIO && later-failed > c.Queues*c.Depth:
		t.Errorf("%d writes failed after the recovery", later-failed)
	}
	load.check(t)
}

// TestKillIdle: a server without work dies, and the next one takes over, again and again.
func TestKillIdle(t *testing.T) {
	needDriver(t)
	for _, mode := range copyModes(t) {
		t.Run(mode.name, func(t *testing.T) {
			c := serverConfig{ID: new(killID), Memory: memoryFile(t), Size: 1 << 20, Queues: 2, Copy: mode.mode, Recovery: ublk.RecoverReissue}
			s := startProcess(t, c)
			c.Recover = true
			for range 3 {
				s.kill(t)
				mustBecome(t, killID, ublk.KernelQuiesced)
				w := startWriters(killPath, 2)
				s = startProcess(t, c)
				if err := errors.Join(w.wait(t)...); err != nil {
					t.Error(err)
				}
			}
			// Without force a device that can be recovered is not removed.
			s.kill(t)
			mustBecome(t, killID, ublk.KernelQuiesced)
			w := startWriters(killPath, 2)
			if err := ublk.Delete(stopCtx(t), killID, false); !errors.Is(err, ublk.ErrBusy) {
				t.Errorf("Delete of a device that waits: %v", err)
			}
			remove(t, killID)
			for _, err := range w.wait(t) {
				if err == nil {
					t.Error("a write to a removed device succeeded")
				}
			}
		})
	}
}

// TestQuiesceUnderLoad: quiescing answers the requests that the server has. The users wait for the next server, and see
// no error.
func TestQuiesceUnderLoad(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		t.Run(mode.name, func(t *testing.T) {
			c := serverConfig{
				ID: new(killID), Memory: memoryFile(t), Size: 16 << 20, Queues: 2, Depth: 16, Copy: mode.mode,
				Recovery: ublk.RecoverReissue, Handler: "later",
			}
			s := startProcess(t, c)
			fio := startFIO(t, killPath, "--rw=randwrite", "--iodepth=16", "--numjobs=2", "--size=8m", "--offset_increment=8m",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0")
			c.Recover = true
			written := 1 << 20
			for range 3 {
				untilWritten(t, killPath, written)
				written += 1 << 20
				if answer := s.ask(t, "quiesce"); answer != "OK" {
					t.Fatalf("quiesce: %s", answer)
				}
				mustBecome(t, killID, ublk.KernelQuiesced)
				if bytes.Contains(fio.out.Bytes(), []byte("error")) {
					t.Errorf("fio says %s", fio.out.String())
				}
				s.kill(t)
				s = startProcess(t, c)
			}
			if err := fio.wait(t, stepLimit); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKillVerify kills servers under fio at random moments. fio sees neither an error nor a wrong block.
func TestKillVerify(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		t.Run(mode.name, func(t *testing.T) {
			c := serverConfig{
				ID: new(killID), Memory: memoryFile(t), Size: 16 << 20, Queues: 2, Depth: 32, Copy: mode.mode,
				Recovery: ublk.RecoverReissue,
			}
			s := startProcess(t, c)
			fio := startFIO(t, killPath, "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=16", "--numjobs=2",
				"--size=8m", "--offset_increment=8m", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
				"--norandommap=0")
			c.Recover = true
			for i := range rounds(3) {
				if i < 10 {
					untilWritten(t, killPath, (i+1)<<18)
				}
				s.kill(t)
				s = startProcess(t, c)
			}
			if err := fio.wait(t, stepLimit); err != nil {
				t.Error(err)
			}
		})
	}
}
