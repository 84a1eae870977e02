package owner

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/ublk"
)

// MachineFeatures describes what a machine offers vdisk. Its JSON is a promise to scripts.
type MachineFeatures struct {
	Kernel    string       `json:"kernel"`
	Ublk      UblkFeatures `json:"ublk"`
	IOUring   Availability `json:"io_uring"`
	NBDServer Availability `json:"nbd_server"`
	NBDClient Availability `json:"nbd_client"` // nbd-client and /dev/nbdN of the kernel
}

// Availability reports whether something is available, and if not, why.
type Availability struct {
	Available bool   `json:"available"`
	Reason    string `json:"reason,omitempty"`
}

// UblkFeatures describes the ublk driver and its features.
type UblkFeatures struct {
	Availability
	Features []UblkFeature `json:"features"`
}

// UblkFeature is one feature of the ublk driver, and the first Linux release that has it.
type UblkFeature struct {
	Name  string `json:"name"`
	Since string `json:"since"`
}

func availability(err error) Availability {
	if err != nil {
		return Availability{Reason: err.Error()}
	}
	return Availability{Available: true}
}

// Machine asks the kernel for its features.
func Machine() MachineFeatures {
	set, err := ublk.Features()
	m := MachineFeatures{
		Kernel: set.Kernel, Ublk: UblkFeatures{Availability: availability(err), Features: []UblkFeature{}},
		IOUring: availability(probeRing()), NBDServer: Availability{Available: true}, NBDClient: availability(probeNBD()),
	}
	for _, f := range ublk.KnownFeatures() {
		if set.Has(f.Feature) {
			m.Ublk.Features = append(m.Ublk.Features, UblkFeature{f.Name, f.Since})
		}
	}
	return m
}

// probeRing tests whether io_uring works by making the smallest ring.
func probeRing() error {
	var params [120]byte // struct io_uring_params of include/uapi/linux/io_uring.h
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	switch errno {
	case 0:
		return unix.Close(int(fd))
	case unix.ENOSYS:
		return fmt.Errorf("the kernel has none: %w", errno)
	case unix.EPERM:
		return fmt.Errorf("it is switched off for this process (kernel.io_uring_disabled, or a seccomp filter): %w", errno)
	}
	return errno
}

func probeNBD() error {
	if _, err := os.Stat("/sys/block/nbd0"); err != nil {
		return fmt.Errorf("the driver is not loaded: run 'modprobe nbd'")
	}
	return nil
}

// loadDriver loads the ublk driver as the kernel itself would, so that attaching needs no set-up. It reports whether
// that succeeded. If not, the user sees the error that the driver is missing.
func loadDriver(ctx context.Context) bool {
	path, err := os.ReadFile("/proc/sys/kernel/modprobe") // proc(5)
	if err != nil || os.Geteuid() != 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return exec.CommandContext(ctx, strings.TrimSpace(string(path)), "ublk_drv").Run() == nil
}
