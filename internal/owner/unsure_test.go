package owner

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/ublk"
)

// waitingMachine returns a fakeMachine on which a device of volume v waits.
func waitingMachine(t *testing.T) *fakeMachine {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	w.kill(o)
	return w
}

// looks opens the store like a command that only looks at it.
func (w *fakeMachine) looks() *Owner {
	w.t.Helper()
	opts := w.options(true)
	opts.Offer = false
	o, err := Own(context.Background(), w.dir, opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

// TestLookingChangesNothing: a command that only looks at a store neither forgets nor deletes a device, whatever is
// known about the devices. The next lasting owner finds all devices that it can recover.
func TestLookingChangesNothing(t *testing.T) {
	for name, change := range map[string]func(w *fakeMachine){
		"it waits":                   func(*fakeMachine) {},
		"a driver that is not asked": func(w *fakeMachine) { w.d.fail["devices"] = ublk.ErrPermission },
		"a list that is not whole":   func(w *fakeMachine) { w.d.hidden, w.d.fail["devices"] = true, ublk.ErrUnlisted },
		"no driver":                  func(w *fakeMachine) { w.d.hidden, w.d.fail["devices"] = true, ublk.ErrNoDriver },
		"it is gone":                 func(w *fakeMachine) { w.d.hidden = true },
		"it is dead":                 func(w *fakeMachine) { w.d.devices[0].info.State = ublk.KernelDead },
		"another file system":        func(w *fakeMachine) { w.edit(`"dev":`, `"dev":1`) },
		"a file that is damaged":     func(w *fakeMachine) { w.edit("{", "[") },
	} {
		t.Run(name, func(t *testing.T) {
			w := waitingMachine(t)
			before := w.file()
			for _, look := range []func() *Owner{w.looks, func() *Owner { return w.own(false) }} {
				change(w)
				changed := w.file()
				o := look()
				if _, err := o.Volumes(t.Context()); err != nil {
					t.Error(err)
				}
				w.close(o)
				if w.file() != changed || w.d.count() != 1 {
					t.Errorf("%d devices are left, and the file is %q, was %q", w.d.count(), w.file(), changed)
				}
				w.d.hidden = false
				if err := os.WriteFile(filepath.Join(w.dir, recordName), []byte(before), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if w.d.devices[0].info.State == ublk.KernelDead {
				return
			}
			o := w.own(true)
			w.recovers(o, "", 1)
			w.close(o)
		})
	}
}

// TestLostNode: a device that a recovery cannot open is not forgotten.
func TestLostNode(t *testing.T) {
	w := waitingMachine(t)
	o := w.own(true)
	for _, err := range []error{ublk.ErrNoNode, ublk.ErrBusy, ublk.ErrPermission} {
		w.d.fail["recover"] = err
		w.recovers(o, "", 0)
		w.d.fail["devices"] = ublk.ErrUnlisted
		w.d.hidden = true
		w.recovers(o, "", 0)
		w.d.hidden = false
		if got := w.waiting(o); len(got) != 1 || !strings.Contains(w.file(), "cookie") {
			t.Errorf("%v: %v wait, the file is %q", err, got, w.file())
		}
	}
	w.recovers(o, "", 1)
	w.close(o)
}

// TestMovedFileSystem: a file system with another device number is the same one, mounted again, or a copy. The disk is
// kept, and neither served nor deleted until the user decides.
func TestMovedFileSystem(t *testing.T) {
	w := waitingMachine(t)
	w.edit(`"dev":`, `"dev":1`)
	o := w.own(true)
	if got := w.waiting(o); len(got) != 1 {
		t.Fatal(got)
	}
	if err := o.Remove(t.Context(), cow.Ref{Volume: "v"}, true); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	for range 2 {
		if d := o.devicesOf("v")[0]; !strings.Contains(d.Error, "--moved") {
			t.Error(d)
		}
		w.recovers(o, "", 0)
	}
	w.close(o)
	moved := w.file()
	// It is the same one.
	o = w.own(true)
	if err := o.Claim(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	w.recovers(o, "", 1)
	w.kill(o)
	o = w.own(true)
	w.recovers(o, "", 1)
	w.kill(o)
	// It is a copy: the device is the other's.
	if err := os.WriteFile(filepath.Join(w.dir, recordName), []byte(moved), 0o600); err != nil {
		t.Fatal(err)
	}
	o = w.own(true)
	if err := o.Detach(t.Context(), "v", true); err != nil || w.d.count() != 1 || w.file() != "" {
		t.Errorf("%v, %d devices are left, the file is %q", err, w.d.count(), w.file())
	}
	w.close(o)
	// It is a copy, and the other is being served.
	if err := os.WriteFile(filepath.Join(w.dir, recordName), []byte(moved), 0o600); err != nil {
		t.Fatal(err)
	}
	w.d.devices[0].info.State, w.d.devices[0].info.ServerPID = ublk.KernelLive, os.Getpid()
	o = w.own(true)
	if got := w.waiting(o); len(got) != 0 {
		t.Error(got)
	}
	w.attach(o, "v")
	w.close(o)
	if w.d.count() != 1 || !strings.Contains(w.file(), "cookie") {
		t.Errorf("%d devices are left, the file is %q", w.d.count(), w.file())
	}
}

// TestUnreadableRecord: while the file of devices cannot be read, and may list a device, no volume changes.
func TestUnreadableRecord(t *testing.T) {
	w := waitingMachine(t)
	w.edit("{", "[")
	if _, err := Own(t.Context(), w.dir, w.options(true)); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "/dev/ublkb0") {
		t.Error(err)
	}
	o := w.looks()
	v := cow.Ref{Volume: "v"}
	for what, err := range map[string]error{
		"remove":   o.Remove(t.Context(), v, true),
		"rename":   o.Rename(t.Context(), v, cow.Ref{Volume: "w"}),
		"rollback": o.Rollback(t.Context(), cow.Ref{Volume: "v", Snapshot: "s"}),
		"resize":   o.Resize(t.Context(), "v", 1<<20, true),
	} {
		if !errors.Is(err, cow.ErrBusy) {
			t.Errorf("%s: %v", what, err)
		}
	}
	w.close(o)
	if _, err := deleteDevice(t.Context(), w.d, w.dir, "/dev/ublkb0", true); err != nil {
		t.Fatal(err)
	}
	w.close(w.own(true))
	if w.file() != "" {
		t.Error(w.file())
	}
}

// TestPruneKeepsWhatWaits: a waiting device is deleted only by its name and with force, even if the store does not know
// it. A dead device is deleted only if it can have no server.
func TestPruneKeepsWhatWaits(t *testing.T) {
	for name, change := range map[string]func(w *fakeMachine){
		"known":                     func(*fakeMachine) {},
		"forgotten":                 func(w *fakeMachine) { w.edit(w.file(), "") },
		"of what this is a copy of": func(w *fakeMachine) { w.edit(`"dev":`, `"dev":1`) },
	} {
		w := waitingMachine(t)
		change(w)
		if deleted, err := prune(t.Context(), w.d, w.dir); len(deleted) != 0 || err != nil || w.d.count() != 1 {
			t.Errorf("%s: deleted %v (%v)", name, deleted, err)
		}
		if _, err := deleteDevice(t.Context(), w.d, w.dir, "/dev/ublkb0", false); !errors.Is(err, cow.ErrBusy) {
			t.Errorf("%s, without force: %v", name, err)
		}
		if _, err := deleteDevice(t.Context(), w.d, w.dir, "/dev/ublkb0", true); (err == nil) != (name != "known") || err != nil && !errors.Is(err, cow.ErrBusy) {
			t.Errorf("%s, with force: %v", name, err)
		}
	}
	w := waitingMachine(t)
	w.d.devices[0].info.State = ublk.KernelDead
	w.d.blind = true
	if deleted, err := prune(t.Context(), w.d, w.dir); len(deleted) != 0 || err != nil {
		t.Errorf("deleted %v (%v), which may have a server", deleted, err)
	}
	w.d.blind = false
	w.d.fail["devices"] = ublk.ErrUnlisted
	if deleted, err := prune(t.Context(), w.d, w.dir); len(deleted) != 0 || !errors.Is(err, ErrUnsupported) {
		t.Errorf("deleted %v (%v)", deleted, err)
	}
	if deleted, err := prune(t.Context(), w.d, w.dir); len(deleted) != 1 || err != nil || w.d.count() != 0 {
		t.Errorf("deleted %v (%v)", deleted, err)
	}
	if _, err := deleteDevice(t.Context(), w.d, w.dir, "/dev/ublkb0", true); !errors.Is(err, cow.ErrNotFound) {
		t.Error(err)
	}
}

// TestMemoryElsewhere: the memory of a waiting disk's last server may be in another container. Then the store is opened
// only there. Giving the disk up does not need the memory, and leaves it for the other disks.
func TestMemoryElsewhere(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	if _, err := o.CreateVolume(t.Context(), "u", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	w.attach(o, "v")
	w.attach(o, "u")
	w.kill(o)
	w.leaveOwner("/proc") // which is not where this process has its shared memory
	refused := func(want string) {
		t.Helper()
		before := w.file()
		for _, lasting := range []bool{true, false} {
			if o, err := Own(t.Context(), w.dir, w.options(lasting)); err == nil {
				w.close(o)
				t.Fatal("the store is opened")
			} else if !errors.Is(err, cow.ErrElsewhere) || !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), want) {
				t.Error(err)
			}
		}
		if _, err := os.Stat(filepath.Join(w.dir, "owner")); err != nil || w.file() != before {
			t.Errorf("%v, the file is %q, was %q", err, w.file(), before)
		}
	}
	refused("(v, u)")
	w.d.hidden, w.d.fail["devices"] = true, ublk.ErrUnlisted
	if err := GiveUp(t.Context(), w.dir, "v", w.options(false)); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
	w.d.hidden = false
	if err := GiveUp(t.Context(), w.dir, "nope", w.options(false)); !errors.Is(err, cow.ErrNotFound) {
		t.Error(err)
	}
	if err := GiveUp(t.Context(), w.dir, "v", w.options(false)); err != nil || w.d.count() != 1 {
		t.Error(err, w.d.count())
	}
	refused("(u)")
	if err := GiveUp(t.Context(), w.dir, "/dev/ublkb1", w.options(false)); err != nil || w.d.count() != 0 || w.file() != "" {
		t.Error(err, w.d.count(), w.file())
	}
	// It is no longer needed.
	o = w.own(true)
	w.attach(o, "v")
	w.close(o)
}

// TestNotWrittenBack: if the kernel cannot write all data back at the end of a disk, the command that ended the disk
// reports it.
func TestNotWrittenBack(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	w.d.fail["flush"] = ublk.ErrNotFlushed
	if err := o.Detach(t.Context(), "v", true); !errors.Is(err, ublk.ErrNotFlushed) || w.d.count() != 0 || len(o.devicesOf("")) != 0 {
		t.Errorf("detach: %v, %d devices are left", err, w.d.count())
	}
	w.attach(o, "v")
	w.d.fail["flush"] = ublk.ErrNotFlushed
	if err := o.Close(); !errors.Is(err, ublk.ErrNotFlushed) || w.d.count() != 0 {
		t.Errorf("close: %v, %d devices are left", err, w.d.count())
	}
}

// TestRecoverWaitsForOthers: Recover waits for disks that another command is recovering, and reports their outcome.
func TestRecoverWaitsForOthers(t *testing.T) {
	w := waitingMachine(t)
	o := w.own(true)
	mine, _, err := o.claimWaiting("")
	if err != nil || len(mine) != 1 {
		t.Fatal(mine, err)
	}
	outcome := make(chan []Recovery, 1)
	go func() {
		list, err := o.Recover(t.Context(), "")
		if err != nil {
			t.Error(err)
		}
		outcome <- list
	}()
	select {
	case list := <-outcome:
		t.Fatalf("it does not wait: %v", list)
	case <-time.After(50 * time.Millisecond):
	}
	o.release(mine[0], errors.New("not today"))
	if list := <-outcome; len(list) != 1 || list[0].Error == nil || !strings.Contains(list[0].Error.Message, "not today") {
		t.Error(list)
	}
	if mine, _, err = o.claimWaiting("v"); err != nil || len(mine) != 1 {
		t.Fatal(mine, err)
	}
	go func() { list, _ := o.Recover(t.Context(), "v"); outcome <- list }()
	if r := o.recoverDisk(t.Context(), mine[0]); r.Error != nil {
		t.Fatal(r.Error)
	}
	for _, r := range <-outcome { // nothing, if it came later
		if r.Error != nil {
			t.Error(r.Error)
		}
	}
	w.close(o)
}
