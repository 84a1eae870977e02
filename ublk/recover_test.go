package ublk_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// phaseDisk keeps a device's bytes in a file, so that they outlive the server.
type phaseDisk struct {
	fd   int
	stop atomic.Uint32 // 1 + the operation whose requests are never answered, or 0
	held chan struct{} // gets one for each of those
}

func openPhaseDisk(t testing.TB, path string, size int64) *phaseDisk {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return &phaseDisk{fd: fd, held: make(chan struct{}, 10000)}
}

func (d *phaseDisk) ServeUBLK(r *ublk.Request) (err error) {
	if d.stop.Load() == 1+uint32(r.Op) {
		d.held <- struct{}{}
		return ublk.ErrAsync
	}
	switch r.Op {
	case ublk.OpRead:
		_, err = unix.Pread(d.fd, r.Buf, r.Offset)
	case ublk.OpWrite:
		_, err = unix.Pwrite(d.fd, r.Buf, r.Offset)
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		err = unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Offset, int64(r.Length))
	}
	return err
}

// phaseServer is this test binary, serving a device in a process of its own.
type phaseServer struct {
	cmd  *exec.Cmd
	gone chan struct{}
}

const (
	serverDisk = 16 << 20
	serverID   = 9
	cookie     = 0x5eedf00d
)

// startPhase starts TestServerProcess, and returns when that reports that it has reached the phase.
func startPhase(t testing.TB, phase, file string, recovery ublk.Recovery) *phaseServer {
	t.Helper()
	s := &phaseServer{cmd: exec.Command(os.Args[0], "-test.run=^TestServerProcess$", "-test.v"), gone: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), "UBLK_TEST_PHASE="+phase, "UBLK_TEST_FILE="+file,
		"UBLK_TEST_RECOVERY="+strconv.Itoa(int(recovery)))
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() {
		defer close(s.gone)
		var all strings.Builder
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if lines.Text() == "READY" {
				ready <- ""
			}
			all.WriteString(lines.Text() + "\n")
		}
		ready <- all.String()
	}()
	t.Cleanup(func() {
		s.kill()
		_ = ublk.Delete(stopCtx(t), serverID, true) // after a failure; else it is gone
	})
	if text := ended(t, stepLimit, fmt.Sprintf("the server's way to %q", phase), ready); text != "" {
		t.Fatalf("the server ended: %s", text)
	}
	return s
}

func (s *phaseServer) kill() {
	_ = s.cmd.Process.Kill()
	select {
	case <-s.gone:
		_ = s.cmd.Wait()
	case <-time.After(30 * time.Second):
		panic(fmt.Sprintf("process %d cannot be killed", s.cmd.Process.Pid))
	}
}

// TestServerProcess is the process that the other tests kill.
func TestServerProcess(t *testing.T) {
	phase := os.Getenv("UBLK_TEST_PHASE")
	if phase == "" {
		t.Skip("runs as a process of other tests")
	}
	n, _ := strconv.Atoi(os.Getenv("UBLK_TEST_RECOVERY"))
	o := ublk.Options{
		ID: new(serverID), Size: serverDisk, Queues: 2, Depth: 16, Recovery: ublk.Recovery(n), Cookie: cookie,
		VolatileCache: true, FUA: true, Discard: true,
	}
	disk := openPhaseDisk(t, os.Getenv("UBLK_TEST_FILE"), serverDisk)
	ready := func() { fmt.Println("READY") }
	stick := func(command string, after bool) {
		if err := ublk.StickForTest(command, after, ready); err != nil {
			t.Fatal(err)
		}
	}
	ctx := context.Background()
	serve := func() *ublk.Device {
		d, err := ublk.Create(ctx, o, disk)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	switch phase {
	case "add":
		stick("ADD", true)
		serve()
	case "fetched":
		stick("START", false)
		serve()
	case "half":
		if err := ublk.HalfFetchForTest(-1, o, disk); err != nil {
			t.Fatal(err)
		}
		ready()
		select {}
	case "start":
		disk.stop.Store(1 + uint32(ublk.OpRead))
		go func() { <-disk.held; ready() }()
		serve()
		select {}
	case "live":
		serve()
		ready()
		select {}
	case "stop", "quiesce":
		d := serve()
		disk.stop.Store(1 + uint32(ublk.OpWrite))
		// In another process, because one that waits for its own disk cannot be killed.
		writer := exec.Command("dd", "if=/dev/zero", "of="+d.Path(), "bs=4k", "count=1", "oflag=direct", "conv=notrunc")
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		<-disk.held
		end := d.Close
		if phase == "quiesce" {
			end = d.Quiesce
		}
		go func() { _ = end(ctx) }()
		time.Sleep(300 * time.Millisecond)
		ready()
		select {}
	case "recover-started":
		stick("START_USER_RECOVERY", true)
		recoverDevice(t, disk)
	case "recover-half":
		if err := ublk.HalfFetchForTest(serverID, o, disk); err != nil {
			t.Fatal(err)
		}
		ready()
		select {}
	case "recover-fetched":
		stick("END_USER_RECOVERY", false)
		recoverDevice(t, disk)
	case "recover-ended":
		stick("END_USER_RECOVERY", true)
		recoverDevice(t, disk)
	}
	t.Fatalf("%q: came to its end", phase)
}

func recoverDevice(t testing.TB, disk ublk.Handler) *ublk.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	d, err := ublk.Recover(ctx, serverID, ublk.RecoverOptions{Cookie: cookie}, disk)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeDevice(t, d) })
	return d
}

// kernelHas reports whether the running kernel has a feature.
func kernelHas(t testing.TB, f ublk.Feature) bool {
	t.Helper()
	set, err := ublk.Features()
	if err != nil {
		t.Fatal(err)
	}
	return set.Has(f)
}

// deleteServed removes the device of a server that was killed.
func deleteServed(t testing.TB) {
	t.Helper()
	if err := ublk.Delete(stopCtx(t), serverID, true); err != nil {
		t.Errorf("Delete: %v", err)
	}
	nothingLeft(t)
}

// checkDisk writes and reads a few blocks.
func checkDisk(t testing.TB, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	w, r := aligned(64<<10), aligned(64<<10)
	copy(w, bytes.Repeat([]byte("recovered "), len(w)/10))
	if _, err := unix.Pwrite(fd, w, 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pread(fd, r, 1<<20); err != nil || !bytes.Equal(r, w) {
		t.Errorf("read back: %v, equal %v", err, bytes.Equal(r, w))
	}
}

// TestKilledBeforeLive: a device whose server died before there was a disk cannot be recovered. It is deleted.
func TestKilledBeforeLive(t *testing.T) {
	needDriver(t)
	for _, phase := range []string{"add", "half", "fetched"} {
		t.Run(phase, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk")
			startPhase(t, phase, file, ublk.RecoverReissue).kill()
			_, err := ublk.Recover(stopCtx(t), serverID, ublk.RecoverOptions{}, openPhaseDisk(t, file, serverDisk))
			if !errors.Is(err, ublk.ErrNotRecoverable) {
				t.Errorf("Recover: %v", err)
			}
			deleteServed(t)
		})
	}
}

// TestKilledStarting kills a server while the kernel reads the partition table. Before Linux 6.19 that happens inside
// START_DEV, with the driver's lock held, and a server that is killed then cannot end; nothing can be done about it
// from here (see the package documentation), and the guest would not survive the test.
func TestKilledStarting(t *testing.T) {
	needDriver(t)
	if !kernelHas(t, ublk.FeatureNoAutoPartScan) {
		t.Log("this kernel reads the partition table in START_DEV")
		return
	}
	file := filepath.Join(t.TempDir(), "disk")
	startPhase(t, "start", file, ublk.RecoverReissue).kill()
	d := recoverDevice(t, openPhaseDisk(t, file, serverDisk))
	checkDisk(t, d.Path())
}

func repeat(t testing.TB, f func() error) {
	t.Helper()
	var err error
	for range 100 {
		if err = f(); err == nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error(err)
}

// TestKilledServing kills a server with a disk in each phase and recovers it, or deletes it.
func TestKilledServing(t *testing.T) {
	needDriver(t)
	for _, phase := range []string{"live", "quiesce", "stop"} {
		for _, then := range []string{"recover", "delete"} {
			t.Run(phase+", "+then, func(t *testing.T) {
				file := filepath.Join(t.TempDir(), "disk")
				startPhase(t, phase, file, ublk.RecoverReissue).kill()
				switch {
				case then == "delete":
					repeat(t, func() error { return ublk.Delete(stopCtx(t), serverID, true) })
					nothingLeft(t)
				default:
					d := recoverDevice(t, openPhaseDisk(t, file, serverDisk))
					checkDisk(t, d.Path())
				}
			})
		}
	}
}

// TestKilledRecovering kills the second server in each phase of its recovery; a third one recovers the device.
func TestKilledRecovering(t *testing.T) {
	needDriver(t)
	for _, phase := range []string{"recover-started", "recover-half", "recover-fetched", "recover-ended"} {
		t.Run(phase, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "disk")
			startPhase(t, "live", file, ublk.RecoverReissue).kill()
			reader := exec.Command("dd", "if=/dev/ublkb9", "of=/dev/null", "bs=64k", "iflag=direct") // waits all the time
			if err := reader.Start(); err != nil {
				t.Fatal(err)
			}
			startPhase(t, phase, file, ublk.RecoverReissue).kill()
			if phase == "recover-half" && !kernelHas(t, ublk.FeatureQuiesce) { // Linux 6.15 is the first that can
				_, err := ublk.Recover(stopCtx(t), serverID, ublk.RecoverOptions{}, openPhaseDisk(t, file, serverDisk))
				if !errors.Is(err, ublk.ErrNotRecoverable) {
					t.Errorf("Recover: %v", err)
				}
				repeat(t, func() error { return ublk.Delete(stopCtx(t), serverID, true) })
				_ = reader.Wait() // with an error, or the end of the disk
				nothingLeft(t)
				return
			}
			d := recoverDevice(t, openPhaseDisk(t, file, serverDisk))
			if err := reader.Wait(); err != nil {
				t.Errorf("the reader: %v", err)
			}
			checkDisk(t, d.Path())
		})
	}
}

// TestRecoverUnderLoad kills the server again and again under a verifying load, which notices nothing.
func TestRecoverUnderLoad(t *testing.T) {
	needDriver(t)
	file := filepath.Join("/dev/shm", "ublk-recover-load")
	defer os.Remove(file)
	s := startPhase(t, "live", file, ublk.RecoverReissue)
	fio := exec.Command("fio", "--name=r", "--filename=/dev/ublkb9", "--ioengine=libaio", "--direct=1", "--rw=randwrite", "--bs=4k",
		"--iodepth=16", "--size=2m", "--verify=crc32c", "--verify_fatal=1", "--time_based", "--runtime=6")
	var out bytes.Buffer
	fio.Stdout, fio.Stderr = &out, &out
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		time.Sleep(time.Second)
		s.kill()
		s = startPhase(t, "recover-ended", file, ublk.RecoverReissue)
	}
	if err := fio.Wait(); err != nil {
		t.Errorf("fio: %v\n%s", err, out.String())
	}
	s.kill()
	closeDevice(t, recoverDevice(t, openPhaseDisk(t, file, serverDisk)))
	nothingLeft(t)
}

// TestRecoverRefusals: only a device that waits for a server, and the one that is meant, is recovered.
func TestRecoverRefusals(t *testing.T) {
	needDriver(t)
	file := filepath.Join(t.TempDir(), "disk")
	disk := openPhaseDisk(t, file, serverDisk)
	refused := func(o ublk.RecoverOptions, want error, text string) {
		t.Helper()
		_, err := ublk.Recover(stopCtx(t), serverID, o, disk)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("want %v (%q), got %v", want, text, err)
		}
	}
	refused(ublk.RecoverOptions{}, ublk.ErrNotFound, "9")
	plain, err := ublk.Create(stopCtx(t), ublk.Options{Size: serverDisk, ID: new(serverID)}, disk)
	if err != nil {
		t.Fatal(err)
	}
	refused(ublk.RecoverOptions{}, ublk.ErrNotRecoverable, "made without recovery")
	if err := plain.Quiesce(stopCtx(t)); !errors.Is(err, ublk.ErrNotRecoverable) {
		t.Errorf("Quiesce without recovery: %v", err)
	}
	closeDevice(t, plain)
	s := startPhase(t, "live", file, ublk.RecoverReissue)
	refused(ublk.RecoverOptions{}, ublk.ErrBusy, fmt.Sprintf("process %d (", s.cmd.Process.Pid))
	if err := ublk.Delete(stopCtx(t), serverID, true); !errors.Is(err, ublk.ErrBusy) {
		t.Errorf("Delete of a device with a server: %v", err)
	}
	s.kill()
	refused(ublk.RecoverOptions{Cookie: 1}, ublk.ErrNotRecoverable, "cookie")
	repeat(t, func() error {
		if err := ublk.Delete(stopCtx(t), serverID, false); !errors.Is(err, ublk.ErrBusy) || !strings.Contains(err.Error(), "waits to be recovered") {
			return fmt.Errorf("delete of what waits, not forced: %w", err)
		}
		return nil
	})
	d := recoverDevice(t, disk)
	o := d.Options()
	if o.Size != serverDisk || o.Queues != 2 || o.Depth != 16 || !o.VolatileCache || !o.FUA || !o.Discard || o.Recovery != ublk.RecoverReissue ||
		o.Cookie != cookie || d.State() != ublk.StateLive {
		t.Errorf("recovered as %+v, %v", o, d.State())
	}
	refused(ublk.RecoverOptions{}, ublk.ErrBusy, fmt.Sprint(os.Getpid()))
	closeDevice(t, d)
	nothingLeft(t)
}

// TestRecoveryWays: what readers and writers see when a server dies, for each Recovery.
func TestRecoveryWays(t *testing.T) {
	needDriver(t)
	for _, w := range []struct {
		way     ublk.Recovery
		owned   error // of a write that the server had
		waiting error // of one that comes while there is no server
	}{
		{ublk.RecoverReissue, nil, nil},
		{ublk.RecoverEIO, syscall.EIO, nil},
		{ublk.RecoverFailIO, syscall.EIO, syscall.EREMOTEIO}, // BLK_STS_TARGET
	} {
		t.Run(fmt.Sprint(w.way), func(t *testing.T) {
			if w.way == ublk.RecoverFailIO && !kernelHas(t, ublk.FeatureRecoveryFailIO) {
				var f *ublk.FeatureError
				_, err := ublk.Create(stopCtx(t), ublk.Options{Size: serverDisk, Recovery: w.way}, newRAMDisk(serverDisk))
				if !errors.As(err, &f) || f.Missing != ublk.FeatureRecoveryFailIO || !errors.Is(err, ublk.ErrKernelTooOld) ||
					!strings.Contains(err.Error(), "USER_RECOVERY_FAIL_IO (since Linux 6.13)") {
					t.Errorf("Create: %v", err)
				}
				return
			}
			disk := openPhaseDisk(t, filepath.Join(t.TempDir(), "disk"), serverDisk)
			disk.stop.Store(1 + uint32(ublk.OpWrite))
			d, err := ublk.Create(stopCtx(t), ublk.Options{Size: serverDisk, ID: new(serverID), Recovery: w.way, Cookie: cookie}, disk)
			if err != nil {
				t.Fatal(err)
			}
			// Both open it while it is served: to open a disk may have to wait for the scan of its partitions, and that
			// for a server.
			first, second := openDirect(t, d, unix.O_RDWR), openDirect(t, d, unix.O_RDWR)
			write := func(fd int) chan error {
				done := make(chan error, 1)
				go func() { _, err := unix.Pwrite(fd, aligned(4096), 0); _ = unix.Close(fd); done <- err }()
				return done
			}
			owned := write(first)
			<-disk.held
			broken := errors.New("the ring broke")
			ublk.KillForTest(d, broken)
			ended(t, stepLimit, "the device", d.Done())
			if !errors.Is(d.Err(), broken) || d.State() != ublk.StateQuiesced {
				t.Errorf("a device with recovery whose queues broke: %v, %v", d.State(), d.Err())
			}
			waiting := write(second)
			time.Sleep(100 * time.Millisecond)
			disk.stop.Store(0)
			again := recoverDevice(t, disk)
			if err := <-owned; !errors.Is(err, w.owned) {
				t.Errorf("what the server had: %v", err)
			}
			if err := <-waiting; !errors.Is(err, w.waiting) {
				t.Errorf("what came meanwhile: %v", err)
			}
			checkDisk(t, again.Path())
		})
	}
}

// nothingLeft checks that the driver has no device.
func nothingLeft(t testing.TB) {
	t.Helper()
	if err := devicesGone(); err != nil {
		t.Errorf("left: %v", err)
	}
}
