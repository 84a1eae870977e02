package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// double is a System that notes what is done. Its clock ends when a test says so.
type double struct {
	deeds []string
	fails map[string]error // by deed
	on    map[string]func()
	alarm func()
}

func (d *double) deed(name string) error {
	d.deeds = append(d.deeds, name)
	if fn := d.on[name]; fn != nil {
		fn()
	}
	return d.fails[name]
}

func (d *double) Open(path string) (Mount, error) {
	return doubleMount{d, path}, d.deed("open " + path)
}

func (d *double) After(_ time.Duration, f func()) func() bool {
	d.alarm = f
	return func() bool { d.alarm = nil; return true }
}

type doubleMount struct {
	d    *double
	path string
}

func (m doubleMount) Freeze() error { return m.d.deed("freeze " + m.path) }
func (m doubleMount) Thaw() error   { return m.d.deed("thaw " + m.path) }
func (m doubleMount) Close() error  { return m.d.deed("close " + m.path) }

// TestDuring: whatever happens, each file system that was frozen is thawed once, and the snapshot is taken in between or
// the error says that it was not.
func TestDuring(t *testing.T) {
	broken := errors.New("broken")
	for _, x := range []struct {
		name  string
		fails string // a deed
		on    string // a deed at which during is called
		then  func(*double, func(error))
		want  string
		err   error
	}{
		{name: "all is well", want: "freeze a, freeze b, do, thaw b, thaw a"},
		{name: "one is no mount point", fails: "open b", want: "", err: broken},
		{name: "the first cannot be frozen", fails: "freeze a", want: "freeze a", err: broken},
		{name: "the second cannot be frozen", fails: "freeze b", want: "freeze a, freeze b, thaw a", err: broken},
		{name: "the work fails", fails: "do", want: "freeze a, freeze b, do, thaw b, thaw a", err: broken},
		{name: "one cannot be thawed", fails: "thaw b", want: "freeze a, freeze b, do, thaw b, thaw a", err: broken},
		{name: "the work takes too long", on: "do", then: func(d *double, _ func(error)) { d.alarm() }, want: "freeze a, freeze b, do, thaw b, thaw a", err: ErrThawed},
		{name: "the second freezes too long", on: "freeze b", then: func(d *double, _ func(error)) { d.alarm() }, want: "freeze a, freeze b, thaw a, thaw b", err: ErrThawed},
		{name: "a signal while the first freezes", on: "freeze a", then: func(_ *double, cancel func(error)) { cancel(broken) }, want: "freeze a, thaw a", err: broken},
		{name: "a signal while the second freezes", on: "freeze b", then: func(_ *double, cancel func(error)) { cancel(broken) }, want: "freeze a, freeze b, thaw b, thaw a", err: broken},
		{name: "a signal meanwhile", on: "do", then: func(_ *double, cancel func(error)) { cancel(broken) }, want: "freeze a, freeze b, do, thaw b, thaw a", err: broken},
		{name: "the work panics", on: "do", then: func(*double, func(error)) { panic(broken) }, want: "freeze a, freeze b, do, thaw b, thaw a", err: broken},
		{name: "signals that end or stop a process", on: "do", then: func(*double, func(error)) {
			for _, s := range slices.Concat(uncaught, ofTerminal) {
				_ = syscall.Kill(os.Getpid(), s.(syscall.Signal))
			}
		}, want: "freeze a, freeze b, do, thaw b, thaw a"},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		d := &double{fails: map[string]error{x.fails: broken}}
		d.on = map[string]func(){}
		if x.then != nil {
			d.on[x.on] = func() { x.then(d, cancel) }
		}
		err := func() (err error) {
			defer func() {
				if p := recover(); p != nil {
					err = p.(error)
				}
			}()
			return During(ctx, d, []string{"a", "b"}, time.Hour, func(ctx context.Context) error {
				return errors.Join(d.deed("do"), context.Cause(ctx))
			})
		}()
		cancel(nil)
		closed := 0
		d.deeds = slices.DeleteFunc(d.deeds, func(deed string) bool {
			closed += map[bool]int{true: 1}[strings.HasPrefix(deed, "close")]
			return strings.HasPrefix(deed, "close") || strings.HasPrefix(deed, "open")
		})
		if got := strings.Join(d.deeds, ", "); got != x.want || !errors.Is(err, x.err) || d.alarm != nil || closed == 0 {
			t.Errorf("%s: %s, not %s; %v, %d closed", x.name, got, x.want, err, closed)
		}
	}
}

// mounted returns the mount point of a new file system, and its loop device.
func mounted(t *testing.T) (path, device string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	image, path := filepath.Join(dir, "image"), filepath.Join(dir, "mount point")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(16<<20), f.Close(), os.Mkdir(path, 0o700))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", image}, {"mount", "-o", "loop", image, path}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v: %s", args, err, out) // a container may not
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", path).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	out, err := exec.Command("losetup", "-j", image, "-O", "NAME", "--noheadings").Output()
	if err != nil {
		t.Fatal(err)
	}
	return path, filepath.Base(strings.TrimSpace(string(out)))
}

// TestDuringStuck has work that ends only with its context: when the limit has passed.
func TestDuringStuck(t *testing.T) {
	d := &double{}
	err := During(t.Context(), d, []string{"a"}, time.Hour, func(ctx context.Context) error {
		d.alarm()
		<-ctx.Done()
		return context.Cause(ctx)
	})
	if got := strings.Join(d.deeds, ", "); got != "open a, freeze a, thaw a, close a" || err == nil || err.Error() != errLate.Error() {
		t.Errorf("%s; %v", got, err)
	}
}

// TestThawAgain tries again what it could not thaw, but not what somebody else has thawed.
func TestThawAgain(t *testing.T) {
	broken := errors.New("broken")
	d := &double{fails: map[string]error{"thaw a": broken, "thaw b": ErrThawed}}
	err := During(t.Context(), d, []string{"a", "b", "c"}, time.Hour, func(context.Context) error {
		d.deeds = nil
		d.alarm()
		delete(d.fails, "thaw a")
		return nil
	})
	if got := strings.Join(d.deeds, ", "); !strings.HasPrefix(got, "thaw c, thaw b, thaw a, thaw a, close") || !errors.Is(err, broken) {
		t.Errorf("%s; %v", got, err)
	}
}

// TestKernel freezes a real file system: what writes to it waits meanwhile.
func TestKernel(t *testing.T) {
	path, device := mounted(t)
	if names := DevicesBelow(path); len(names) != 1 || names[0] != device {
		t.Errorf("%s is on %v, not %s", path, names, device)
	}
	wrote := make(chan error, 1)
	err := During(t.Context(), Kernel{}, []string{path}, time.Minute, func(context.Context) error {
		if err := During(t.Context(), Kernel{}, []string{path}, time.Minute, func(context.Context) error { return nil }); !errors.Is(err, ErrFrozen) {
			return fmt.Errorf("frozen twice: %w", err)
		}
		started := make(chan struct{})
		go func() {
			close(started)
			wrote <- os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o600)
		}()
		<-started
		select {
		case err := <-wrote:
			return fmt.Errorf("written while it is frozen: %w", err)
		case <-time.After(50 * time.Millisecond): // if it is not frozen, the write has most likely ended by now
		}
		return nil
	})
	if err := errors.Join(err, <-wrote); err != nil {
		t.Error(err)
	}
	// Somebody else thaws it.
	err = During(t.Context(), Kernel{}, []string{path}, time.Minute, func(context.Context) error {
		m, err := Kernel{}.Open(path)
		if err == nil {
			err = errors.Join(m.Thaw(), m.Close())
		}
		return err
	})
	if !errors.Is(err, ErrThawed) {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(path, "file"), []byte("y"), 0o600); err != nil {
		t.Error(err)
	}
	// A folder within is no mount point.
	folder := filepath.Join(path, "folder")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{folder: ErrRefused, filepath.Join(path, "nope"): os.ErrNotExist, filepath.Join(path, "file"): syscall.ENOTDIR} {
		if m, err := (Kernel{}).Open(path); !errors.Is(err, want) || m != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	for other, want := range map[string]bool{folder: true, filepath.Dir(path): false} {
		if same, err := SameFileSystem(path, other); same != want || err != nil {
			t.Errorf("%s: %v, %v", other, same, err)
		}
	}
}

// TestNotForAll has a file system that cannot be frozen.
func TestNotForAll(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	err := During(t.Context(), Kernel{}, []string{"/proc"}, time.Minute, func(context.Context) error { return nil })
	if !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestBelow finds what is below a partition on LVM, in a folder like sysfs.
func TestBelow(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"block/dm-0/slaves", "block/dm-1/slaves", "block/ublkb0/ublkb0p1", "block/sda"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	err := errors.Join(os.WriteFile(filepath.Join(root, "block/ublkb0/ublkb0p1/partition"), nil, 0o600),
		os.Symlink("../../dm-1", filepath.Join(root, "block/dm-0/slaves/dm-1")), os.Symlink("../../sda", filepath.Join(root, "block/dm-0/slaves/sda")),
		os.Symlink("../../ublkb0/ublkb0p1", filepath.Join(root, "block/dm-1/slaves/ublkb0p1")))
	if err != nil {
		t.Fatal(err)
	}
	if got := below(filepath.Join(root, "block/dm-0"), 0); fmt.Sprint(got) != "[dm-0 dm-1 ublkb0p1 ublkb0 sda]" {
		t.Error(got)
	}
	if text := unescaped(`/mnt/a\040b\134c\`); text != `/mnt/a b\c\` {
		t.Error(text)
	}
}
