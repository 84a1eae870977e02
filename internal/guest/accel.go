package guest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// machine is how QEMU executes the guest's processors.
type machine struct{ accel, cpu string }

var kvm = machine{accel: "kvm", cpu: "host"}

// emulated are the machines to try in turn without KVM. QEMU 7.2 sometimes gets cmpxchg16b wrong, and then the
// allocator of Linux 6.12 panics; kernels can do without the instruction. Emulated processors of QEMU before 8.1
// sometimes fail to boot, because of a race on translated code, which its commit deba78709ae8 fixed. A boot that does
// not reach the payload is safe to repeat.
var emulated = []machine{
	{"tcg,thread=multi", "max,-cx16"},
	{"tcg,thread=multi", "max"},
	{"tcg,thread=multi", "max,-cx16"},
}

// probeTimeout is many times as long as a kernel needs to reach its first program under a KVM that works.
const probeTimeout = 10 * time.Second

// accelProbe remembers whether KVM works.
type accelProbe struct {
	once sync.Once
	kvm  bool
}

// machines lists the machines to try. KVM counts only if it has booted the kernel: a /dev/kvm that can be opened, and
// that even runs real-mode code, may still fail on the first long-mode kernel (nested and emulated KVMs).
func (img *Image) machines(ctx context.Context, k Kernel) []machine {
	img.accel.once.Do(func() {
		switch os.Getenv("VDISK_GUEST_ACCEL") {
		case "tcg":
		case "kvm":
			img.accel.kvm = true
		default:
			img.accel.kvm = img.probeKVM(ctx, k)
		}
	})
	if img.accel.kvm {
		return []machine{kvm}
	}
	return emulated
}

func (img *Image) probeKVM(ctx context.Context, k Kernel) bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	dir, err := os.MkdirTemp("", "vdisk-guest-probe-")
	if err != nil {
		return false
	}
	defer os.RemoveAll(dir)
	initrd := filepath.Join(dir, "initrd")
	if img.writeInitrd(k, initrd) != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	args := append(baseArgs(kvm, 2, 512), "-kernel", k.vmlinuz(), "-initrd", initrd, "-serial", "stdio",
		"-append", "console=ttyS0 panic=-1 quiet vdisk.probe")
	cmd := exec.CommandContext(ctx, qemuProgram(), args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	return err == nil && strings.Contains(string(out), "VDISK-PROBE-OK")
}
