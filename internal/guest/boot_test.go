package guest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bootable returns the real image, built if need be, when the environment asks for boots: they take minutes.
func bootable(t *testing.T) *Image {
	t.Helper()
	if os.Getenv("VDISK_GUEST_BOOT") != "1" {
		t.Skip("set VDISK_GUEST_BOOT=1 to boot real guests")
	}
	img, err := Build(t.Context(), Options{Log: testLog{t}})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

func bootRun(t *testing.T, img *Image, r Run) (*Result, string, error) {
	t.Helper()
	var out bytes.Buffer
	r.Stdout = &out
	if r.Timeout == 0 {
		r.Timeout = 4 * time.Minute
	}
	res, err := img.Run(t.Context(), r)
	if res != nil {
		t.Logf("%s %s: boot %v, all %v", res.Release, res.Machine, res.Boot, res.Elapsed)
		for _, f := range res.Failed {
			t.Logf("tried again: %v", f)
		}
	}
	return res, out.String(), err
}

const bootScript = `set -e
modprobe -a ublk_drv nbd loop fuse dm_mod dm_flakey
[ -c /dev/ublk-control ] && [ -b /dev/nbd0 ]
grep -q " / ext4 rw" /proc/mounts; grep -q " /scratch ext4 rw" /proc/mounts; grep -q " /dev/shm " /proc/mounts
[ "$VDISK_GUEST $VDISK_SCRATCH $VDISK_RESULTS $HOME $(hostname)" = "1 /scratch /results /root guest" ]
[ "$(</payload/sub/file)" = "from the host" ]
ping="$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); socket.create_connection(s.getsockname()); print("lo")')"; [ $ping = lo ]
udevadm control --ping --timeout=20
for p in mkfs.ext4 mkfs.xfs xfs_repair e2fsck losetup nbdinfo nbdcopy nbdfuse nbd-client qemu-img qemu-io fusermount3 dmsetup strace blkdiscard; do command -v $p >/dev/null || { echo "no $p"; exit 9; }; done
fio --name=f --directory=/scratch --size=4M --bs=4k --rw=randwrite --verify=crc32c --ioengine=libaio --direct=1 >/results/fio.txt
head -c 3000000 /dev/zero | tr '\0' x # output of some size comes whole
echo; echo "to stderr" >&2
exit 42
`

func TestBootEachKernel(t *testing.T) {
	img := bootable(t)
	host := filepath.Join(t.TempDir(), "file")
	write(t, host, "from the host\n", 0o644)
	for _, k := range img.Kernels() {
		t.Run(k.Name, func(t *testing.T) {
			results := t.TempDir()
			res, out, err := bootRun(t, img, Run{Kernel: k.Name, Files: map[string]string{"sub/file": host}, Script: bootScript, Results: results})
			if err != nil {
				t.Fatal(err)
			}
			if res.ExitCode != 42 {
				t.Errorf("exit status %d, output %q, console:\n%s", res.ExitCode, out[:min(len(out), 500)], res.Console)
			}
			if want := strings.Repeat("x", 3000000) + "\nto stderr\n"; out != want {
				t.Errorf("%d bytes of output, want %d; end: %q", len(out), len(want), out[max(0, len(out)-100):])
			}
			if fio, _ := os.ReadFile(filepath.Join(results, "fio.txt")); !strings.Contains(string(fio), "err= 0") {
				t.Errorf("fio: %s", fio)
			}
			if len(res.Alerts) > 0 {
				t.Errorf("alerts: %v", res.Alerts)
			}
		})
	}
}

func TestBootHangIsKilled(t *testing.T) {
	img := bootable(t)
	start := time.Now()
	_, out, err := bootRun(t, img, Run{Script: "echo hanging; exec sleep 10000", Timeout: time.Minute})
	if took := time.Since(start); !errors.Is(err, ErrTimeout) || out != "hanging\n" || took > 80*time.Second {
		t.Errorf("got %v after %v, output %q", err, took, out)
	}
}

func TestBootPanicIsSeen(t *testing.T) {
	img := bootable(t)
	_, out, err := bootRun(t, img, Run{Kernel: "newest", Script: "echo before; sleep 1; echo c >/proc/sysrq-trigger; sleep 1000"})
	if !errors.Is(err, ErrPanic) || out != "before\n" || !strings.Contains(err.Error(), "sysrq") {
		t.Errorf("got %v, output %q", err, out)
	}
}

func TestBootPowerCut(t *testing.T) {
	img := bootable(t)
	scratch := filepath.Join(t.TempDir(), "scratch.img")
	res, _, err := bootRun(t, img, Run{
		ScratchFile: scratch, ScratchSize: 256 << 20,
		Script: "echo synced >/scratch/a; sync -f /scratch; echo lost >/scratch/b; vdisk-powercut",
	})
	if err != nil || !res.PowerCut {
		t.Fatalf("got %+v, %v", res, err)
	}
	_, out, err := bootRun(t, img, Run{ScratchFile: scratch, Script: "cat /scratch/a; [ ! -s /scratch/b ] && echo b is gone"})
	if err != nil || out != "synced\nb is gone\n" {
		t.Errorf("after the power cut: %q, %v", out, err)
	}
}
