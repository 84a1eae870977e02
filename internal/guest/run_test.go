package guest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fakeGuest returns an image whose QEMU is a script that acts as QEMU and guest. The script finds the nonce in $nonce
// and the console's file in $console.
func fakeGuest(t *testing.T, script string) *Image {
	t.Helper()
	dir := t.TempDir()
	qemu := filepath.Join(dir, "qemu")
	write(t, qemu, `#!/bin/bash
nonce=$(grep -o 'vdisk.nonce=[0-9a-f]*' <<<"$*"); nonce=${nonce#*=}
console=$(grep -o 'id=console,path=[^ ]*' <<<"$*"); console=${console#*path=}
event() { printf '\036%s %s\n' $nonce "$*" >&3; }
echo try >>`+dir+`/tries
`+script, 0o755)
	t.Setenv("VDISK_GUEST_QEMU", qemu)
	t.Setenv("VDISK_GUEST_ACCEL", "tcg")
	write(t, filepath.Join(dir, "root/busybox"), "x", 0o755)
	return &Image{dir: dir, root: filepath.Join(dir, "root"), kernels: []Kernel{{Name: "stable", Release: "6.12", dir: filepath.Join(dir, "kernel")}}}
}

func fakeRun(t *testing.T, img *Image, timeout time.Duration) (*Result, string, error) {
	t.Helper()
	var out bytes.Buffer
	start := time.Now()
	res, err := img.Run(t.Context(), Run{ScratchSize: -1, Timeout: timeout, Stdout: &out})
	if took := time.Since(start); took > timeout+10*time.Second {
		t.Errorf("the run took %v", took)
	}
	if left, _ := filepath.Glob(filepath.Join(img.dir, "run-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	return res, out.String(), err
}

func TestRunTellsOutputAndStatus(t *testing.T) {
	img := fakeGuest(t, `event ready; echo -n "hello, no newline" >&3; event exit 7; read -u 3 line; [ "$line" = done ] && echo answered >$console`)
	res, out, err := fakeRun(t, img, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if res.ExitCode != 7 || out != "hello, no newline" || res.Console != "answered\n" || res.Boot == 0 {
		t.Errorf("got %+v and output %q", res, out)
	}
}

func TestRunKillsAtItsDeadline(t *testing.T) {
	img := fakeGuest(t, `echo $$ >$(dirname $0)/pid; event ready; echo "last words" >$console; sleep 1000; exit`)
	res, _, err := fakeRun(t, img, 500*time.Millisecond)
	if !errors.Is(err, ErrTimeout) || !strings.Contains(err.Error(), "last words") {
		t.Errorf("got %v", err)
	}
	if res == nil || res.ExitCode != -1 {
		t.Errorf("got %+v", res)
	}
	pid, err := os.ReadFile(filepath.Join(img.dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err == nil {
		t.Error("QEMU lives")
	}
}

func TestRunIsCancelled(t *testing.T) {
	img := fakeGuest(t, `exec sleep 1000`)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	if _, err := img.Run(ctx, Run{ScratchSize: -1}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestRunSeesPanic(t *testing.T) {
	img := fakeGuest(t, `event ready; echo "Kernel panic - not syncing: sysrq triggered crash" >$console`)
	res, _, err := fakeRun(t, img, time.Minute)
	if !errors.Is(err, ErrPanic) {
		t.Errorf("got %v", err)
	}
	if res == nil || len(res.Alerts) != 1 || !res.Alerts[0].Fatal {
		t.Errorf("got %+v", res)
	}
}

func TestRunSeesQEMUDie(t *testing.T) {
	img := fakeGuest(t, `event ready; echo "qemu: something broke" >&2; exit 1`)
	if _, _, err := fakeRun(t, img, time.Minute); !errors.Is(err, ErrDied) || !strings.Contains(err.Error(), "something broke") {
		t.Errorf("got %v", err)
	}
}

func TestRunTriesBootingAgain(t *testing.T) {
	img := fakeGuest(t, `[ $(wc -l <`+"$(dirname $0)"+`/tries) -lt 2 ] && exit 1; event ready; event exit 0; read -u 3 line`)
	res, _, err := fakeRun(t, img, time.Minute)
	if err != nil || len(res.Failed) != 1 || !errors.Is(res.Failed[0], ErrBoot) {
		t.Errorf("got %+v, %v", res, err)
	}
	img = fakeGuest(t, `exit 1`)
	if _, _, err := fakeRun(t, img, time.Minute); !errors.Is(err, ErrBoot) {
		t.Errorf("got %v", err)
	}
	if tries, _ := os.ReadFile(filepath.Join(img.dir, "tries")); strings.Count(string(tries), "try") != len(emulated) {
		t.Errorf("%q: not %d tries", tries, len(emulated))
	}
}

func TestRunCutsPower(t *testing.T) {
	img := fakeGuest(t, `event ready; echo -n before >&3; event powercut; exec sleep 1000`)
	res, out, err := fakeRun(t, img, time.Minute)
	if err != nil || !res.PowerCut || res.ExitCode != -1 || out != "before" {
		t.Errorf("got %+v, %q, %v", res, out, err)
	}
}

func TestRunWithoutQEMU(t *testing.T) {
	img := fakeGuest(t, "")
	t.Setenv("VDISK_GUEST_QEMU", "")
	t.Setenv("PATH", t.TempDir())
	if qemuProgram() != "" {
		t.Skip("QEMU is in a folder that is always looked at")
	}
	if _, err := img.Run(t.Context(), Run{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

func TestBuildWithoutRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		b := &builder{dir: t.TempDir()}
		if _, ok := b.open(kernelSpecs); ok {
			t.Error("an empty folder is an image")
		}
		return
	}
	if _, err := Build(t.Context(), Options{Dir: t.TempDir()}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
