package ublk_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/ublk"
)

// needDriver skips a test that needs a kernel with ublk, except where VDISK_GUEST=1 promises one.
func needDriver(t testing.TB) {
	t.Helper()
	if os.Getenv("VDISK_GUEST") != "1" {
		t.Skip("needs a kernel with ublk_drv: runs in the guest (VDISK_GUEST=1)")
	}
	if out, err := exec.Command("modprobe", "ublk_drv").CombinedOutput(); err != nil {
		t.Fatalf("modprobe ublk_drv: %v: %s", err, out)
	}
	if _, err := ublk.Features(); err != nil {
		t.Fatalf("VDISK_GUEST=1 promises a ublk driver: %v", err)
	}
	noLeftovers(t)
}

// create makes a device that the test closes.
func create(t testing.TB, o ublk.Options, h ublk.Handler) *ublk.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	d, err := ublk.Create(ctx, o, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d
}

func closeDevice(t testing.TB, d *ublk.Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Errorf("close: %v", err)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// writeTree makes files of many sizes in a few folders.
func writeTree(t testing.TB, dir string, files int) {
	t.Helper()
	for i := range files {
		sub := filepath.Join(dir, strconv.Itoa(i%7))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		content := bytes.Repeat([]byte(strconv.Itoa(i)+" "), 1+i*i*i%100000)
		if err := os.WriteFile(filepath.Join(sub, strconv.Itoa(i)), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDeviceFilesystems(t *testing.T) {
	needDriver(t)
	kinds := []struct{ name, check string }{
		{"ext4", "e2fsck -fn"},
		{"xfs", "xfs_repair -n"},
	}
	if testing.Short() { // the scripts make both on volumes
		i := rand.IntN(len(kinds))
		kinds = kinds[i : i+1]
	}
	for _, fs := range kinds {
		t.Run(fs.name, func(t *testing.T) {
			disk := newRAMDisk(320 << 20)
			d := create(t, ublk.Options{Size: 320 << 20, Queues: 2, VolatileCache: true, FUA: true, Discard: true}, disk)
			run(t, "mkfs."+fs.name, "-q", d.Path())
			dir := t.TempDir()
			run(t, "mount", "-o", "discard", d.Path(), dir)
			defer func() { _ = exec.Command("umount", dir).Run() }()
			writeTree(t, filepath.Join(dir, "tree"), 200)
			want := run(t, "sh", "-c", "cd "+dir+" && find . -type f -exec sha256sum {} + | sort")
			run(t, "umount", dir)
			run(t, "sh", "-c", fs.check+" "+d.Path())
			run(t, "mount", d.Path(), dir)
			got := run(t, "sh", "-c", "cd "+dir+" && find . -type f -exec sha256sum {} + | sort")
			if got != want || strings.Count(want, "\n") < 10 {
				t.Errorf("content changed over unmount and mount (%d and %d lines)", strings.Count(want, "\n"), strings.Count(got, "\n"))
			}
			run(t, "rm", "-rf", filepath.Join(dir, "tree", "0"))
			run(t, "fstrim", dir)
			run(t, "umount", dir)
			if disk.ops[ublk.OpFlush].Load() == 0 || disk.ops[ublk.OpDiscard].Load() == 0 {
				t.Errorf("flushes %d, discards %d: want some of each", disk.ops[ublk.OpFlush].Load(), disk.ops[ublk.OpDiscard].Load())
			}
		})
	}
}
