package owner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// A process that serves a disk must not wait for memory that becomes free only when that disk has been written. The
// measures against it are taken once, before the first device; Status reports them.

// Reclaim reports which of these measures are in effect. Its JSON is a promise to scripts.
type Reclaim struct {
	IOFlusher      Availability `json:"io_flusher"`
	LockedMemory   Availability `json:"locked_memory"`
	OOMScore       Availability `json:"oom_score_adj"`
	MountNamespace Availability `json:"mount_namespace"`
}

// oomScore protects the process from the out-of-memory killer, since its death stops file systems. -1000 would protect
// it even if it is the process that leaks memory.
const oomScore = -900

// prepareForReclaim takes these measures before the first device, and logs each one that is not available.
func (o *Owner) prepareForReclaim() {
	r := PrepareForReclaim()
	o.limitBuffers()
	o.mu.Lock()
	o.reclaim = &r
	o.mu.Unlock()
	for name, a := range map[string]Availability{
		"io_flusher": r.IOFlusher, "locked_memory": r.LockedMemory,
		"oom_score_adj": r.OOMScore, "mount_namespace": r.MountNamespace,
	} {
		if !a.Available {
			o.opts.Logger.Warn("a disk of this process may wait for itself when memory is short", "lacks", name, "reason", a.Reason)
		}
	}
}

// PrepareForReclaim prepares this process for serving disks, as far as it is permitted to.
func PrepareForReclaim() Reclaim {
	return Reclaim{
		IOFlusher:      availability(ioFlusher()),
		LockedMemory:   availability(lockedMemory()),
		OOMScore:       availability(setOOMScore()),
		MountNamespace: availability(mountNamespace()),
	}
}

func ioFlusher() error {
	if err := ublk.SetIOFlusher(); err != nil {
		return fmt.Errorf("%w (it needs CAP_SYS_RESOURCE)", err)
	}
	return nil
}

// capIPCLock is CAP_IPC_LOCK in linux/capability.h.
const capIPCLock = 14

func lockedMemory() error {
	if has, err := hasCapability("/proc", capIPCLock); err == nil && has {
		return nil
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil {
		return err
	}
	if lim.Cur == unix.RLIM_INFINITY {
		return nil
	}
	return fmt.Errorf("RLIMIT_MEMLOCK is %d KiB, and a device's buffers take some MiB: raise it (LimitMEMLOCK=infinity)", lim.Cur>>10)
}

// hasCapability reports whether a capability is in the effective set of this process (proc_pid_status(5)).
func hasCapability(proc string, bit uint) (bool, error) {
	b, err := os.ReadFile(proc + "/self/status")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			return set&(1<<bit) != 0, err
		}
	}
	return false, errors.New("no CapEff in /proc/self/status")
}

func setOOMScore() error {
	const path = "/proc/self/oom_score_adj" // proc_pid_oom_score_adj(5)
	if b, err := os.ReadFile(path); err == nil {
		if have, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && have <= oomScore {
			return nil
		}
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(oomScore)), 0); err != nil {
		return fmt.Errorf("it cannot be lowered to %d: %w (it needs CAP_SYS_RESOURCE, or OOMScoreAdjust in the unit)", oomScore, err)
	}
	return nil
}

// mountNamespace returns an error if this process's mount namespace is not that of process 1.
func mountNamespace() error {
	self, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	first, err := os.Readlink("/proc/1/ns/mnt")
	if err != nil {
		return fmt.Errorf("it cannot be determined whether it is that of process 1: %w", err)
	}
	if self != first {
		return errors.New("it is not that of process 1: a copy in it of a mount of its own disk is dropped when the disk is " +
			"recovered or ended, unless other processes are in it too")
	}
	return nil
}

// dropMountCopies unmounts the mounts of a device that exist only in this process's mount namespace. They are copies,
// made when the namespace was made. They would hold the device after the real mount is gone, and would be written back
// while this process, the device's server, exits. The device must be served meanwhile.
func dropMountCopies(id int) error {
	if mountNamespace() == nil {
		return nil
	}
	points, err := mountsOf(id)
	if err != nil || len(points) == 0 {
		return err
	}
	if alone, err := aloneInNamespace("/proc"); err != nil {
		return fmt.Errorf("they stay mounted, since others may use them: %w", err)
	} else if !alone {
		return nil
	}
	// Stop propagation first, so that nothing is unmounted in other namespaces.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mounts private: %w", err)
	}
	var errs []error
	for _, p := range slices.Backward(points) {
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// capSysPtrace is CAP_SYS_PTRACE in linux/capability.h. Without it the namespaces of other users' processes cannot be
// read, and the processes may not even be listed (hidepid).
const capSysPtrace = 19

// aloneInNamespace reports whether no other process is in this process's mount namespace. It returns an error if it
// cannot determine that.
func aloneInNamespace(proc string) (bool, error) {
	if has, err := hasCapability(proc, capSysPtrace); err != nil || !has {
		return false, errors.Join(errors.New("the other processes in the mount namespace cannot be listed without CAP_SYS_PTRACE"), err)
	}
	self, err := os.Readlink(proc + "/self/ns/mnt")
	if err != nil {
		return false, err
	}
	links, err := filepath.Glob(proc + "/[0-9]*/ns/mnt")
	if err != nil {
		return false, err
	}
	mine := fmt.Sprintf("%s/%d/ns/mnt", proc, os.Getpid())
	for _, l := range links {
		other, err := os.Readlink(l)
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH):
			// The process has ended.
		case err != nil:
			return false, fmt.Errorf("the other processes in the mount namespace cannot be listed: %w", err)
		case other == self && l != mine:
			return false, nil
		}
	}
	return true, nil
}

// mountsOf returns the mount points of a device and its partitions in this mount namespace (proc_pid_mountinfo(5)).
func mountsOf(id int) (points []string, err error) {
	numbers := map[string]bool{}
	name := fmt.Sprintf("ublkb%d", id)
	for _, pattern := range []string{"/sys/block/" + name + "/dev", "/sys/block/" + name + "/" + name + "p*/dev"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil {
				numbers[strings.TrimSpace(string(b))] = true
			}
		}
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	return mountPoints(numbers, string(text)), err
}

// mountPoints returns the mount points of the devices with the given numbers. A line may have any length: an overlay's
// options make it long.
func mountPoints(numbers map[string]bool, mountinfo string) (points []string) {
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 && numbers[f[2]] {
			points = append(points, unescape(f[4]))
		}
	}
	return points
}

// unescape decodes mountinfo's octal escapes of spaces and the like.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// refuseWaiting refuses a store whose folder is on a device that waits for a server: touching the folder would hang
// until the server comes, and this process may be meant to be that server. It touches nothing in the folder.
func refuseWaiting(ctx context.Context, dir string, o Options) error {
	ids, err := o.driver.BackingDevices(dir)
	if err != nil || len(ids) == 0 {
		return nil // the folder is missing, or the devices below it cannot be determined
	}
	infos, _ := o.driver.Devices(ctx) // those that it can list
	for _, i := range infos {
		if slices.Contains(ids, i.ID) && (i.State == ublk.KernelQuiesced || i.State == ublk.KernelFailIO) {
			return fmt.Errorf("the store's folder %s is on %s, which waits for its server: %w: have that device recovered first", dir, i.Path(), cow.ErrBusy)
		}
	}
	return nil
}
