package powercut

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/ublk"
	"golang.org/x/sys/unix"
)

const (
	lower     = "/mnt/lower" // the file system below the store
	upper     = "/mnt/upper" // the one on a volume
	storeDir  = lower + "/store"
	images    = "/tmp/powercut" // in memory
	patience  = 5 * time.Minute // no command takes that long: everything is emulated, but small
	bootID    = "/proc/sys/kernel/random/boot_id"
	ourBootID = images + "/boot_id"
)

// needGuest skips a test outside of the guest, and makes the guest ready.
func needGuest(t *testing.T) {
	t.Helper()
	if os.Getenv("VDISK_GUEST") != "1" {
		t.Skip("runs in the guest only")
	}
	sh(t, "modprobe", "-a", "loop", "dm_mod", "dm_flakey", "dm_log_writes", "ublk_drv", "xfs")
	sh(t, "mkdir", "-p", lower, upper, images)
	t.Cleanup(func() { os.RemoveAll(images) })
	if err := os.WriteFile(ourBootID, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	sh(t, "mount", "--bind", ourBootID, bootID)
	t.Cleanup(func() { sh(t, "umount", bootID) })
	t.Cleanup(func() {
		if t.Failed() {
			cleanUp(t)
		}
	})
	reboot(t)
}

// cleanUp leaves nothing of a test that failed to the next tests.
func cleanUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	killVdisk(t)
	_ = exec.CommandContext(ctx, "sh", "-c", "fuser -kM -m "+lower+"; umount -l "+upper+" "+lower).Run()
	devices, err := ublk.Devices(ctx)
	for _, d := range devices {
		err = errors.Join(err, ublk.Delete(ctx, d.ID, true))
	}
	if err != nil {
		t.Log("clean up:", err)
	}
}

// reboot takes away what no power cut leaves: shared memory, and the id of the boot.
func reboot(t *testing.T) {
	t.Helper()
	buffers, _ := filepath.Glob("/dev/shm/vdisk-*") // the pattern is good
	for _, b := range buffers {
		if err := os.Remove(b); err != nil {
			t.Fatal(err)
		}
	}
	var r [16]byte
	rand.Read(r[:])
	id := fmt.Sprintf("%x-%x-%x-%x-%x\n", r[:4], r[4:6], r[6:8], r[8:10], r[10:])
	if err := os.WriteFile(ourBootID, []byte(id), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// powerOff ends all of vdisk's processes and every block device, waits for their users to stop, and unmounts everything.
// Nothing of this reaches a disk that has lost its power, and nothing needs a file on it: XFS reads none once a write of
// its log has failed.
func powerOff(t *testing.T, stop func()) {
	t.Helper()
	wait(t, "vdisk's processes to die", func() bool { return !killVdisk(t) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	devices, err := ublk.Devices(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, d := range devices { // a device that is mounted fails its requests, and goes when it is unmounted
		wg.Go(func() {
			if err := ublk.Delete(ctx, d.ID, true); err != nil && !errors.Is(err, ublk.ErrBusy) {
				t.Error(err)
			}
		})
	}
	stop()
	unmount(t, upper)
	unmount(t, lower)
	wg.Wait()
	wait(t, "the block devices to go", func() bool {
		left, err := ublk.Devices(ctx)
		return err == nil && len(left) == 0
	})
}

// killVdisk kills vdisk's processes, and reports whether there were any.
func killVdisk(t *testing.T) (found bool) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && isVdisk(pid) {
			found = true
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
	return found
}

func isVdisk(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)) // there is none once it is dead
	return err == nil && strings.HasPrefix(filepath.Base(exe), "vdisk")
}

// wait waits for a condition, but not for ever.
func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			stacks := make([]byte, 1<<20)
			processes, _ := exec.Command("ps", "-eo", "pid,stat,wchan:24,args").Output()
			t.Fatalf("waited for ever for %s\n%s\n%s", what, stacks[:runtime.Stack(stacks, true)], processes)
		}
	}
}

// sh runs a program and returns what it printed.
func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := try(ctx, nil, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

// vdisk runs a command on the store and returns what it printed.
func vdisk(t *testing.T, args ...string) string {
	t.Helper()
	return sh(t, "vdisk", args...)
}

// try runs a program with the store in its environment. If stdout is nil, what the program prints is returned; errors
// always are. A program that has to be stopped leaves its stacks.
func try(ctx context.Context, stdout io.Writer, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "VDISK_STORE="+storeDir, "VDISK_LOCK_TIMEOUT=60s")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if stdout != nil {
		cmd.Stdout = stdout
	}
	err := cmd.Run()
	return out.String(), err
}

// loopDevice makes a sparse file of some MiB in memory, and a block device of it. Both go with the test.
func loopDevice(t *testing.T, name string, mib int64) (dev, file string) {
	t.Helper()
	file = filepath.Join(images, name)
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(mib<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	dev = sh(t, "losetup", "-f", "--show", file)
	t.Cleanup(func() {
		_ = exec.Command("losetup", "-d", dev).Run()
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	return dev, file
}

// dmDevice makes a device of device mapper, which goes with the test.
func dmDevice(t *testing.T, name, table string) string {
	t.Helper()
	sh(t, "dmsetup", "create", name, "--noudevsync", "--table", table)
	sh(t, "dmsetup", "mknodes", name)
	t.Cleanup(func() { _ = exec.Command("dmsetup", "remove", "--force", "--noudevsync", name).Run() })
	return "/dev/mapper/" + name
}

func sectors(mib int64) int64 { return mib << 20 / 512 }

func mkfs(t *testing.T, kind, dev string) {
	t.Helper()
	if kind == "ext4" {
		sh(t, "mkfs.ext4", "-q", "-F", dev)
	} else {
		sh(t, "mkfs.xfs", "-q", "-f", dev)
	}
}

// replayAndCheck mounts a file system, which replays its journal, checks it, and mounts it again.
func replayAndCheck(t *testing.T, kind, dev, at string) {
	t.Helper()
	sh(t, "mount", "-t", kind, dev, at)
	unmount(t, at)
	if kind == "ext4" {
		sh(t, "e2fsck", "-fn", dev)
	} else {
		sh(t, "xfs_repair", "-n", dev)
	}
	sh(t, "mount", "-t", kind, dev, at)
}

// unmount unmounts what is mounted, if anything is. udev may be looking at it.
func unmount(t *testing.T, at string) {
	t.Helper()
	wait(t, "unmounting "+at, func() bool {
		err := unix.Unmount(at, 0)
		if errors.Is(err, unix.EINVAL) {
			return true
		}
		if err != nil && !errors.Is(err, unix.EBUSY) {
			t.Fatalf("unmount %s: %v", at, err)
		}
		return err == nil
	})
}
