package ublk_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// VDISK_UBLK_ROUNDS sets the length of these tests; 200 is the long form.

// heavy is a load from many jobs that keeps the queues full.
var heavy = []string{"--rw=randrw", "--norandommap", "--iodepth=64", "--size=8m", "--time_based", "--runtime=120"}

// TestStressRemove closes devices under load, several at once, in each way of copying.
func TestStressRemove(t *testing.T) {
	needDriver(t)
	for range rounds(1) {
		var disks []*ublk.Device
		var fios []*fioRun
		for i, mode := range copyModes(t) {
			for _, h := range []ublk.Handler{newRAMDisk(8 << 20), laterDisk{newRAMDisk(8 << 20)}} {
				d := create(t, ublk.Options{Size: 8 << 20, Queues: 2, Copy: mode.mode, Recovery: ublk.Recovery(i) & 1}, h)
				disks, fios = append(disks, d), append(fios, startFIO(t, d.Path(), heavy...))
			}
		}
		for _, d := range disks {
			untilWritten(t, d.Path(), 256<<10)
		}
		var wg sync.WaitGroup
		for i, d := range disks {
			wg.Go(func() { closeUnderLoad(t, d, fios[i]) })
		}
		wg.Wait()
	}
}

func closeUnderLoad(t testing.TB, d *ublk.Device, fio *fioRun) {
	ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
	defer cancel()
	if err := d.Close(ctx); err != nil && !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("Close under load: %v", err)
	}
	fio.fails(t)
	within(t, stepLimit, "the device is left", func() error {
		if _, err := os.Stat(strings.Replace(d.Path(), "ublkb", "ublkc", 1)); err == nil {
			return errors.New(d.Path())
		}
		return nil
	})
}

// TestStressKill kills a server of several devices under load: all users get errors, and all devices go.
func TestStressKill(t *testing.T) {
	needDriver(t)
	first := rand.IntN(2)
	for range rounds(1) {
		for i, mode := range someModes(t) {
			const devices = 3
			recovery := []ublk.Recovery{ublk.RecoverNone, ublk.RecoverReissue}[(first+i)%2]
			s := startProcess(t, serverConfig{
				ID: new(20), Memory: memoryFile(t), Size: 8 << 20, Queues: 2, Copy: mode.mode,
				Recovery: recovery, Devices: devices, Handler: "later",
			})
			var fios []*fioRun
			for i := range devices {
				path := fmt.Sprintf("/dev/ublkb%d", 20+i)
				fios = append(fios, startFIO(t, path, heavy...))
			}
			for i := range devices {
				untilWritten(t, fmt.Sprintf("/dev/ublkb%d", 20+i), 64<<10)
			}
			s.kill(t)
			for i := range devices {
				mustBecome(t, 20+i, waiting(recovery))
				remove(t, 20+i)
			}
			for _, fio := range fios {
				fio.fails(t)
			}
		}
	}
}

// TestManyDevices makes many devices at once. Each holds its own bytes.
func TestManyDevices(t *testing.T) {
	needDriver(t)
	const devices = 40
	modes := copyModes(t)
	disks := make([]*ublk.Device, devices)
	var wg sync.WaitGroup
	for i := range devices {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
			defer cancel()
			d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 20, Depth: 8, MaxIOBytes: 64 << 10, Copy: modes[i%len(modes)].mode},
				newRAMDisk(1<<20))
			if err != nil {
				t.Error(err)
				return
			}
			disks[i] = d
		})
	}
	wg.Wait()
	ids := map[int]bool{}
	for _, d := range disks {
		if d != nil {
			t.Cleanup(func() { closeDevice(t, d) })
		}
	}
	if t.Failed() {
		return
	}
	for i, d := range disks {
		ids[d.ID()] = true
		fd := openForWriters(t, d.Path())
		buf := aligned(4096)
		fill(buf, i, uint64(i+1))
		if _, err := unix.Pwrite(fd, buf, 8192); err != nil {
			t.Error(err)
		}
		_ = unix.Close(fd)
	}
	infos, err := ublk.Devices(context.Background())
	if err != nil || len(infos) != devices || len(ids) != devices {
		t.Errorf("%d devices with %d ids, %d listed (%v), want %d", len(disks), len(ids), len(infos), err, devices)
	}
	for i, d := range disks {
		wg.Go(func() {
			fd := openForWriters(t, d.Path())
			buf := aligned(4096)
			_, err := unix.Pread(fd, buf, 8192)
			_ = unix.Close(fd)
			if got, ok := value(buf, i); err != nil || !ok || got != uint64(i+1) {
				t.Errorf("device %d holds %d (%v), want %d", i, got, err, i+1)
			}
			closeDevice(t, d)
			mustBeGone(t, d)
		})
	}
	wg.Wait()
}

func openForWriters(t testing.TB, path string) int {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return -1
	}
	return fd
}

// usage counts the resources that a process can leak.
type usage struct {
	fds, threads, mappings int
	locked, heap           int // KiB: what I/O buffers are made of, and what is left after a collection
}

func measureUsage() usage {
	debug.FreeOSMemory()
	fds, _ := os.ReadDir("/proc/self/fd")
	threads, _ := os.ReadDir("/proc/self/task")
	maps, _ := os.ReadFile("/proc/self/maps")
	u := usage{fds: len(fds), threads: len(threads), mappings: strings.Count(string(maps), "\n")}
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmLck:"); ok {
			u.locked, _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u.heap = int(m.HeapAlloc >> 10)
	return u
}

// TestRounds makes devices and ends them in every way, again and again. Neither devices nor file descriptors, threads,
// mappings or memory grow.
func TestRounds(t *testing.T) {
	needDriver(t)
	modes := copyModes(t)
	round := func(i int) {
		disk := newRAMDisk(1 << 20)
		o := ublk.Options{Size: 1 << 20, Queues: 1 + i%2, Depth: 16, Copy: modes[i%len(modes)].mode, Discard: i%3 == 0}
		if i%7 > 3 {
			o.Recovery = ublk.RecoverReissue
		}
		ctx, cancel := context.WithTimeout(context.Background(), stepLimit)
		defer cancel()
		d, err := ublk.Create(ctx, o, disk)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 { // dirty data for the end to write back
			f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt([]byte("dirty"), 4096)
			if err = errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
		}
		switch i % 7 {
		case 0, 1:
			err = d.Stop(ctx)
		case 2, 4:
			err = d.Close(ctx)
		case 3:
			err = ublk.StopForTest(d.ID())
			select {
			case <-d.Done():
			case <-ctx.Done():
				err = errors.Join(err, ctx.Err())
			}
		case 5, 6: // another server follows
			if i%7 == 5 {
				err = d.Quiesce(ctx)
			} else {
				ublk.KillForTest(d, errors.New("the ring broke"))
				<-d.Done()
			}
			if err == nil {
				d, err = ublk.Recover(ctx, d.ID(), ublk.RecoverOptions{}, disk)
			}
			if err == nil {
				err = d.Stop(ctx)
			}
		}
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		if i%2 == 0 && string(disk.data[4096:4101]) != "dirty" {
			t.Errorf("round %d: the end did not write back", i)
		}
		mustBeGone(t, d)
	}
	for i := range 8 { // the runtime and the control connection get what they keep
		round(i)
	}
	before := measureUsage()
	n := rounds(20)
	for i := range n {
		round(i)
	}
	time.Sleep(100 * time.Millisecond)
	after := measureUsage()
	t.Logf("before %+v, after %d rounds %+v", before, n, after)
	// The runtime keeps idle threads, but nothing that grows with the rounds. A device's content alone is 1 MiB.
	if after.fds > before.fds || after.threads > before.threads+6 || after.mappings > before.mappings+20 ||
		after.locked > before.locked || after.heap > before.heap+6<<10 {
		t.Errorf("before %+v, after %d rounds %+v", before, n, after)
	}
}

// TestRoundsOfProcesses starts servers and ends or kills them, again and again, while another process has files open.
func TestRoundsOfProcesses(t *testing.T) {
	needDriver(t)
	modes := copyModes(t)
	for i := range rounds(3) {
		c := serverConfig{ID: new(30), Memory: memoryFile(t), Size: 1 << 20, Copy: modes[i%len(modes)].mode}
		s := startProcess(t, c)
		holder := exec.Command("sleep", "60")
		f, err := os.Open("/dev/ublkb30")
		if err != nil {
			t.Fatal(err)
		}
		holder.Stdin = f
		err = holder.Start()
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		if answer := s.ask(t, "stop"); !strings.Contains(answer, "sleep (pid") {
			t.Errorf("stop while open: %s", answer)
		}
		if i%2 == 0 {
			_ = holder.Process.Kill()
			_ = holder.Wait()
			if answer := s.ask(t, "stop"); answer != "OK" {
				t.Errorf("stop: %s", answer)
			}
			s.kill(t)
		} else { // the server goes first
			s.kill(t)
			mustBecome(t, 30, ublk.KernelDead)
			_ = holder.Process.Kill()
			_ = holder.Wait()
			remove(t, 30)
		}
	}
}

// TestStopWritesBack: Stop does not lose data in the page cache if the last user of the disk, which Stop cannot see,
// closes it only later.
func TestStopWritesBack(t *testing.T) {
	needDriver(t)
	for _, recovery := range []ublk.Recovery{ublk.RecoverNone, ublk.RecoverReissue} {
		disk := newRAMDisk(1 << 20)
		d, err := ublk.Create(stopCtx(t), ublk.Options{Size: 1 << 20, Recovery: recovery}, disk)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		copy(m, "dirty")
		if err := d.Stop(stopCtx(t)); !errors.Is(err, ublk.ErrBusy) {
			t.Errorf("%v: Stop of a disk that is mapped: %v", recovery, err)
		}
		stopped := d.State() != ublk.StateLive
		if stopped == kernelHas(t, ublk.FeatureSafeStop) {
			t.Errorf("%v: after Stop the device is %v", recovery, d.State())
		}
		if stopped && string(disk.data[:5]) != "dirty" {
			t.Errorf("%v: Stop has not written back", recovery)
		}
		if err := unix.Munmap(m); err != nil {
			t.Fatal(err)
		}
		if !stopped {
			closeDevice(t, d)
			if string(disk.data[:5]) != "dirty" {
				t.Errorf("%v: the last use has not written back", recovery)
			}
		}
		repeat(t, devicesGone)
	}
}
