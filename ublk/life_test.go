package ublk_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

func stopCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// mustBeGone checks that nothing of the device is left.
func mustBeGone(t testing.TB, d *ublk.Device) {
	t.Helper()
	select {
	case <-d.Done():
	default:
		t.Error("the device is not done")
	}
	for _, path := range []string{d.Path(), strings.Replace(d.Path(), "ublkb", "ublkc", 1)} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}
	infos, err := ublk.Devices(context.Background())
	for _, i := range infos {
		if i.ID == d.ID() {
			t.Errorf("the driver still has %+v", i)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func TestDeviceRounds(t *testing.T) {
	needDriver(t)
	count := func() (fds, threads, maps int) {
		entries, _ := os.ReadDir("/proc/self/fd")
		tasks, _ := os.ReadDir("/proc/self/task")
		m, _ := os.ReadFile("/proc/self/maps")
		return len(entries), len(tasks), strings.Count(string(m), "\n")
	}
	round := func(i int) {
		disk := newRAMDisk(1 << 20)
		d := create(t, ublk.Options{Size: 1 << 20, Queues: 2, Depth: 16}, disk)
		if i%2 == 0 {
			f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteAt(make([]byte, 100<<10), 4096) // dirty data for the stop to write back
			if err != nil || f.Close() != nil {
				t.Fatal(err)
			}
		}
		if err := d.Stop(stopCtx(t)); err != nil {
			t.Fatal(err)
		}
		mustBeGone(t, d)
		if d.Err() != nil || d.State() != ublk.StateDead {
			t.Errorf("after Stop: %v, %v", d.State(), d.Err())
		}
	}
	for i := range 5 {
		round(i)
	}
	fds, threads, maps := count()
	n := 50
	if testing.Short() {
		n = 25 // more than the mappings that may be the runtime's
	}
	for i := range n {
		round(i)
	}
	time.Sleep(200 * time.Millisecond)
	// The runtime keeps idle threads and heap maps of its own, but not one a round.
	if f, th, m := count(); f > fds || th > threads+6 || m > maps+20 {
		t.Errorf("after %d rounds: fds %d → %d, threads %d → %d, mappings %d → %d", n, fds, f, threads, th, maps, m)
	}
}

// TestStopSyncs: dirty pages of a closed file reach the handler during the stop.
func TestStopSyncs(t *testing.T) {
	needDriver(t)
	disk := newRAMDisk(8 << 20)
	d := create(t, ublk.Options{Size: 8 << 20}, laterDisk{disk})
	dir := t.TempDir()
	run(t, "mkfs.ext4", "-q", d.Path())
	run(t, "mount", d.Path(), dir)
	run(t, "sh", "-c", "echo precious > "+dir+"/file")
	run(t, "umount", dir)
	if err := d.Stop(stopCtx(t)); err != nil {
		t.Fatal(err)
	}
	again := create(t, ublk.Options{Size: 8 << 20}, disk)
	run(t, "mount", again.Path(), dir)
	got := run(t, "cat", dir+"/file")
	run(t, "umount", dir)
	if got != "precious\n" {
		t.Errorf("read %q", got)
	}
}

func TestStopUnderLoad(t *testing.T) {
	needDriver(t)
	times := 4
	if testing.Short() {
		times = 2
	}
	for i := range times {
		disk := newRAMDisk(32 << 20)
		d := create(t, ublk.Options{Size: 32 << 20, Queues: 2}, laterDisk{disk})
		fio := exec.Command("fio", "--name=s", "--filename="+d.Path(), "--ioengine=libaio", "--direct=1", "--rw=randrw",
			"--bs=4k", "--iodepth=32", "--numjobs=2", "--time_based", "--runtime=20")
		if err := fio.Start(); err != nil {
			t.Fatal(err)
		}
		for wait := 0; disk.ops[ublk.OpWrite].Load() < 200 && wait < 1000; wait++ {
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Duration(100*i) * time.Millisecond)
		if err := d.Stop(stopCtx(t)); !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), "fio") {
			t.Errorf("Stop under fio: %v", err)
		}
		if d.State() != ublk.StateLive {
			t.Errorf("after a refused Stop: %v", d.State())
		}
		if err := d.Close(stopCtx(t)); err != nil && !errors.Is(err, ublk.ErrBusy) {
			t.Errorf("Close under fio: %v", err)
		}
		_ = fio.Wait() // it fails when its disk goes
		for range 50 { // the device goes when fio has closed it
			if _, err := os.Stat(strings.Replace(d.Path(), "ublkb", "ublkc", 1)); err != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		mustBeGone(t, d)
	}
}

func TestStopRefusesUsers(t *testing.T) {
	needDriver(t)
	disk := newRAMDisk(64 << 20)
	d := create(t, ublk.Options{Size: 64 << 20}, disk)
	run(t, "mkfs.ext4", "-q", d.Path())
	dir := t.TempDir()
	refused := func(what string) {
		t.Helper()
		err := d.Stop(stopCtx(t))
		if !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), what) {
			t.Errorf("want ErrBusy for %q, got %v", what, err)
		}
	}
	run(t, "mount", d.Path(), dir)
	refused("mounted on " + dir)
	run(t, "sh", "-c", "echo still there > "+dir+"/f && sync && cat "+dir+"/f")
	run(t, "umount", dir)

	sleeper := exec.Command("sleep", "60")
	f, err := os.Open(d.Path())
	if err != nil {
		t.Fatal(err)
	}
	sleeper.Stdin = f
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	refused("sleep (pid ")
	_ = sleeper.Process.Kill()
	_ = sleeper.Wait()

	if err := d.Stop(stopCtx(t)); err != nil {
		t.Errorf("free again: %v", err)
	}
	mustBeGone(t, d)
	if err := d.Stop(stopCtx(t)); err != nil {
		t.Errorf("a second Stop: %v", err)
	}
}

// TestCloseIsConcurrent: any number of Stop and Close at once end the device once.
func TestCloseIsConcurrent(t *testing.T) {
	needDriver(t)
	for range 10 {
		d := create(t, ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20))
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				end := d.Stop
				if i%2 == 0 {
					end = d.Close
				}
				if err := end(stopCtx(t)); err != nil {
					t.Errorf("%v", err)
				}
			})
		}
		wg.Wait()
		mustBeGone(t, d)
	}
}

// TestCloseIsBounded: a handler that does not answer delays the stop, but not its caller. The stop ends with the
// answer.
func TestCloseIsBounded(t *testing.T) {
	needDriver(t)
	var mu sync.Mutex
	var held []*ublk.Request
	holding := true
	disk := newRAMDisk(1 << 20)
	d := create(t, ublk.Options{Size: 1 << 20}, handlerFunc(func(r *ublk.Request) error {
		mu.Lock()
		defer mu.Unlock()
		if holding && r.Op == ublk.OpWrite {
			held = append(held, r)
			return ublk.ErrAsync
		}
		return disk.ServeUBLK(r)
	}))
	fd := openDirect(t, d, unix.O_RDWR)
	wrote := make(chan error, 1)
	go func() { _, err := unix.Pwrite(fd, aligned(4096), 0); wrote <- err }()
	time.Sleep(300 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := d.Close(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 5*time.Second {
		t.Errorf("Close with a request open: %v after %v", err, time.Since(begin))
	}
	mu.Lock()
	holding = false
	for _, r := range held {
		r.Complete(nil)
	}
	mu.Unlock()
	if err := <-wrote; err != nil {
		t.Errorf("the held write: %v", err)
	}
	_ = unix.Close(fd)
	if err := d.Close(stopCtx(t)); err != nil && !errors.Is(err, ublk.ErrBusy) {
		t.Error(err)
	}
}

func TestCreateRefusals(t *testing.T) {
	needDriver(t)
	ctx := stopCtx(t)
	d := create(t, ublk.Options{Size: 1 << 20, ID: new(5)}, newRAMDisk(1<<20))
	if d.ID() != 5 || d.Path() != "/dev/ublkb5" {
		t.Errorf("asked for 5, got %d", d.ID())
	}
	if _, err := ublk.Create(ctx, ublk.Options{Size: 1 << 20, ID: new(5)}, newRAMDisk(1<<20)); !errors.Is(err, ublk.ErrExists) {
		t.Errorf("a taken id: %v", err)
	}
	if err := ublk.Delete(stopCtx(t), 5, false); !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("Delete of a served device: %v", err)
	}
	if err := ublk.Delete(stopCtx(t), 77, false); !errors.Is(err, ublk.ErrNotFound) {
		t.Errorf("Delete of nothing: %v", err)
	}
	set, err := ublk.Features()
	if err != nil || !set.Has(ublk.FeatureIoctlEncode) {
		t.Errorf("Features: %v, %v", set.Names(), err)
	}
	t.Logf("kernel %s: %s", set.Kernel, strings.Join(set.Names(), " "))
	if d.Features()&ublk.FeatureIoctlEncode == 0 {
		t.Errorf("granted: %v", ublk.FeatureSet{Bits: d.Features()}.Names())
	}
	// A context that is over leaves nothing behind.
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := ublk.Create(over, ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Create: %v", err)
	}
	if infos, err := ublk.Devices(context.Background()); err != nil || len(infos) != 1 || infos[0].ID != 5 {
		t.Errorf("Devices: %+v, %v", infos, err)
	}
}

// TestCreateCancelled ends the context at every moment of Create, and finds nothing left.
func TestCreateCancelled(t *testing.T) {
	needDriver(t)
	for delay := range 40 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(delay)*500*time.Microsecond)
		d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20))
		if err == nil {
			closeDevice(t, d)
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %d × 0.5 ms: %v", delay, err)
		}
		cancel()
	}
	if infos, err := ublk.Devices(context.Background()); err != nil || len(infos) != 0 {
		t.Errorf("left behind: %+v, %v", infos, err)
	}
}

// TestServerDeath kills a server under load and removes what is left of its device.
func TestServerDeath(t *testing.T) {
	needDriver(t)
	if os.Getenv("UBLK_TEST_SERVER") == "1" {
		d := create(t, ublk.Options{Size: 16 << 20, ID: new(9)}, laterDisk{newRAMDisk(16 << 20)})
		fmt.Println("READY", d.Path())
		<-d.Done()
		return
	}
	server := exec.Command(os.Args[0], "-test.run=^TestServerDeath$")
	server.Env = append(os.Environ(), "UBLK_TEST_SERVER=1")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if _, err := os.Stat("/dev/ublkb9"); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	fio := exec.Command("fio", "--name=k", "--filename=/dev/ublkb9", "--ioengine=libaio", "--direct=1", "--rw=randwrite",
		"--bs=4k", "--iodepth=16", "--time_based", "--runtime=10")
	_ = fio.Start()
	time.Sleep(1500 * time.Millisecond)
	if err := ublk.Delete(stopCtx(t), 9, false); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("Delete of a device with a live server: %v", err)
	}
	_ = server.Process.Kill()
	_ = server.Wait()
	if err := fio.Wait(); err == nil {
		t.Error("fio did not notice the death of its disk")
	}
	var err error
	for range 50 {
		if err = ublk.Delete(stopCtx(t), 9, false); !errors.Is(err, ublk.ErrBusy) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("Delete of the orphan: %v", err)
	}
	if infos, err := ublk.Devices(context.Background()); err != nil || len(infos) != 0 {
		t.Errorf("left: %+v, %v", infos, err)
	}
}

// TestStoppedFromOutside: another process's STOP ends the device, and Err says so.
func TestStoppedFromOutside(t *testing.T) {
	needDriver(t)
	d := create(t, ublk.Options{Size: 1 << 20}, newRAMDisk(1<<20))
	if err := ublk.StopForTest(d.ID()); err != nil {
		t.Fatal(err)
	}
	ended(t, stepLimit, "the device", d.Done())
	if !errors.Is(d.Err(), ublk.ErrStopped) {
		t.Errorf("Err: %v", d.Err())
	}
	mustBeGone(t, d)
}

// TestQueueFailure: a device with a broken queue fails its open requests, ends by itself, and Err returns the reason.
func TestQueueFailure(t *testing.T) {
	needDriver(t)
	broken := errors.New("the ring broke")
	for _, how := range []string{"error", "goexit"} {
		t.Run(how, func(t *testing.T) {
			disk := newRAMDisk(1 << 20)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			started := make(chan struct{}, 100)
			d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 20, Queues: 2}, handlerFunc(func(r *ublk.Request) error {
				if r.Op != ublk.OpWrite {
					return disk.ServeUBLK(r)
				}
				started <- struct{}{}
				if how == "goexit" {
					runtime.Goexit()
				}
				return ublk.ErrAsync // never
			}))
			if err != nil {
				t.Fatal(err)
			}
			fd := openDirect(t, d, unix.O_RDWR)
			wrote := make(chan error, 1)
			go func() { _, err := unix.Pwrite(fd, aligned(4096), 0); wrote <- err }()
			<-started
			if how == "error" {
				ublk.KillForTest(d, broken)
			}
			if err := ended(t, stepLimit, "the open write", wrote); err == nil {
				t.Error("the open write succeeded")
			}
			_ = unix.Close(fd)
			ended(t, stepLimit, "the device", d.Done())
			if err := d.Err(); err == nil || how == "error" && !errors.Is(err, broken) || errors.Is(err, ublk.ErrStopped) {
				t.Errorf("Err: %v", err)
			}
			if err := d.Close(ctx); err == nil {
				t.Error("Close does not tell of the failure")
			}
			mustBeGone(t, d)
		})
	}
}

// TestQueueFailureInClose: while Close waits for the file system's data to be written back, by flushing (with recovery)
// or in STOP (without), a queue that breaks ends the wait.
func TestQueueFailureInClose(t *testing.T) {
	needDriver(t)
	for name, recovery := range map[string]ublk.Recovery{"recovery": ublk.RecoverReissue, "none": ublk.RecoverNone} {
		t.Run(name, func(t *testing.T) { queueFailureInClose(t, recovery) })
	}
}

func queueFailureInClose(t *testing.T, recovery ublk.Recovery) {
	held := make(chan struct{}, 1000)
	disk := newRAMDisk(1 << 20)
	d, err := ublk.Create(stopCtx(t), ublk.Options{Size: 1 << 20, Recovery: recovery}, handlerFunc(func(r *ublk.Request) error {
		if r.Op != ublk.OpWrite {
			return disk.ServeUBLK(r)
		}
		held <- struct{}{}
		return ublk.ErrAsync // never
	}))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- d.Close(stopCtx(t)) }()
	<-held // it is being written back
	broken := errors.New("the ring broke")
	ublk.KillForTest(d, broken)
	select {
	case err := <-closed:
		if !errors.Is(err, broken) {
			t.Errorf("Close: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("Close waits for what nobody serves")
		_ = ublk.StopForTest(d.ID())
	}
	_ = f.Close()
	repeat(t, func() error {
		if _, err := os.Stat(d.Path()); err == nil {
			return errors.New("the disk is still there")
		}
		return nil
	})
}

// TestCloseIsSideBySide: when several open devices are closed at once, they lose their disks together, and not one
// after the other.
func TestCloseIsSideBySide(t *testing.T) {
	needDriver(t)
	var files []*os.File
	var wg sync.WaitGroup
	for i := range 4 {
		o := ublk.Options{Size: 1 << 20, Depth: 4}
		if i%2 == 0 {
			o.Recovery = ublk.RecoverReissue
		}
		d, err := ublk.Create(stopCtx(t), o, newRAMDisk(1<<20))
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(d.Path(), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
		wg.Go(func() {
			if err := d.Close(stopCtx(t)); err != nil && !errors.Is(err, ublk.ErrBusy) {
				t.Error(err)
			}
			if _, err := os.Stat(d.Path()); err == nil {
				t.Errorf("%s is still there", d.Path())
			}
		})
	}
	wg.Wait()
	for _, f := range files {
		_ = f.Close()
	}
	repeat(t, func() error {
		if infos, err := ublk.Devices(context.Background()); err != nil || len(infos) > 0 {
			return fmt.Errorf("left: %+v, %w", infos, err)
		}
		return nil
	})
}
