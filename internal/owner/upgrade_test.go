package owner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/ublk"
)

// program replaces the program of this test.
func program(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vdisk")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUpgrade(t *testing.T) {
	w := newFakeMachine(t)
	good := program(t, fmt.Sprintf(`echo '{"version":"2.0","store_format":%d,"handover":1}'`, format.StoreVersion))
	replaceable := func() *Owner {
		opts := w.options(true)
		opts.Replaceable, opts.Version, opts.program = true, "1.0", good
		o, err := Own(context.Background(), w.dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	o := replaceable()
	w.attach(o, "v")
	write(t, w.d.devices[0].server, "text")
	for text, want := range map[string]error{
		`echo '{"version":"0.1","store_format":1,"handover":1}'`:                       cow.ErrVersion,
		fmt.Sprintf(`echo '{"version":"0.1","store_format":%d}'`, format.StoreVersion): ErrUnsupported,
		`echo hello`: cow.ErrInvalid,
		`exit 1`:     nil,
	} {
		o.opts.program = program(t, text)
		if _, err := o.Upgrade(t.Context()); err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	o.opts.program = good
	// An upgrade waits for running commands.
	s := open(t, w.dir)
	o.opts.sessionTimeout = 50 * time.Millisecond
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	_ = s.Close()
	// If a device cannot be quiesced, it and the others are still served.
	w.d.fail["quiesce"] = errors.New("not today")
	if _, err := o.Upgrade(t.Context()); err == nil || len(w.waiting(o)) != 0 {
		t.Error(err, w.waiting(o))
	}
	u, err := o.Upgrade(t.Context())
	if err != nil || u != (Upgrade{From: "1.0", To: "2.0", Program: good}) {
		t.Fatal(u, err)
	}
	if _, err := Open(t.Context(), w.dir, w.options(false)); !errors.Is(err, cow.ErrBusy) {
		t.Error("somebody got in between", err)
	}
	if err := o.CloseWhenDone(); err != nil {
		t.Fatal(err)
	}
	// Nobody but the successor gets the store.
	w.edit(fmt.Sprintf(`"pid":%d,"start":"%s"`, os.Getpid(), startOf(os.Getpid())),
		fmt.Sprintf(`"pid":%d,"start":"%s"`, os.Getppid(), startOf(os.Getppid())))
	if _, err := Own(t.Context(), w.dir, w.options(true)); err == nil || !strings.Contains(err.Error(), "being upgraded") {
		t.Error(err)
	}
	w.edit(fmt.Sprintf(`"start":"%s"`, startOf(os.Getppid())), `"start":"1"`) // the successor died
	o = w.own(true)
	w.recovers(o, "", 1)
	if got := read(t, w.d.devices[0].server); got != "text" {
		t.Errorf("%q", got)
	}
	if strings.Contains(w.file(), "heir") {
		t.Error(w.file())
	}
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, cow.ErrBusy) { // it is no daemon
		t.Error(err)
	}
	w.close(o)
}

// TestUpgradeRefusedWhileServing: a program that cannot take over NBD clients is refused, and the error names the services.
func TestUpgradeRefusedWhileServing(t *testing.T) {
	w := newFakeMachine(t)
	opts := w.options(true)
	opts.Replaceable, opts.program = true, program(t, fmt.Sprintf(`echo '{"version":"0.1","store_format":%d,"handover":1}'`, format.StoreVersion))
	ctx, cancel := context.WithCancel(t.Context())
	o, err := Own(ctx, w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, _, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- o.Serve(ctx, l, ServeOptions{Socket: path}) }()
	o.wait(func() bool { return len(o.services) > 0 })
	if _, err := o.Upgrade(t.Context()); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
	cancel()
	if err := errors.Join(<-ended, o.Close()); err != nil {
		t.Error(err)
	}
}

// TestDisksAreLeft: a disk that is served again after the upgrade has quiesced the disks is left to the next program
// like the others. An owner that ends before it is ready leaves the disks that it has recovered.
func TestDisksAreLeft(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	o.mu.Lock()
	o.successor = &Program{Version: "2.0"}
	o.mu.Unlock()
	w.close(o)
	if w.d.count() != 1 || w.d.devices[0].info.State != ublk.KernelQuiesced {
		t.Fatalf("after an upgrade %d disks are left", w.d.count())
	}
	o = w.own(true)
	w.recovers(o, "", 1)
	if err := o.CloseLeaving(); err != nil || w.d.count() != 1 {
		t.Fatalf("%v, %d disks are left", err, w.d.count())
	}
	o = w.own(true)
	if o.LeaveDisks() {
		t.Error("a disk that waits is taken for one that is served")
	}
	w.recovers(o, "", 1)
	if !o.LeaveDisks() {
		t.Error("the disk is not told of")
	}
	w.close(o)
	if w.d.count() != 1 {
		t.Fatalf("%d disks are left", w.d.count())
	}
	o = w.own(true)
	w.recovers(o, "", 1)
	w.close(o)
	if w.d.count() != 0 {
		t.Errorf("%d disks are left", w.d.count())
	}
}

// TestStartedFrom: the next program is looked for at the path from which this one was started, even if its file has
// moved.
func TestStartedFrom(t *testing.T) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "vdisk")
	if err := os.Symlink(exe, link); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	t.Chdir(dir)
	for arg0, want := range map[string]string{exe: exe, link: link, "vdisk": link, "./vdisk": link, "/bin/true": exe, "nothing": exe, "": exe} {
		if got := startPath(arg0); got != want {
			t.Errorf("started as %q: %s, want %s", arg0, got, want)
		}
	}
	// A program that an upgrade executed by another path gets that path from the program before it.
	was := startedFrom
	defer func() { startedFrom = was }()
	t.Setenv(handoverEnv, `{"From":"1.0","Program":"/usr/bin/vdisk"}`)
	if h := TakeHandover(); h == nil || startedFrom != "/usr/bin/vdisk" {
		t.Errorf("%+v, %s", h, startedFrom)
	}
	if runs("/bin/true") || !runs(link) {
		t.Error("a program is taken for another")
	}
}

// TestServesAgain: an upgrade has succeeded when all devices that were served are served again.
func TestServesAgain(t *testing.T) {
	served := []Device{{Path: "/dev/ublkb0"}, {Path: "/dev/ublkb1"}, {Path: "/dev/ublkb2", Waits: true, Error: "lost"}}
	for name, c := range map[string]struct {
		after   []Device
		pending bool
		want    string // in the error
	}{
		"all":      {after: served},
		"not yet":  {after: []Device{{Path: "/dev/ublkb0", Waits: true}, {Path: "/dev/ublkb1"}}, pending: true},
		"one less": {after: []Device{{Path: "/dev/ublkb1"}}, want: "/dev/ublkb0"},
		"one down": {after: []Device{{Path: "/dev/ublkb0"}, {Path: "/dev/ublkb1", Waits: true, Error: "somebody serves it"}}, want: "somebody serves it"},
		"none":     {want: "/dev/ublkb1"},
	} {
		pending, err := servesAgain(served, c.after)
		if pending != c.pending || (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, pending, err)
		}
	}
}
