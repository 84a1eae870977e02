package owner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
)

// fakeSysfs is a folder like /sys/block, with a place for names.
type fakeSysfs struct {
	t    *testing.T
	dir  string
	n    names
	logs bytes.Buffer
}

func newFakeSysfs(t *testing.T) *fakeSysfs {
	dir := t.TempDir()
	return &fakeSysfs{t: t, dir: dir, n: names{dir: filepath.Join(dir, "run/disks"), block: filepath.Join(dir, "block"), links: filepath.Join(dir, "by-id")}}
}

// disk makes a disk with a sequence number and partitions.
func (f *fakeSysfs) disk(id, seq int, partitions ...int) {
	f.t.Helper()
	disk := f.n.disk(id)
	files := map[string]string{"diskseq": fmt.Sprintln(seq), "uevent": ""}
	for _, p := range partitions {
		files[fmt.Sprintf("ublkb%dp%d/uevent", id, p)] = ""
	}
	for name, text := range files {
		path := filepath.Join(disk, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fakeSysfs) tell(d diskName) {
	f.n.tell(d, slog.New(slog.NewTextHandler(&f.logs, nil)))
}

// told returns the content of the file of a disk.
func (f *fakeSysfs) told(seq int) string {
	text, err := os.ReadFile(filepath.Join(f.n.dir, fmt.Sprint(seq)))
	if err != nil {
		return "no file"
	}
	return string(text)
}

// announced reports whether a disk or partition was announced since the last call.
func (f *fakeSysfs) announced(path string) bool {
	file := filepath.Join(f.n.block, path, "uevent")
	text, _ := os.ReadFile(file)
	_ = os.WriteFile(file, nil, 0o644)
	return string(text) == "change"
}

func (f *fakeSysfs) want(seq int, want string) {
	f.t.Helper()
	if got := f.told(seq); got != want {
		f.t.Errorf("disk %d is told as %q, want %q", seq, got, want)
	}
}

func TestNamesAreTold(t *testing.T) {
	f := newFakeSysfs(t)
	f.disk(0, 7, 1, 2)
	old := unix.Umask(0o077) // as vdisk has it
	defer unix.Umask(old)
	f.tell(diskName{id: 0, store: "S", ref: "vm1", mayLink: true})
	f.want(7, "VDISK_ID=S-vm1\nVDISK_NAME=vm1\n")
	for _, dir := range []string{f.n.dir, filepath.Dir(f.n.dir)} {
		if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", dir, fi, err)
		}
	}
	for _, path := range []string{"ublkb0", "ublkb0/ublkb0p1", "ublkb0/ublkb0p2"} {
		if !f.announced(path) {
			t.Errorf("%s was not announced", path)
		}
	}
	f.tell(diskName{id: 0, store: "S", ref: "vm1", mayLink: true})
	if f.announced("ublkb0") {
		t.Error("a disk was announced whose names did not change")
	}
	f.tell(diskName{id: 0, store: "S", ref: "vm2", mayLink: true}) // a rename
	f.want(7, "VDISK_ID=S-vm2\nVDISK_NAME=vm2\n")
	if !f.announced("ublkb0") {
		t.Error("a renamed disk was not announced")
	}
	f.tell(diskName{id: 1, store: "S", ref: "vm3", mayLink: true}) // there is no such disk in sysfs
	if entries, _ := os.ReadDir(f.n.dir); len(entries) != 1 {
		t.Errorf("files: %v", entries)
	}
}

func TestNamesThatAreTaken(t *testing.T) {
	f := newFakeSysfs(t)
	f.disk(0, 7)
	f.disk(1, 8)
	f.tell(diskName{id: 0, store: "A", ref: "vm1", mayLink: true})
	f.tell(diskName{id: 1, store: "B", ref: "vm1", mayLink: true})
	f.want(7, "VDISK_ID=A-vm1\nVDISK_NAME=vm1\n")
	f.want(8, "VDISK_ID=B-vm1\n")
	if !strings.Contains(f.logs.String(), "keeps it") {
		t.Errorf("the log does not say that the name is taken: %s", &f.logs)
	}
	f.tell(diskName{id: 1, store: "A", ref: "vm1", mayLink: true}) // a block-level copy of the store
	f.want(8, "")

	// The number of a disk that is gone is no name's, though another disk has its number in the driver.
	if err := os.RemoveAll(f.n.disk(0)); err != nil {
		t.Fatal(err)
	}
	f.disk(0, 9)
	f.tell(diskName{id: 0, store: "B", ref: "vm1", mayLink: true})
	f.want(7, "no file")
	f.want(9, "VDISK_ID=B-vm1\nVDISK_NAME=vm1\n")
}

func TestNamesThatAreHostile(t *testing.T) {
	f := newFakeSysfs(t)
	f.disk(0, 7)
	f.tell(diskName{id: 0, store: "S", ref: "vm1", mayLink: true})
	f.tell(diskName{id: 0, store: "S", ref: "vm1-part1", mayLink: true}) // the old links must go, too
	f.want(7, "")
	f.tell(diskName{id: 0, store: "S", ref: "vm1", mayLink: false}) // a store that its user may change
	f.want(7, "")

	if err := os.Chmod(f.n.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	f.tell(diskName{id: 0, store: "S", ref: "vm2", mayLink: true})
	f.want(7, "")
}

// TestNamesOfDevices looks at which names an owner tells, of whom and when.
func TestNamesOfDevices(t *testing.T) {
	w, f := newFakeMachine(t), newFakeSysfs(t)
	f.disk(0, 7)
	f.disk(1, 8)
	open := func() *Owner {
		opts := w.options(true)
		opts.names = f.n
		o, err := Own(context.Background(), w.dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	o := open()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	w.attach(o, "v")
	f.want(7, "VDISK_ID="+o.uuid+"-v\nVDISK_NAME=v\n")
	must(o.Rename(ctx, cow.Ref{Volume: "v"}, cow.Ref{Volume: "vm2"}))
	f.want(7, "VDISK_ID="+o.uuid+"-vm2\nVDISK_NAME=vm2\n")

	must(os.Remove(filepath.Join(f.n.dir, "7"))) // as of an older program, which told nothing
	w.kill(o)
	o = open()
	if _, err := o.Recover(ctx, ""); err != nil {
		t.Fatal(err)
	}
	f.want(7, "VDISK_ID="+o.uuid+"-vm2\nVDISK_NAME=vm2\n")
	w.close(o)
}

// TestAttachMarked attaches the volumes whose property says so, beside one that cannot be attached.
func TestAttachMarked(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	defer w.close(o)
	ctx := t.Context()
	for name, value := range map[string]string{"a": "on", "b": "read-only", "c": "", "d": "on"} {
		if _, err := o.CreateVolume(ctx, name, cow.VolumeOptions{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := o.SetProperties(ctx, name, map[string]string{AutoAttach: value}); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.SetProperties(ctx, "c", map[string]string{AutoAttach: "yes"}); !errors.Is(err, cow.ErrInvalid) {
		t.Errorf("a value that means nothing: %v", err)
	}
	if err := o.store.SetProperties("c", map[string]string{AutoAttach: "later"}); err != nil { // as a stream may
		t.Fatal(err)
	}
	w.attach(o, "d")
	w.d.fail["create"] = errors.New("no memory") // of the first, which is a
	o.AttachMarked(ctx)
	want := "d:false b:true "
	shown := func() (s string) {
		for _, d := range o.devicesOf("") {
			s += fmt.Sprintf("%v:%v ", d.Ref, d.ReadOnly)
		}
		return s
	}
	if got := shown(); got != want {
		t.Errorf("attached: %q, want %q", got, want)
	}
	o.AttachMarked(ctx)
	if got := shown(); got != want+"a:false " {
		t.Errorf("attached after another start: %q", got)
	}
}

// TestWaitForLink waits for udev only where it runs with the rule, and where a link was asked for.
func TestWaitForLink(t *testing.T) {
	f := newFakeSysfs(t)
	f.disk(0, 7)
	d := diskName{id: 0, store: "S", ref: "vm1", mayLink: true}
	running := f.n
	running.patience = time.Hour
	running.udev, running.rules = "/dev/null", []string{"/no/such", "/dev/null"}
	withoutRule := running
	withoutRule.rules = nil
	if running.linked(d) {
		t.Error("a link is expected that nothing asked for")
	}
	f.tell(d)
	for what, n := range map[string]names{"udev does not run": f.n, "there is no rule": withoutRule, "nothing is told": {}} {
		if n.linked(d) {
			t.Errorf("%s, and a link is expected", what)
		}
	}
	if !running.linked(d) {
		t.Error("no link is expected")
	}
	if err := os.Mkdir(f.n.links, 0o755); err != nil {
		t.Fatal(err)
	}
	go func() { _ = os.Symlink("/dev/null", filepath.Join(f.n.links, "vdisk-S-vm1")) }()
	running.wait(t.Context(), d, "/dev/null")
	if _, err := os.Readlink(filepath.Join(f.n.links, "vdisk-S-vm1")); err != nil {
		t.Errorf("it did not wait: %v", err)
	}
}
