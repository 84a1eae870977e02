package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/freeze"
	"github.com/vdisk/vdisk/internal/owner"
)

// coldSystem is a freeze.System whose file systems somebody thaws too early if early is set.
type coldSystem struct {
	frozen bool
	early  bool
	limit  time.Duration
	alarm  func()
}

func (y *coldSystem) Open(string) (freeze.Mount, error) { return y, nil }
func (y *coldSystem) Close() error                      { return nil }
func (y *coldSystem) Freeze() error                     { y.frozen = true; return nil }

func (y *coldSystem) After(d time.Duration, f func()) func() bool {
	y.limit, y.alarm = d, f
	return func() bool { return true }
}

func (y *coldSystem) Thaw() error {
	y.frozen = false
	if y.early {
		return freeze.ErrThawed
	}
	return nil
}

// frozenStore has the volumes a, attached as ublkb0, b, as ublkb1, and c, which is not attached.
type frozenStore struct {
	owner.Store
	system *coldSystem
	fails  error  // of a snapshot
	kept   bool   // a snapshot cannot be removed
	exists bool   // the snapshots are there already
	waits  bool   // the devices have no server
	end    func() // what ends a snapshot that has no answer
	deeds  []string
}

func (s *frozenStore) Volumes(context.Context) (list []owner.Volume, err error) {
	for i, name := range []string{"a", "b", "c"} {
		v := owner.Volume{VolumeInfo: cow.VolumeInfo{Name: name}}
		if s.exists {
			v.Snapshots = []cow.SnapshotInfo{{Name: "s"}}
		}
		if name != "c" {
			v.Devices = []owner.Device{{Ref: cow.Ref{Volume: name}, Path: fmt.Sprint("/dev/ublkb", i), Waits: s.waits}}
		}
		list = append(list, v)
	}
	return list, nil
}

func (s *frozenStore) Prune(_ context.Context, dry bool, targets ...cow.PruneTarget) (r cow.PruneReport, err error) {
	s.deeds = append(s.deeds, fmt.Sprint("prune ", namedBy(targets), dry))
	if s.kept {
		r.Kept = []cow.KeptSnapshot{{Ref: targets[0].Ref}}
	}
	return r, nil
}

// take takes a snapshot of v.
func (s *frozenStore) take(ctx context.Context, v string) ([]cow.Ref, error) {
	if s.end != nil { // the owner is stuck
		s.end()
		<-ctx.Done()
		return nil, owner.UnansweredError{Err: context.Cause(ctx)}
	}
	s.deeds = append(s.deeds, fmt.Sprint("take ", v, s.system.frozen))
	return []cow.Ref{{Volume: v, Snapshot: "s"}}, s.fails
}

// TestFrozen takes a snapshot of a frozen file system, or none: of one that is on the volume, and that is frozen to the
// end.
func TestFrozen(t *testing.T) {
	broken := errors.New("broken")
	for _, x := range []struct {
		name    string
		below   string // devices below the file system
		volumes string
		store   frozenStore
		early   bool
		want    string
		err     error
		says    string
	}{
		{name: "all is well", below: "ublkb0", volumes: "a", want: "[take atrue]"},
		{name: "on a partition, and one of several", below: "ublkb1p1 ublkb1", volumes: "a b", want: "[take atrue]"},
		{name: "on LVM, on both", below: "dm-0 ublkb0 ublkb1", volumes: "b a", want: "[take btrue]"},
		{name: "on LVM, on one more", below: "dm-0 ublkb0 ublkb1", volumes: "b", want: "[]", err: cow.ErrInvalid, says: "it is on /dev/ublkb0, which is a, and the snapshots are of b"},
		{name: "on another volume", below: "ublkb1", volumes: "a c", want: "[]", err: cow.ErrInvalid, says: "it is on /dev/ublkb1, which is b, and the snapshots are of a, c"},
		{name: "on another disk", below: "sda1 sda", volumes: "a", want: "[]", err: cow.ErrInvalid, says: "it is on /dev/sda1, and a is /dev/ublkb0"},
		{name: "on a device without a server", below: "ublkb1p1 ublkb1", volumes: "b", store: frozenStore{waits: true}, want: "[]", err: cow.ErrBusy, says: "it is on /dev/ublkb1, which is b, and waits for its server"},
		{name: "not on the device without a server", below: "nbd0", volumes: "c", store: frozenStore{waits: true}, want: "[take ctrue]"},
		{name: "a volume that is not attached", below: "nbd0", volumes: "c", want: "[take ctrue]"},
		{name: "one of them is not attached", below: "nbd0", volumes: "a c", want: "[take atrue]"},
		{name: "not known", volumes: "a", want: "[take atrue]"},
		{name: "a volume that does not exist", below: "nbd0", volumes: "nope", want: "[]", err: cow.ErrNotFound},
		{name: "a name that is taken", below: "ublkb0", volumes: "a", store: frozenStore{exists: true}, want: "[]", err: cow.ErrExists},
		{name: "the snapshot fails", below: "ublkb0", volumes: "a", store: frozenStore{fails: broken}, want: "[take atrue]", err: broken},
		{name: "thawed too early", below: "ublkb0", volumes: "a", early: true, want: "[take atrue prune [a@s] false]", err: freeze.ErrThawed, says: "no snapshot was taken"},
		{name: "thawed too early, and in use", below: "ublkb0", volumes: "a", early: true, store: frozenStore{kept: true}, want: "[take atrue prune [a@s] false]", err: freeze.ErrThawed, says: "the snapshots are there"},
		{name: "thawed too early, and the snapshot fails", below: "ublkb0", volumes: "a", early: true, store: frozenStore{fails: cow.ErrExists}, want: "[take atrue]", err: cow.ErrExists},
	} {
		y := &coldSystem{early: x.early}
		s := &x.store
		s.system = y
		a := &app{dir: "/", stderr: io.Discard, freezer: y, devicesBelow: func(string) []string { return strings.Fields(x.below) }}
		set := flag.NewFlagSet("", flag.ContinueOnError)
		set.Var(cli.NewStringSlice("/proc"), "freeze", "")
		set.Duration("freeze-timeout", 7*time.Second, "")
		var refs []cow.Ref
		volumes := strings.Fields(x.volumes)
		for _, v := range volumes {
			refs = append(refs, cow.Ref{Volume: v, Snapshot: "s"})
		}
		err := a.frozen(cli.NewContext(nil, set, nil), s, refs, func(ctx context.Context) ([]cow.Ref, error) { return s.take(ctx, volumes[0]) })
		if got := fmt.Sprint(s.deeds); got != x.want || !errors.Is(err, x.err) || y.frozen || x.says != "" && !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %s, not %s; %v", x.name, got, x.want, err)
		}
		if x.want != "[]" && y.limit != 7*time.Second {
			t.Errorf("%s: thawed after %v", x.name, y.limit)
		}
	}
}

// TestFrozenUnanswered has an owner that does not answer: the command ends with the limit or a signal, and says that it
// does not know.
func TestFrozenUnanswered(t *testing.T) {
	for _, wanted := range []cow.Ref{{Volume: "a", Snapshot: "s"}, {Volume: "a"}} {
		for _, bySignal := range []bool{false, true} {
			ctx, cancel := context.WithCancelCause(t.Context())
			y := &coldSystem{}
			s := &frozenStore{system: y, end: func() { y.alarm() }}
			exit := exitFailed
			if bySignal {
				s.end, exit = func() { cancel(signalError{syscall.SIGINT}) }, exitSignal+int(syscall.SIGINT)
			}
			a := &app{dir: "/", stderr: io.Discard, freezer: y, devicesBelow: func(string) []string { return []string{"ublkb0"} }}
			set := flag.NewFlagSet("", flag.ContinueOnError)
			set.Var(cli.NewStringSlice("/proc"), "freeze", "")
			set.Duration("freeze-timeout", time.Second, "")
			c := cli.NewContext(nil, set, &cli.Context{Context: ctx})
			err := a.frozen(c, s, []cow.Ref{wanted}, func(ctx context.Context) ([]cow.Ref, error) { return s.take(ctx, "a") })
			cancel(nil)
			if err == nil || !strings.Contains(err.Error(), "it is not known whether a@") || y.frozen || len(s.deeds) > 0 {
				t.Errorf("%v: %v, %v", wanted, err, s.deeds)
			}
			if got, _, _ := classify(err); got != exit {
				t.Errorf("%v: exit %d, not %d", wanted, got, exit)
			}
		}
	}
}

// TestFrozenByOwner refuses a device that nobody serves if this process has the store: nobody else could.
func TestFrozenByOwner(t *testing.T) {
	d := owner.Device{Ref: cow.Ref{Volume: "a"}, Path: "/dev/ublkb0"}
	err := attended(&owner.Owner{}, d)
	if _, code, hint := classify(err); code != "busy" || !strings.Contains(hint, "vdisk recover") {
		t.Errorf("%v: %s, %s", err, code, hint)
	}
	if err := attended(&frozenStore{}, d); err != nil {
		t.Error(err)
	}
}
