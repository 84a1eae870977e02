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

// A process that serves a disk must not wait for memory that is only free when that disk has been written. What guards
// against it is done once, before the first device, and told by Status.

// Reclaim says what of that there is. Its JSON is a promise to scripts.
type Reclaim struct {
	IOFlusher      Availability `json:"io_flusher"`
	LockedMemory   Availability `json:"locked_memory"`
	OOMScore       Availability `json:"oom_score_adj"`
	MountNamespace Availability `json:"mount_namespace"`
}

// oomScore keeps the out-of-memory killer off a process whose death stops file systems; -1000 would exempt it even
// when it is the one that leaks.
const oomScore = -900

// prepareForReclaim is done before the first device.
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

// PrepareForReclaim makes this process one that may serve disks, as far as it is allowed to.
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

// capIPCLock is CAP_IPC_LOCK of linux/capability.h.
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

// hasCapability looks at the effective set in proc_pid_status(5).
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

// mountNamespace is an error in a mount namespace that is not that of process 1.
func mountNamespace() error {
	self, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	first, err := os.Readlink("/proc/1/ns/mnt")
	if err != nil {
		return fmt.Errorf("whether it is that of process 1 cannot be told: %w", err)
	}
	if self != first {
		return errors.New("it is not that of process 1: a copy in it of a mount of its own disk is dropped when the disk is " +
			"recovered or ended, unless other processes are in it too")
	}
	return nil
}

// dropMountCopies unmounts the mounts of a device that only this process has: copies, made with its mount namespace,
// which would hold the device after the real mount is gone, and be written back while this process, its server, exits.
// Somebody must serve the device meanwhile.
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
	// First cut the ties, so that nothing is unmounted for anybody else.
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

// capSysPtrace is CAP_SYS_PTRACE of linux/capability.h. Without it other users' processes do not tell their namespaces,
// and may not even be listed (hidepid).
const capSysPtrace = 19

// aloneInNamespace reports whether no other process has this process's mount namespace. It is an error when that cannot be
// known.
func aloneInNamespace(proc string) (bool, error) {
	if has, err := hasCapability(proc, capSysPtrace); err != nil || !has {
		return false, errors.Join(errors.New("who else is in the mount namespace cannot be seen without CAP_SYS_PTRACE"), err)
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
			// It has ended.
		case err != nil:
			return false, fmt.Errorf("who else is in the mount namespace cannot be seen: %w", err)
		case other == self && l != mine:
			return false, nil
		}
	}
	return true, nil
}

// mountsOf lists the mount points in this namespace of a device and its partitions (proc_pid_mountinfo(5)).
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

// mountPoints finds those of the devices with the numbers. Lines may be of any length: the options of an overlay are.
func mountPoints(numbers map[string]bool, mountinfo string) (points []string) {
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 && numbers[f[2]] {
			points = append(points, unescape(f[4]))
		}
	}
	return points
}

// unescape undoes mountinfo's octal escapes of blanks and the like.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// refuseWaiting refuses a store whose folder is on a device that waits for a server: touching it would hang until that
// comes, and it may be the one that is to come. Nothing in the folder is touched.
func refuseWaiting(ctx context.Context, dir string, o Options) error {
	ids, err := o.driver.RestsOn(dir)
	if err != nil || len(ids) == 0 {
		return nil // not there, or on something whose parts cannot be told
	}
	infos, _ := o.driver.Devices(ctx) // those that it can tell of
	for _, i := range infos {
		if slices.Contains(ids, i.ID) && (i.State == ublk.KernelQuiesced || i.State == ublk.KernelFailIO) {
			return fmt.Errorf("the store's folder %s is on %s, which waits for its server: %w: have that device recovered first", dir, i.Path(), cow.ErrBusy)
		}
	}
	return nil
}
