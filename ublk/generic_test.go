package ublk_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// stepLimit bounds a step that takes well under a second on an idle machine: emulation beside other work is slow.
const stepLimit = 90 * time.Second

// sysBlock reads an attribute of a block device.
func sysBlock(t testing.TB, d *ublk.Device, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(d.Path()), name))
	if err != nil {
		t.Error(err)
	}
	return strings.TrimSpace(string(text))
}

func setScheduler(t testing.TB, d *ublk.Device, name string) {
	t.Helper()
	file := filepath.Join("/sys/block", filepath.Base(d.Path()), "queue/scheduler")
	if err := os.WriteFile(file, []byte(name), 0); err != nil {
		t.Fatal(err)
	}
}

// TestFeaturesAreKnown: the running kernel has no feature without a name.
func TestFeaturesAreKnown(t *testing.T) {
	needDriver(t)
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range set.Names() {
		if strings.HasPrefix(name, "bit ") {
			t.Errorf("kernel %s has %s, which knownFeatures does not name", set.Kernel, name)
		}
	}
}

// TestParameters: the block layer has the parameters that the options ask for.
func TestParameters(t *testing.T) {
	needDriver(t)
	for _, c := range []struct {
		name string
		o    ublk.Options
		want map[string]string
	}{
		{"defaults", ublk.Options{Size: 1 << 30}, map[string]string{
			"size": "2097152", "ro": "0", "queue/logical_block_size": "512", "queue/physical_block_size": "4096",
			"queue/minimum_io_size": "4096", "queue/optimal_io_size": "4096", "queue/max_hw_sectors_kb": "256",
			"queue/write_cache": "write through", "queue/fua": "0", "queue/rotational": "0",
			"queue/discard_max_hw_bytes": "0", "queue/write_zeroes_max_bytes": "0", "queue/dax": "0", "mq": "1 queues",
		}},
		{"cache", ublk.Options{Size: 1 << 20, VolatileCache: true}, map[string]string{
			"queue/write_cache": "write back", "queue/fua": "0",
		}},
		{"fua", ublk.Options{Size: 1 << 20, VolatileCache: true, FUA: true}, map[string]string{
			"queue/write_cache": "write back", "queue/fua": "1",
		}},
		{"read-only", ublk.Options{Size: 1 << 20, ReadOnly: true}, map[string]string{"ro": "1"}},
		{"blocks of 4 KiB", ublk.Options{Size: 1 << 20, LogicalBlock: 4096, PhysicalBlock: 16384, IOMin: 8192, IOOpt: 131072}, map[string]string{
			"queue/logical_block_size": "4096", "queue/physical_block_size": "16384",
			"queue/minimum_io_size": "16384", // the block layer raises it to the physical block
			"queue/optimal_io_size": "131072",
		}},
		{"discard", ublk.Options{Size: 1 << 20, Discard: true}, map[string]string{
			"queue/discard_granularity": "4096", "queue/discard_max_hw_bytes": "4294963200",
			"queue/write_zeroes_max_bytes": "4294963200",
		}},
		{"discard of 64 KiB", ublk.Options{Size: 1 << 20, Discard: true, DiscardGranularity: 64 << 10}, map[string]string{
			"queue/discard_granularity": "65536", "queue/discard_max_hw_bytes": "4294901760",
		}},
		{"large", ublk.Options{Size: 1 << 20, MaxIOBytes: 1 << 20, Depth: 8}, map[string]string{
			"queue/max_hw_sectors_kb": "1024", "mq/0/nr_tags": "8",
		}},
		{"small", ublk.Options{Size: 1 << 20, MaxIOBytes: 4096, Depth: 1}, map[string]string{
			"queue/max_hw_sectors_kb": "4", "queue/max_sectors_kb": "4", "mq/0/nr_tags": "1",
		}},
		{"two queues", ublk.Options{Size: 1 << 20, Queues: 2}, map[string]string{"mq": "2 queues"}},
		{"more queues than processors", ublk.Options{Size: 1 << 20, Queues: 64, Depth: 2}, map[string]string{"mq": "2 queues"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := create(t, c.o, handlerFunc(func(r *ublk.Request) error { clear(r.Buf); return nil }))
			for name, want := range c.want {
				var got string
				if name == "mq" {
					dirs, _ := filepath.Glob("/sys/block/" + filepath.Base(d.Path()) + "/mq/*")
					got = fmt.Sprintf("%d queues", len(dirs))
				} else {
					got = sysBlock(t, d, name)
				}
				if got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			if len(c.want["mq"]) > 0 && fmt.Sprintf("%d queues", d.Options().Queues) != c.want["mq"] {
				t.Errorf("Options tells of %d queues, want %s", d.Options().Queues, c.want["mq"])
			}
		})
	}
}

// partitioned makes a RAM disk with a DOS partition table of two partitions.
func partitioned() *ramDisk {
	disk := newRAMDisk(8 << 20)
	for i, start := range []uint32{2048, 6144} { // sectors
		entry := disk.data[446+16*i:]
		entry[4] = 0x83
		binary.LittleEndian.PutUint32(entry[8:], start)
		binary.LittleEndian.PutUint32(entry[12:], 4096)
	}
	disk.data[510], disk.data[511] = 0x55, 0xaa
	return disk
}

// TestPartitionScan: the kernel finds partitions by itself, or with NoPartitionScan only when it is asked to.
func TestPartitionScan(t *testing.T) {
	needDriver(t)
	partitions := func(d *ublk.Device, want int) func() error {
		return func() error {
			found, _ := filepath.Glob(d.Path() + "p[12]")
			if len(found) != want {
				return fmt.Errorf("partitions %v, want %d", found, want)
			}
			return nil
		}
	}
	d := create(t, ublk.Options{Size: 8 << 20}, partitioned())
	within(t, stepLimit, "scan", partitions(d, 2))
	closeDevice(t, d)

	d = create(t, ublk.Options{Size: 8 << 20, NoPartitionScan: true}, partitioned())
	if d.Features()&ublk.FeatureNoAutoPartScan == 0 {
		if set, err := ublk.Features(); err != nil || set.Has(ublk.FeatureNoAutoPartScan) {
			t.Errorf("the kernel can do without a scan, and the device was not asked to (%v)", err)
		}
		return
	}
	run(t, "udevadm", "settle", "--timeout=10")
	if err := partitions(d, 0)(); err != nil {
		t.Error(err)
	}
	run(t, "blockdev", "--rereadpt", d.Path())
	within(t, stepLimit, "scan when told", partitions(d, 2))
}

// TestResize: a live disk grows and shrinks, also with a file open, and reads past the new end fail.
func TestResize(t *testing.T) {
	needDriver(t)
	const large, small = 8 << 20, 1 << 20
	d := create(t, ublk.Options{Size: large}, newRAMDisk(large))
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	if d.Features()&ublk.FeatureUpdateSize == 0 {
		var missing *ublk.FeatureError
		err := d.Resize(ctx, small)
		if !errors.As(err, &missing) || !errors.Is(err, ublk.ErrKernelTooOld) || !strings.Contains(err.Error(), "6.16") {
			t.Errorf("Resize on a kernel without it: %v", err)
		}
		if set, err := ublk.Features(); err != nil || set.Has(ublk.FeatureUpdateSize) {
			t.Errorf("the kernel has UPDATE_SIZE, and the device has not (%v)", err)
		}
		return
	}
	fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	buf := aligned(4096)
	for _, size := range []int64{small, large, small + 512, large} {
		if err := d.Resize(ctx, size); err != nil {
			t.Fatalf("resize to %d: %v", size, err)
		}
		if got := strings.TrimSpace(run(t, "blockdev", "--getsize64", d.Path())); got != strconv.FormatInt(size, 10) {
			t.Errorf("the disk has %s bytes, want %d", got, size)
		}
		if n, err := unix.Pread(fd, buf, size&^4095); n != int(size%4096) || err != nil {
			t.Errorf("a read at the end of %d bytes: %d, %v", size, n, err)
		}
		if n, err := unix.Pwrite(fd, buf, small); (n == 4096) != (size == large) {
			t.Errorf("size %d: a write at %d: %d, %v", size, small, n, err)
		}
		infos, err := ublk.Devices(ctx)
		if err != nil || len(infos) != 1 || infos[0].Size != size {
			t.Errorf("Devices: %+v, %v; want %d bytes", infos, err, size)
		}
	}
	for _, size := range []int64{0, -512, 1000} {
		if err := d.Resize(ctx, size); !errors.Is(err, ublk.ErrInvalid) {
			t.Errorf("resize to %d: %v", size, err)
		}
	}
	_ = unix.Close(fd)
	closeDevice(t, d)
	if err := d.Resize(ctx, small); err == nil {
		t.Error("a device that is closed was resized")
	}
}

// TestStopRefusesMapper: a device below device mapper is in use, and the error names the user.
func TestStopRefusesMapper(t *testing.T) {
	needDriver(t)
	d := create(t, ublk.Options{Size: 8 << 20}, newRAMDisk(8<<20))
	const name = "ublk-test-linear"
	run(t, "modprobe", "dm_mod")
	run(t, "dmsetup", "create", name, "--table", "0 8192 linear "+d.Path()+" 2048")
	err := d.Stop(stopCtx(t))
	if !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), "part of dm-") {
		t.Errorf("Stop below device mapper: %v", err)
	}
	run(t, "dd", "if=/dev/urandom", "of=/dev/mapper/"+name, "bs=64k", "count=16", "oflag=direct", "status=none")
	run(t, "dmsetup", "remove", "--retry", name)
	if err := d.Stop(stopCtx(t)); err != nil {
		t.Errorf("free again: %v", err)
	}
	mustBeGone(t, d)
}

// TestMount makes a file system in each copy mode, fills it, and checks it.
func TestMount(t *testing.T) {
	needDriver(t)
	for _, mode := range someModes(t) {
		t.Run(mode.name, func(t *testing.T) {
			d := create(t, ublk.Options{Size: 32 << 20, Copy: mode.mode, VolatileCache: true, Discard: true}, newRAMDisk(32<<20))
			run(t, "mkfs.ext4", "-q", d.Path())
			dir := t.TempDir()
			run(t, "mount", "-o", "discard", d.Path(), dir)
			defer func() { _ = exec.Command("umount", dir).Run() }()
			writeTree(t, filepath.Join(dir, "tree"), 60)
			sum := "cd " + dir + " && find . -type f -exec sha256sum {} + | sort"
			want := run(t, "sh", "-c", sum)
			run(t, "umount", dir)
			run(t, "e2fsck", "-fn", d.Path())
			run(t, "mount", d.Path(), dir)
			if got := run(t, "sh", "-c", sum); got != want || strings.Count(want, "\n") != 60 {
				t.Errorf("%d files became %d, or others", strings.Count(want, "\n"), strings.Count(got, "\n"))
			}
			run(t, "umount", dir)
		})
	}
}

// writers are direct writes that go on in the background, each of its own 4 KiB block. Opening the disk may wait, too:
// for the partition scan.
type writers struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error // of the writes that ended
}

func startWriters(path string, n int) *writers {
	w := &writers{}
	for i := range n {
		w.wg.Go(func() {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
			if err == nil {
				_, err = unix.Pwrite(fd, aligned(4096), int64(i)*4096)
				_ = unix.Close(fd)
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.errs = append(w.errs, err)
		})
	}
	return w
}

func (w *writers) ended() []error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]error(nil), w.errs...)
}

// wait waits until all writes have ended, and returns their errors.
func (w *writers) wait(t testing.TB) []error {
	t.Helper()
	bounded(t, &w.wg, "the writes")
	return w.ended()
}

// inFlight returns the number of requests that a device has under way (Documentation/block/stat.rst: the ninth field).
func inFlight(path string) int {
	text, _ := os.ReadFile("/sys/block/" + filepath.Base(path) + "/stat")
	fields := strings.Fields(string(text))
	if len(fields) < 9 {
		return 0
	}
	n, _ := strconv.Atoi(fields[8])
	return n
}
