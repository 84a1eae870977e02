package owner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// fakeMachine is a store, and a fake kernel that has its devices.
type fakeMachine struct {
	t   *testing.T
	dir string
	d   *fakeDriver
}

func newFakeMachine(t *testing.T) *fakeMachine { return &fakeMachine{t, newStore(t), newFakeDriver()} }

func (w *fakeMachine) options(lasting bool) Options {
	o := quick
	o.driver, o.Offer, o.Temporary, o.LockTimeout = w.d, lasting, !lasting, 200*time.Millisecond
	return o
}

// own makes an owner of the store. Its life ends with the test.
func (w *fakeMachine) own(lasting bool) *Owner {
	w.t.Helper()
	o, err := Own(context.Background(), w.dir, w.options(lasting))
	if err != nil {
		w.t.Fatal(err)
	}
	return o
}

func (w *fakeMachine) attach(o *Owner, name string) Device {
	w.t.Helper()
	r, err := cow.ParseRef(name)
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := o.Attach(w.t.Context(), AttachOptions{Ref: r})
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *fakeMachine) close(o *Owner) {
	w.t.Helper()
	if err := o.Close(); err != nil {
		w.t.Fatal(err)
	}
}

// kill ends an owner as SIGKILL does: its devices wait, and the file of devices lists them.
func (w *fakeMachine) kill(o *Owner) {
	w.t.Helper()
	_, _, ends := o.servedUntil()
	w.d.loseServers()
	for _, e := range ends {
		<-e.done
	}
	w.close(o)
}

func (w *fakeMachine) file() string {
	b, err := os.ReadFile(filepath.Join(w.dir, recordName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Fatal(err)
	}
	return string(b)
}

// edit changes the file of devices, and its checksum if it can still be read.
func (w *fakeMachine) edit(from, to string) {
	w.t.Helper()
	text := w.file()
	if !strings.Contains(text, from) {
		w.t.Fatalf("no %q in %s", from, text)
	}
	changed := []byte(strings.Replace(text, from, to, 1))
	var r record
	if json.Unmarshal(changed, &r) == nil {
		r.Sum = r.sum()
		changed, _ = json.Marshal(r)
	}
	if err := os.WriteFile(filepath.Join(w.dir, recordName), changed, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// TestDamagedFileOfDevices flips each byte of the file of devices: it lists what it listed, or it is damage. It never
// lists something else, or nothing.
func TestDamagedFileOfDevices(t *testing.T) {
	w := waitingMachine(t)
	in, err := storage.OpenFolder(w.dir, false)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	want, err := readRecord(in)
	if err != nil || len(want.Devices) != 1 {
		t.Fatal(want, err)
	}
	text := []byte(w.file())
	for at := range text {
		for bit := range 8 {
			bad := bytes.Clone(text)
			bad[at] ^= 1 << bit
			if err := os.WriteFile(filepath.Join(w.dir, recordName), bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := readRecord(in); err == nil && !reflect.DeepEqual(got, want) {
				t.Errorf("byte %d, bit %d: %s lists %+v", at, bit, bad, got)
			} else if err != nil && !strings.Contains(err.Error(), recordName) {
				t.Error(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(w.dir, recordName), text, 0o600); err != nil {
		t.Fatal(err)
	}
	o := w.own(true)
	w.recovers(o, "", 1)
	w.close(o)
}

func (w *fakeMachine) waiting(o *Owner) (list []string) {
	for _, d := range o.devicesOf("") {
		if d.Waits {
			list = append(list, fmt.Sprint(d.Ref, " ", d.Path))
		}
	}
	return list
}

func (w *fakeMachine) recovers(o *Owner, what string, want int) {
	w.t.Helper()
	outcome, err := o.Recover(w.t.Context(), what)
	if err != nil {
		w.t.Fatal(err)
	}
	n := 0
	for _, r := range outcome {
		if r.Error != nil {
			w.t.Log(r.Error)
		} else {
			n++
		}
	}
	if n != want {
		w.t.Fatalf("%d recovered of %d, want %d", n, len(outcome), want)
	}
}

func bootID(t *testing.T) string {
	t.Helper()
	boot, err := storage.BootID()
	if err != nil {
		t.Fatal(err)
	}
	return boot
}

// leaveOwner changes the store as if its owner was killed, with memory in the folder shm that does not exist.
func (w *fakeMachine) leaveOwner(shm string) {
	w.t.Helper()
	var st, in unix.Stat_t
	if err := errors.Join(unix.Stat(w.dir, &st), unix.Stat(shm, &in)); err != nil {
		w.t.Fatal(err)
	}
	text := fmt.Sprintf(`{"boot":%q,"dev":%d,"ino":%d,"shm":%d,"buffers":"%032d"}`, bootID(w.t), st.Dev, st.Ino, in.Dev, 0)
	if err := os.WriteFile(filepath.Join(w.dir, "owner"), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func write(t *testing.T, b *fakeBlock, text string) {
	t.Helper()
	r := &ublk.Request{Op: ublk.OpWrite, Buf: bytes.Repeat([]byte(text), 4096)[:4096], Length: 4096}
	if err := b.h.ServeUBLK(r); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, b *fakeBlock) string {
	t.Helper()
	p := make([]byte, 4096)
	if _, err := b.h.(*target).dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return string(p[:4])
}

func TestRecover(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	write(t, w.d.devices[0].server, "text")
	w.kill(o)

	// A temporary owner holds it, and recovers nothing.
	o = w.own(false)
	if got := w.waiting(o); len(got) != 1 || got[0] != "v /dev/ublkb0" {
		t.Fatal(got)
	}
	const say = "v waits as /dev/ublkb0 for its server: run 'vdisk recover', or 'vdisk detach --force v' to give it up"
	v := cow.Ref{Volume: "v"}
	snap := cow.Ref{Volume: "v", Snapshot: "s"}
	if err := o.Snapshot(t.Context(), snap); err != nil {
		t.Error(err)
	}
	if err := o.Clone(t.Context(), snap, "c"); err != nil {
		t.Error(err)
	}
	for what, err := range map[string]error{
		"remove":   o.Remove(t.Context(), v, true),
		"rollback": o.Rollback(t.Context(), snap),
		"shrink":   o.Resize(t.Context(), "v", 1<<20, true),
		"grow":     o.Resize(t.Context(), "v", 1<<30, true),
		"detach":   o.Detach(t.Context(), "v", false),
		"export":   o.Export(t.Context(), v, nil),
	} {
		if !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := o.Recover(t.Context(), ""); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	w.close(o)

	o = w.own(true)
	if _, err := o.Attach(t.Context(), AttachOptions{Ref: v}); err == nil || !strings.Contains(err.Error(), say) {
		t.Error(err)
	}
	if _, err := o.exports.acquire(v, false); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	if l, _, err := Listen(filepath.Join(t.TempDir(), "s")); err != nil {
		t.Fatal(err)
	} else if err := o.Serve(t.Context(), l, ServeOptions{Exports: []cow.Ref{v}}); err == nil || !strings.Contains(err.Error(), say) {
		t.Error(err)
	}
	if _, err := o.Recover(t.Context(), "nope"); !errors.Is(err, cow.ErrNotFound) {
		t.Error(err)
	}
	// A recovery that fails can be repeated.
	w.d.fail["recover"] = errors.New("not today")
	w.recovers(o, "v", 0)
	if d := o.devicesOf("v")[0]; !d.Waits || d.Error == "" {
		t.Error(d)
	}
	w.recovers(o, "/dev/ublkb0", 1)
	w.recovers(o, "", 0)
	if d := o.devicesOf("v")[0]; d.Waits || d.Error != "" {
		t.Error(d)
	}
	if got := read(t, w.d.devices[0].server); got != "text" {
		t.Errorf("%q", got)
	}
	if err := o.Detach(t.Context(), "v", false); err != nil {
		t.Error(err)
	}
	w.close(o)
	if w.d.count() != 0 || w.file() != "" {
		t.Error(w.d.count(), w.file())
	}
}

// TestRecordedBeforeMade: whenever a process dies, the file lists every device that the kernel has.
func TestRecordedBeforeMade(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.d.onCreate = func() {
		if !strings.Contains(w.file(), cookie(w.d.devices[0].info.Cookie).String()) {
			t.Error("a device that nobody knows")
		}
	}
	w.attach(o, "v")
	w.close(o)
	// It died between ADD and START: the device is dead, and goes.
	w.d.onCreate = nil
	o = w.own(true)
	w.attach(o, "v")
	w.kill(o)
	w.d.devices[1].info.State = ublk.KernelDead
	w.d.fail["delete"] = errors.New("not today")
	w.close(w.own(true))
	if w.d.count() != 1 || !strings.Contains(w.file(), "cookie") {
		t.Error("it is not tried again", w.file())
	}
	o = w.own(true)
	if got := o.devicesOf(""); len(got) != 0 || w.d.count() != 0 || w.file() != "" {
		t.Error(got, w.d.count(), w.file())
	}
	w.close(o)
	// A device that cannot be made leaves nothing.
	o = w.own(true)
	w.d.fail["create"] = ublk.ErrNoFreeDevice
	if _, err := o.Attach(t.Context(), AttachOptions{Ref: cow.Ref{Volume: "v"}}); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	if w.file() != "" {
		t.Error(w.file())
	}
	w.attach(o, "v")
	w.close(o)
}

// TestForeignDevices: the file is believed only about devices that carry the store's mark.
func TestForeignDevices(t *testing.T) {
	for name, change := range map[string]func(w *fakeMachine){
		"another boot":         func(w *fakeMachine) { w.edit(bootID(w.t), "00000000-1111-2222-3333-444444444444") },
		"another cookie":       func(w *fakeMachine) { w.d.devices[0].info.Cookie++ },
		"a device that went":   func(w *fakeMachine) { delete(w.d.devices, 0) },
		"no driver":            func(w *fakeMachine) { w.d.fail["devices"] = ublk.ErrNoDriver },
		"another folder":       func(w *fakeMachine) { w.edit(`"ino":`, `"ino":1`) },
		"an id of another use": func(w *fakeMachine) { w.d.devices[0].info.Cookie = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			w := newFakeMachine(t)
			o := w.own(true)
			w.attach(o, "v")
			w.kill(o)
			change(w)
			o = w.own(true)
			if got := w.waiting(o); len(got) != 0 {
				t.Error(got)
			}
			if err := o.Remove(t.Context(), cow.Ref{Volume: "v"}, false); err != nil {
				t.Error(err)
			}
			w.close(o)
		})
	}
	t.Run("a copy of the store", func(t *testing.T) {
		w := newFakeMachine(t)
		o := w.own(true)
		w.attach(o, "v")
		w.kill(o)
		twin := filepath.Join(t.TempDir(), "copy")
		if err := os.CopyFS(twin, os.DirFS(w.dir)); err != nil {
			t.Fatal(err)
		}
		original := w.dir
		w.dir = twin
		o = w.own(true)
		if got := w.waiting(o); len(got) != 0 {
			t.Error("it takes the original's device", got)
		}
		w.close(o)
		w.dir = original
		o = w.own(true)
		w.recovers(o, "", 1)
		w.close(o)
	})
	t.Run("a driver that cannot be asked", func(t *testing.T) {
		w := newFakeMachine(t)
		o := w.own(true)
		w.attach(o, "v")
		w.kill(o)
		w.d.fail["devices"] = ublk.ErrPermission
		o = w.own(false)
		if err := o.Remove(t.Context(), cow.Ref{Volume: "v"}, true); !errors.Is(err, cow.ErrBusy) {
			t.Error(err)
		}
		w.close(o)
		o = w.own(true)
		w.recovers(o, "", 1)
		w.close(o)
	})
}

func TestRenamedWhileItWaits(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	if err := o.Rename(t.Context(), cow.Ref{Volume: "v"}, cow.Ref{Volume: "w"}); err != nil {
		t.Fatal(err)
	}
	w.kill(o)
	o = w.own(false)
	if err := o.Rename(t.Context(), cow.Ref{Volume: "w"}, cow.Ref{Volume: "x"}); err != nil {
		t.Fatal(err)
	}
	w.close(o)
	// A process that dies during a renaming has written both names.
	for _, ref := range []string{`"ref":"gone","renaming":"x"`, `"ref":"x","renaming":"never"`} {
		w.edit(w.file()[strings.Index(w.file(), `"ref"`):strings.LastIndex(w.file(), `}]`)], ref)
		o = w.own(false)
		if got := w.waiting(o); len(got) != 1 || got[0] != "x /dev/ublkb0" {
			t.Error(got)
		}
		w.close(o)
	}
	// A disk whose volume is gone can only be given up.
	w.edit(`"ref":"x"`, `"ref":"y"`)
	o = w.own(true)
	w.recovers(o, "", 0)
	if err := o.Detach(t.Context(), "/dev/ublkb0", true); err != nil || w.d.count() != 0 || w.file() != "" {
		t.Error(err, w.d.count(), w.file())
	}
	w.close(o)
}

func TestForce(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	w.d.devices[0].server.inUse = true
	if err := o.Detach(t.Context(), "v", false); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	if err := o.Detach(t.Context(), "v", true); err != nil {
		t.Error(err)
	}
	w.attach(o, "v")
	w.kill(o)
	o = w.own(false) // which needs no daemon
	if err := o.Detach(t.Context(), "v", true); err != nil || w.d.count() != 0 {
		t.Error(err, w.d.count())
	}
	if err := o.Remove(t.Context(), cow.Ref{Volume: "v"}, false); err != nil {
		t.Error(err)
	}
	w.close(o)
}

// TestGiveUpFindsTheDevice: a disk's former number may belong to another device by now, and may be unknown at first.
func TestGiveUpFindsTheDevice(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	w.kill(o)
	w.d.fail["devices"] = ublk.ErrPermission
	o = w.own(true)
	if err := o.Detach(t.Context(), "v", true); err != nil || w.d.count() != 0 {
		t.Errorf("a device that was not told of: %v, %d are left", err, w.d.count())
	}
	id := w.attach(o, "v").ID
	w.kill(o)
	o = w.own(true)
	w.d.devices[id].info.Cookie++ // somebody deleted it, and made his own
	if err := o.Detach(t.Context(), "v", true); err != nil || w.d.count() != 1 {
		t.Errorf("a device of somebody else: %v, %d are left", err, w.d.count())
	}
	if got := o.devicesOf(""); len(got) != 0 {
		t.Error(got)
	}
	w.close(o)
}

// TestForgottenAnswers: if acknowledged writes to a disk are lost, the disk is not served again, however often the
// store is opened. A snapshot's disk is served, because a snapshot does not change.
func TestForgottenAnswers(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	snap := cow.Ref{Volume: "v", Snapshot: "s"}
	if err := o.Snapshot(t.Context(), snap); err != nil {
		t.Fatal(err)
	}
	w.attach(o, "v")
	w.attach(o, "v@s")
	w.kill(o)
	// The state after an owner was killed and its shared memory was removed.
	w.leaveOwner("/dev/shm")
	w.close(w.own(false))
	o = w.own(true)
	w.recovers(o, "", 1)
	if d := o.devicesOf("v")[0]; !d.Waits || !strings.Contains(d.Error, "detach --force v'") {
		t.Error(d)
	}
	if err := o.Detach(t.Context(), "v", true); err != nil {
		t.Error(err)
	}
	w.attach(o, "v")
	w.kill(o)
	o = w.own(true)
	w.recovers(o, "", 2) // a new disk, with another past
	w.close(o)
}

// TestServedWithoutSharedMemory: without shared memory a disk is attached and recovered as usual, because acknowledged
// data is in the store's files.
func TestServedWithoutSharedMemory(t *testing.T) {
	w := newFakeMachine(t)
	opts := w.options(true)
	opts.sharedMemory = filepath.Join(t.TempDir(), "missing")
	for range 2 {
		o, err := Own(context.Background(), w.dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		if w.d.count() == 0 {
			w.attach(o, "v")
			if got := w.d.devices[0].server.opts.Recovery; got != ublk.RecoverReissue {
				t.Errorf("the disk ends with its server: recovery %v", got)
			}
		} else {
			w.recovers(o, "", 1)
		}
		if !o.store.SurvivesKill() {
			t.Error("what is answered ends with the owner")
		}
		w.kill(o)
	}
	// A short-lived owner serves no disk.
	opts.Offer = false
	o, err := Own(context.Background(), w.dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Recover(t.Context(), ""); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	w.close(o)
}

func TestResizeAttached(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	if err := o.Resize(t.Context(), "v", 128<<20, false); err != nil {
		t.Fatal(err)
	}
	if got := w.d.devices[0].info.Size; got != 128<<20 {
		t.Error(got)
	}
	if err := o.Resize(t.Context(), "v", 64<<20, true); !errors.Is(err, cow.ErrBusy) {
		t.Error(err)
	}
	w.d.features &^= ublk.FeatureUpdateSize
	if err := o.Resize(t.Context(), "v", 256<<20, false); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "6.16") {
		t.Error(err)
	}
	if v, err := o.Volume(t.Context(), "v"); err != nil || v.Size != 128<<20 {
		t.Error(v.Size, err)
	}
	w.close(o)
}

// TestLostServer: a device whose queues break is served again, unless they break soon after the start.
func TestLostServer(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	disks, _ := o.servedDisks()
	w.d.loseServers()
	<-disks[0].end.done
	if got := w.waiting(o); len(got) != 1 {
		t.Error(got)
	}
	if err := o.Detach(t.Context(), "v", true); err != nil {
		t.Error(err)
	}
	w.close(o)
}

func TestStoreOnItsOwnDevice(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	w.attach(o, "v")
	w.d.backing = []int{0}
	if _, err := o.Attach(t.Context(), AttachOptions{Ref: cow.Ref{Volume: "v", Snapshot: "s"}}); !errors.Is(err, cow.ErrInvalid) {
		t.Error(err)
	}
	w.kill(o)
	for name, open := range map[string]func() error{
		"Own":         func() error { _, err := Own(t.Context(), w.dir, w.options(true)); return err },
		"Open":        func() error { _, err := Open(t.Context(), w.dir, w.options(false)); return err },
		"OpenLasting": func() error { _, _, err := OpenLasting(t.Context(), w.dir, w.options(false), nil); return err },
	} {
		if err := open(); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "waits for its server") {
			t.Errorf("%s: %v", name, err)
		}
	}
	w.d.backing = nil
	o = w.own(true)
	w.d.backing = []int{0}
	w.recovers(o, "", 0)
	w.d.backing = nil
	w.recovers(o, "", 1)
	w.close(o)
}
