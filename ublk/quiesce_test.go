package ublk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// TestQuiesce hands a device over again and again under a verifying load, which notices nothing.
func TestQuiesce(t *testing.T) {
	needDriver(t)
	ways := map[string]ublk.Recovery{"reissue": ublk.RecoverReissue, "eio": ublk.RecoverEIO}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			disk := openPhaseDisk(t, filepath.Join(t.TempDir(), "disk"), serverDisk)
			d, err := ublk.Create(stopCtx(t), ublk.Options{Size: serverDisk, ID: new(serverID), Queues: 2, Depth: 8, Recovery: way, Cookie: cookie}, disk)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { closeDevice(t, d) }()
			if way == ublk.RecoverEIO && d.Features()&ublk.FeatureQuiesce == 0 {
				var f *ublk.FeatureError
				if err := d.Quiesce(stopCtx(t)); !errors.As(err, &f) || f.Missing != ublk.FeatureQuiesce || d.State() != ublk.StateLive {
					t.Errorf("Quiesce without QUIESCE: %v, %v", err, d.State())
				}
				return
			}
			times, seconds := 4, 5
			if testing.Short() {
				times, seconds = 2, 3
			}
			fio := exec.Command("fio", "--name=q", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k",
				"--iodepth=32", "--size=2m", "--verify=crc32c", "--verify_fatal=1", "--time_based", fmt.Sprintf("--runtime=%d", seconds))
			var out bytes.Buffer
			fio.Stdout, fio.Stderr = &out, &out
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			for range times {
				time.Sleep(500 * time.Millisecond)
				if err := d.Quiesce(stopCtx(t)); err != nil {
					t.Fatal(err)
				}
				if d.State() != ublk.StateQuiesced || d.Err() != nil {
					t.Errorf("quiesced: %v, %v", d.State(), d.Err())
				}
				if err := d.Close(stopCtx(t)); err != nil { // nothing of it is left here
					t.Errorf("Close of a quiesced device: %v", err)
				}
				if d, err = ublk.Recover(stopCtx(t), serverID, ublk.RecoverOptions{Cookie: cookie}, disk); err != nil {
					t.Fatal(err)
				}
			}
			if err := fio.Wait(); err != nil {
				t.Errorf("fio: %v\n%s", err, out.String())
			}
		})
	}
}

// TestQuiesceRefused: a device whose handler does not answer in time stays live, and serves the requests that it held.
func TestQuiesceRefused(t *testing.T) {
	needDriver(t)
	disk := newRAMDisk(serverDisk)
	var mu sync.Mutex
	var held []*ublk.Request
	holding := true
	d := create(t, ublk.Options{Size: serverDisk, Depth: 4, Recovery: ublk.RecoverReissue}, handlerFunc(func(r *ublk.Request) error {
		mu.Lock()
		defer mu.Unlock()
		if holding && r.Op == ublk.OpWrite {
			held = append(held, r)
			return ublk.ErrAsync
		}
		return disk.ServeUBLK(r)
	}))
	wrote := make(chan error, 8)
	for i := range cap(wrote) {
		fd := openDirect(t, d, unix.O_RDWR)
		go func() { _, err := unix.Pwrite(fd, aligned(4096), int64(i)<<12); _ = unix.Close(fd); wrote <- err }()
		time.Sleep(20 * time.Millisecond)
		if i == 0 {
			go func() { time.Sleep(500 * time.Millisecond); mu.Lock(); holding = false; mu.Unlock() }()
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			go func() { _ = d.Quiesce(ctx) }()
		}
	}
	time.Sleep(700 * time.Millisecond)
	if s := d.State(); s != ublk.StateLive {
		t.Errorf("after a Quiesce that had no time: %v", s)
	}
	mu.Lock()
	for _, r := range held {
		r.Complete(nil)
	}
	mu.Unlock()
	for range cap(wrote) {
		if err := <-wrote; err != nil {
			t.Errorf("a write: %v", err)
		}
	}
	checkDisk(t, d.Path())
}

// TestEndsTogether: Stop, Close, Quiesce and Resize at once end the device once, in one of the ends.
func TestEndsTogether(t *testing.T) {
	needDriver(t)
	for range 5 {
		d, err := ublk.Create(stopCtx(t), ublk.Options{Size: serverDisk, ID: new(serverID), Recovery: ublk.RecoverReissue}, newRAMDisk(2*serverDisk))
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { _ = d.Stop(stopCtx(t)) })
			wg.Go(func() { _ = d.Close(stopCtx(t)) })
			wg.Go(func() { _ = d.Quiesce(stopCtx(t)) })
			wg.Go(func() { _ = d.Resize(stopCtx(t), 2*serverDisk) })
		}
		wg.Wait()
		<-d.Done()
		switch d.State() {
		case ublk.StateDead:
		case ublk.StateQuiesced:
			if err := ublk.Delete(stopCtx(t), serverID, true); err != nil {
				t.Error(err)
			}
		default:
			t.Errorf("ended as %v", d.State())
		}
		if d.Err() != nil {
			t.Errorf("Err: %v", d.Err())
		}
		nothingLeft(t)
	}
}
