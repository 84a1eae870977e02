package ublk_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// laterDisk answers every request of a RAM disk from a goroutine.
type laterDisk struct{ *ramDisk }

func (d laterDisk) ServeUBLK(r *ublk.Request) error {
	go func() { r.Complete(d.ramDisk.ServeUBLK(r)) }()
	return ublk.ErrAsync
}

// fileDisk is a loop device: it reads on the queue's ring and writes with system calls.
type fileDisk struct {
	f       *os.File
	fetched atomic.Int64
}

func (d *fileDisk) ServeUBLK(r *ublk.Request) error {
	switch r.Op {
	case ublk.OpRead:
		half := r.Length / 2 / 512 * 512
		r.Fetch(int(d.f.Fd()), r.Buf[:half], r.Offset)
		r.Fetch(int(d.f.Fd()), r.Buf[half:], r.Offset+int64(half))
		return ublk.ErrFetch
	case ublk.OpWrite:
		_, err := d.f.WriteAt(r.Buf, r.Offset)
		return err
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		return unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Offset, int64(r.Length))
	}
	return d.f.Sync()
}

func (d *fileDisk) FetchedUBLK(r *ublk.Request, err error) error {
	d.fetched.Add(1)
	return err
}

func newFileDisk(t testing.TB, size int64) *fileDisk {
	t.Helper()
	f, err := os.Create(filepath.Join(scratch(t), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return &fileDisk{f: f}
}

// scratch returns a folder on a real file system, if the guest has one.
func scratch(t testing.TB) string {
	if dir := os.Getenv("VDISK_SCRATCH"); dir != "" {
		d, err := os.MkdirTemp(dir, "ublk")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(d) })
		return d
	}
	return t.TempDir()
}

// TestDeviceVerify writes with four jobs, mixed sizes and flushes, and reads everything back by checksum.
func TestDeviceVerify(t *testing.T) {
	needDriver(t)
	const size = 64 << 20
	for _, c := range []struct {
		name string
		o    ublk.Options
		h    func(t *testing.T) ublk.Handler
		bs   string
		each string // bytes written by each job
	}{
		{"inline", ublk.Options{Queues: 2}, func(*testing.T) ublk.Handler { return newRAMDisk(size) }, "512-256k", shorter("3m", "1m")},
		{"later", ublk.Options{Queues: 2, Depth: 16, VolatileCache: true}, func(*testing.T) ublk.Handler { return laterDisk{newRAMDisk(size)} }, "512-256k", shorter("3m", "1m")},
		{"fetch", ublk.Options{Queues: 1, VolatileCache: true, FUA: true}, func(t *testing.T) ublk.Handler { return newFileDisk(t, size) }, "512-256k", shorter("3m", "1m")},
		{"4096", ublk.Options{Queues: 2, LogicalBlock: 4096, MaxIOBytes: 64 << 10}, func(*testing.T) ublk.Handler { return newRAMDisk(size) }, "4k-256k", shorter("3m", "1m")},
		{"depth 1", ublk.Options{Depth: 1, MaxIOBytes: 4096}, func(*testing.T) ublk.Handler { return laterDisk{newRAMDisk(size)} }, "512-64k", "192k"},
		{"depth 300", ublk.Options{Queues: 2, Depth: 300, MaxIOBytes: 32 << 10}, func(*testing.T) ublk.Handler { return newRAMDisk(size) }, "512-64k", shorter("2m", "1m")},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.o.Size = size
			d := create(t, c.o, c.h(t))
			align := "512"
			if c.o.LogicalBlock == 4096 {
				align = "4096"
			}
			disturb(t)
			run(t, "fio", "--name=v", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw=randwrite",
				"--bsrange="+c.bs, "--blockalign="+align, "--iodepth=16", "--numjobs=4", "--size=16m", "--offset_increment=16m", "--io_size="+c.each,
				"--fsync=64", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--bs_unaligned=0", "--group_reporting", "--norandommap=0")
		})
	}
}

// disturb runs the collector and sends signals until the test ends. Both interrupt threads in system calls.
func disturb(t testing.TB) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				runtime.GC()
				_ = unix.Kill(os.Getpid(), unix.SIGURG)
				_ = unix.Kill(os.Getpid(), unix.SIGWINCH)
			}
		}
	})
	t.Cleanup(func() { close(stop); wg.Wait() })
}

// TestDeviceQueues finds every queue's own descriptors and buffers: each CPU's requests carry its own content.
func TestDeviceQueues(t *testing.T) {
	needDriver(t)
	var perQueue [8]atomic.Int64
	disk := newRAMDisk(32 << 20)
	d := create(t, ublk.Options{Size: 32 << 20, Queues: 2, Depth: 8}, handlerFunc(func(r *ublk.Request) error {
		perQueue[r.Queue].Add(1)
		return disk.ServeUBLK(r)
	}))
	if d.Options().Queues != 2 {
		t.Skipf("the guest has one CPU, so %d queue", d.Options().Queues)
	}
	for cpu := range 2 {
		run(t, "taskset", "-c", fmt.Sprint(cpu), "dd", "if=/dev/urandom", "of="+d.Path(), "bs=64k", "count=32",
			fmt.Sprintf("seek=%d", cpu*32), "oflag=direct", "status=none")
	}
	got, err := os.ReadFile(d.Path())
	if err != nil || sha256.Sum256(got) != sha256.Sum256(disk.data) {
		t.Errorf("the device reads other bytes than the disk has (%v)", err)
	}
	if perQueue[0].Load() == 0 || perQueue[1].Load() == 0 {
		t.Errorf("requests by queue: %d and %d", perQueue[0].Load(), perQueue[1].Load())
	}
}

type handlerFunc func(r *ublk.Request) error

func (f handlerFunc) ServeUBLK(r *ublk.Request) error { return f(r) }

// openDirect opens the device with O_DIRECT.
func openDirect(t testing.TB, d *ublk.Device, flags int) int {
	t.Helper()
	fd, err := unix.Open(d.Path(), flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// aligned returns memory that is suitable for direct I/O.
func aligned(n int) []byte {
	b := make([]byte, n+4096)
	skip := 4096 - int(uintptr(unsafe.Pointer(&b[0])))&4095
	return b[skip:][:n]
}

func TestDeviceOperations(t *testing.T) {
	needDriver(t)
	disk := newRAMDisk(8 << 20)
	d := create(t, ublk.Options{Size: 8 << 20, VolatileCache: true, FUA: true, Discard: true}, disk)
	fd := openDirect(t, d, unix.O_RDWR)
	for i := range disk.data {
		disk.data[i] = 0xaa
	}
	run(t, "blkdiscard", "-o", "1048576", "-l", "1048576", d.Path())
	run(t, "blkdiscard", "-z", "-o", "4194304", "-l", "65536", d.Path())
	for i, b := range disk.data {
		zero := i>>20 == 1 || i >= 4<<20 && i < 4<<20+64<<10
		if zero != (b == 0) {
			t.Fatalf("byte %d is %#x", i, b)
		}
	}
	run(t, "fallocate", "-z", "-o", "5242880", "-l", "4096", d.Path())
	if disk.ops[ublk.OpDiscard].Load() == 0 || disk.ops[ublk.OpWriteZeroes].Load() == 0 {
		t.Errorf("discards %d, write zeroes %d", disk.ops[ublk.OpDiscard].Load(), disk.ops[ublk.OpWriteZeroes].Load())
	}
	flushes := disk.ops[ublk.OpFlush].Load()
	if err := unix.Fsync(fd); err != nil || disk.ops[ublk.OpFlush].Load() == flushes {
		t.Errorf("fsync sent no flush (%v)", err)
	}
	// A direct write with O_DSYNC is a FUA write.
	sync := openDirect(t, d, unix.O_RDWR|unix.O_DSYNC)
	fuas := disk.fuas.Load()
	if n, err := unix.Pwrite(sync, aligned(4096), 8192); n != 4096 || err != nil {
		t.Fatal(n, err)
	}
	if n := disk.fuas.Load() - fuas; n != 1 {
		t.Errorf("an O_DSYNC write became %d FUA writes, want 1", n)
	}
}

func TestDeviceGeometry(t *testing.T) {
	needDriver(t)
	for _, c := range []struct {
		o    ublk.Options
		want string // blockdev: --getsize64 --getss --getpbsz --getiomin --getioopt --getro
	}{
		{ublk.Options{Size: 1<<20 + 512}, "1049088 512 4096 4096 4096 0"},
		{ublk.Options{Size: 12288, LogicalBlock: 4096, IOOpt: 65536}, "12288 4096 4096 4096 65536 0"},
		{ublk.Options{Size: 512, PhysicalBlock: 512, ReadOnly: true}, "512 512 512 512 512 1"},
		{ublk.Options{Size: 3 << 40}, "3298534883328 512 4096 4096 4096 0"},
	} {
		zero := handlerFunc(func(r *ublk.Request) error { clear(r.Buf); return nil })
		d := create(t, c.o, zero)
		got := run(t, "blockdev", "--getsize64", "--getss", "--getpbsz", "--getiomin", "--getioopt", "--getro", d.Path())
		if strings.Join(strings.Fields(got), " ") != c.want {
			t.Errorf("%+v: blockdev says %q, want %q", c.o, strings.Fields(got), c.want)
		}
		infos, err := ublk.Devices(context.Background())
		if err != nil || len(infos) != 1 || infos[0].Size != c.o.Size || infos[0].ServerPID != os.Getpid() ||
			infos[0].State != ublk.KernelLive || infos[0].ReadOnly != c.o.ReadOnly {
			t.Errorf("Devices: %+v, %v", infos, err)
		}
		closeDevice(t, d)
	}
}

func TestDeviceReadOnly(t *testing.T) {
	needDriver(t)
	disk := newRAMDisk(1 << 20)
	d := create(t, ublk.Options{Size: 1 << 20, ReadOnly: true}, disk)
	fd, err := unix.Open(d.Path(), unix.O_RDWR|unix.O_DIRECT, 0)
	if err == nil { // the open may succeed, the write must not
		_, err = unix.Pwrite(fd, aligned(4096), 0)
		_ = unix.Close(fd)
	}
	if err == nil || disk.ops[ublk.OpWrite].Load() > 0 {
		t.Errorf("a read-only device took a write (%v)", err)
	}
}

// TestDeviceErrors: readers and writers get the errno of an error or a panic, and the device goes on.
func TestDeviceErrors(t *testing.T) {
	needDriver(t)
	var reports atomic.Int64
	disk := newRAMDisk(1 << 20)
	d := create(t, ublk.Options{Size: 1 << 20, Report: func(error) { reports.Add(1) }}, handlerFunc(func(r *ublk.Request) error {
		switch {
		case r.Op == ublk.OpWrite && r.Offset == 8192:
			return fmt.Errorf("full: %w", syscall.ENOSPC)
		case r.Op == ublk.OpWrite && r.Offset == 16384:
			return errors.New("broken")
		case r.Op == ublk.OpWrite && r.Offset == 32768:
			panic("handler")
		}
		return disk.ServeUBLK(r)
	}))
	fd := openDirect(t, d, unix.O_RDWR)
	for range 100 {
		for off, want := range map[int64]error{8192: unix.ENOSPC, 16384: unix.EIO, 32768: unix.EIO, 65536: nil} {
			buf := aligned(4096)
			buf[0] = byte(rand.IntN(256))
			if _, err := unix.Pwrite(fd, buf, off); err != want {
				t.Fatalf("write at %d: %v, want %v", off, err, want)
			}
		}
	}
	got := aligned(4096)
	if _, err := unix.Pread(fd, got, 65536); err != nil || !bytes.Equal(got, disk.data[65536:65536+4096]) {
		t.Errorf("read after errors: %v", err)
	}
	if reports.Load() != 100 {
		t.Errorf("%d panics were reported, want 100", reports.Load())
	}
}
