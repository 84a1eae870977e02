package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const listing = `linux-image-6.1.0-56-cloud-amd64-unsigned
linux-image-6.12-cloud-amd64
linux-image-6.12.100+deb12-cloud-amd64
linux-image-6.12.9+deb12-cloud-amd64-unsigned
linux-image-6.12.117+deb12-cloud-amd64-unsigned
linux-image-6.12.117+deb12-cloud-amd64
linux-image-6.12.117+deb12-cloud-amd64-dbg
linux-image-6.12.118+deb13-cloud-amd64
linux-image-6.19.14+deb13-cloud-amd64
linux-image-cloud-amd64
linux-binary-7.2.12+deb13-cloud-amd64
linux-image-7.2.12+deb13-cloud-amd64
linux-binary-7.3.4+deb13-cloud-amd64
linux-binary-unsigned-7.3.4+deb13-cloud-amd64
linux-image-7.3.4+deb13-cloud-amd64
linux-modules-7.3.4+deb13-cloud-amd64
linux-modules-7.3.4+deb13-rt-amd64
linux-base-7.3.4+deb13-cloud-amd64
linux-headers-7.4.1+deb13-cloud-amd64`

func TestKernelChoice(t *testing.T) {
	offered := strings.Fields(listing)
	specs, err := pickSpecs(nil)
	if err != nil {
		t.Fatal(err)
	}
	stable := specs[0].candidates(offered)
	want := []string{"6.12.117+deb12-cloud-amd64", "6.12.100+deb12-cloud-amd64", "6.12.9+deb12-cloud-amd64", "6.12.118+deb13-cloud-amd64"}
	if !slices.Equal(stable, want) {
		t.Errorf("stable: got %q, want %q", stable, want)
	}
	newest := specs[1].candidates(offered)
	want = []string{"7.3.4+deb13-cloud-amd64", "7.2.12+deb13-cloud-amd64", "6.19.14+deb13-cloud-amd64", "6.12.118+deb13-cloud-amd64"}
	if !slices.Equal(newest, want) {
		t.Errorf("newest: got %q, want %q", newest, want)
	}
	got := kernelPackages(offered, newest[0])
	want = []string{
		"linux-image-7.3.4+deb13-cloud-amd64", "linux-binary-7.3.4+deb13-cloud-amd64",
		"linux-modules-7.3.4+deb13-cloud-amd64", "linux-base-7.3.4+deb13-cloud-amd64",
	}
	if !slices.Equal(got, want) {
		t.Errorf("packages: got %q, want %q", got, want)
	}
	if got := kernelPackages(offered, stable[0]); !slices.Equal(got, []string{"linux-image-6.12.117+deb12-cloud-amd64-unsigned"}) {
		t.Errorf("packages of stable: got %q", got)
	}
	if _, err := pickSpecs([]string{"oldest"}); err == nil {
		t.Error("an unknown kernel was accepted")
	}
}

func TestCompareVersions(t *testing.T) {
	ordered := []string{"6.9.1", "6.12", "6.12.9+deb12", "6.12.100+deb12", "6.12.115+deb13-x", "6.12.115+deb13.1-x", "7.0.4", "10.0.1"}
	for i, a := range ordered {
		for j, b := range ordered {
			if got := compareVersions(a, b); (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("compareVersions(%q, %q) = %d", a, b, got)
			}
		}
	}
}

func TestRecipeHash(t *testing.T) {
	seen := map[string][]string{}
	for _, parts := range [][]string{{"a", "b"}, {"ab"}, {"a,", "b"}, {"a", "b", ""}, {"b", "a"}, nil} {
		h := recipeHash(parts)
		if other, ok := seen[h]; ok {
			t.Errorf("%q and %q have one hash", parts, other)
		}
		if h != recipeHash(slices.Clone(parts)) {
			t.Errorf("%q has two hashes", parts)
		}
		seen[h] = parts
	}
	if recipeHash(kernelSpecs[0].recipe()) == recipeHash(kernelSpecs[1].recipe()) {
		t.Error("both kernels have one recipe")
	}
}

func TestFindMirrors(t *testing.T) {
	const own = "http://deb.debian.org/debian"
	for name, c := range map[string]struct {
		sources string
		want    mirrors
	}{
		"one line": {
			"deb [arch=amd64 signed-by=/k.gpg] https://m.example/x/debian/ trixie main\ndeb http://s.example/debian-security trixie-security main",
			mirrors{"https://m.example/x/debian", "http://s.example/debian-security"},
		},
		"deb822":     {"Types: deb\nURIs: http://m.example/debian http://n.example/debian\nSuites: trixie\n", mirrors{"http://m.example/debian", "http://m.example/debian-security"}},
		"comment":    {"# deb http://m.example/debian trixie main\n", mirrors{own, own + "-security"}},
		"other":      {"deb http://archive.ubuntu.com/ubuntu noble main\ndeb-src http://m.example/debian trixie main\n", mirrors{own, own + "-security"}},
		"not http":   {"deb cdrom:[Debian]/debian trixie main\n", mirrors{own, own + "-security"}},
		"no sources": {"", mirrors{own, own + "-security"}},
	} {
		if got := findMirrors(c.sources); got != c.want {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func TestLoadOrder(t *testing.T) {
	dep := "kernel/a/virtio_blk.ko: kernel/v/virtio-ring.ko kernel/v/virtio.ko\nkernel/v/virtio-ring.ko: kernel/v/virtio.ko\nkernel/v/virtio.ko:\nkernel/x.ko:\n"
	got := loadOrder(dep, []string{"virtio_blk", "virtio_ring", "ext4"})
	if want := []string{"kernel/v/virtio.ko", "kernel/v/virtio-ring.ko", "kernel/a/virtio_blk.ko"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStream(t *testing.T) {
	const input = "one\n\x1eabc ready\ntw\x1eo\x1eabd no\nthree\x1eabc exit 7\n\x1eab"
	for size := 1; size <= len(input); size++ {
		var out bytes.Buffer
		var events []string
		s := newStream("abc", &out, func(words []string) { events = append(events, strings.Join(words, " ")) })
		for chunk := range slices.Chunk([]byte(input), size) {
			s.Write(chunk)
		}
		s.flush()
		if want := "one\ntw\x1eo\x1eabd no\nthree\x1eab"; out.String() != want {
			t.Fatalf("in pieces of %d: output %q, want %q", size, out.String(), want)
		}
		if !slices.Equal(events, []string{"ready", "exit 7"}) {
			t.Fatalf("in pieces of %d: events %q", size, events)
		}
	}
}

func TestAlerts(t *testing.T) {
	console := "[ 1.0] INFO: task fio:12 blocked for more than 30 seconds.\r\n" +
		"[ 1.1] \"echo 0 > /proc/sys/kernel/hung_task_timeout_secs\" disables this message.\n" +
		"[ 1.2] all is well\n[ 1.3] I/O error, dev ublkb0, sector 8 op 0x1:(WRITE)\n[ 1.4] BUG: kernel NULL pointer dereference\n[ 1.5] WARNING: CPU: 0 PID: 1\n"
	var fatal, other int
	for _, a := range findAlerts(console) {
		if a.Fatal {
			fatal++
		} else {
			other++
		}
	}
	if fatal != 2 || other != 2 {
		t.Errorf("%d fatal and %d other alerts, want 2 and 2: %v", fatal, other, findAlerts(console))
	}
}

func TestPayload(t *testing.T) {
	src := t.TempDir()
	write(t, filepath.Join(src, "tree/sub/f"), "text", 0o644)
	write(t, filepath.Join(src, "tool"), "program", 0o755)
	if err := os.Symlink("sub/f", filepath.Join(src, "tree/link")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(src, "p.tar")
	err := writePayload(file, map[string]string{"bin/tool": filepath.Join(src, "tool"), "/etc/tree": filepath.Join(src, "tree")}, "exit 3")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := map[string]string{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data, _ := io.ReadAll(tr)
		got[h.Name] = string(data) + h.Linkname
	}
	for name, want := range map[string]string{"payload/bin/tool": "program", "etc/tree/sub/f": "text", "etc/tree/link": "sub/f", "payload/.script": "exit 3"} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	if err := writePayload(file, map[string]string{"x": filepath.Join(src, "none")}, ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestLockFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	lock, err := lockFile(t.Context(), file, func() { t.Error("waited for a free lock") })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	told := 0
	if _, err := lockFile(ctx, file, func() { told++ }); !errors.Is(err, context.DeadlineExceeded) || told != 1 {
		t.Errorf("a taken lock: %v, told %d times", err, told)
	}
	lock.Close()
	if lock, err = lockFile(t.Context(), file, func() {}); err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

func TestPartIsAtomic(t *testing.T) {
	b := &builder{dir: t.TempDir(), log: io.Discard, apt: &aptArea{}}
	place := filepath.Join(b.dir, "root-x")
	broken := errors.New("broken")
	err := b.part(t.Context(), place, func(_ context.Context, dir string) error {
		write(t, filepath.Join(dir, "half"), "", 0o644)
		return broken
	})
	if !errors.Is(err, broken) || isDir(place) {
		t.Errorf("a part that failed: %v, there: %v", err, isDir(place))
	}
	for _, text := range []string{"first", "second"} {
		err := b.part(t.Context(), place, func(_ context.Context, dir string) error {
			write(t, filepath.Join(dir, "whole"), text, 0o644)
			return nil
		})
		if got, _ := os.ReadFile(filepath.Join(place, "whole")); err != nil || string(got) != text {
			t.Errorf("a part: %v, content %q, want %q", err, got, text)
		}
	}
	if left, _ := os.ReadDir(b.dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func write(t *testing.T, file, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
