package cow

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestHolds holds snapshots: all that are named or none, within the bounds, and none that is held goes.
func TestHolds(t *testing.T) {
	s, _ := newStore(t, Options{})
	for _, name := range []string{"v", "w"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: 1 << 20})
		must(t, err)
	}
	a, b, c := Ref{"v", "a"}, Ref{"v", "b"}, Ref{"w", "c"}
	must(t, errors.Join(s.Snapshot(a, c), s.Snapshot(b), s.Hold("backup", a, c), s.Hold("audit", a)))
	for _, x := range []struct {
		what      string
		got, want error
	}{
		{"hold again", s.Hold("backup", b, a), ErrExists},
		{"hold a volume", s.Hold("backup", b, Ref{Volume: "w"}), ErrInvalid},
		{"hold nothing", s.Hold("backup", b, Ref{"w", "nope"}), ErrNotFound},
		{"hold one twice", s.Hold("backup", b, b), ErrInvalid},
		{"a bad tag", s.Hold("a b", b), ErrInvalid},
		{"release what is not", s.Release("backup", a, b), ErrNotFound},
		{"release one twice", s.Release("backup", a, a), ErrInvalid},
		{"remove it", s.Remove(a, false), ErrBusy},
		{"remove its volume", s.Remove(Ref{Volume: "v"}, true), ErrBusy},
	} {
		if !errors.Is(x.got, x.want) {
			t.Errorf("%s: %v, not %v", x.what, x.got, x.want)
		}
	}
	if err := s.Remove(a, false); !strings.Contains(err.Error(), "v@a has the holds audit, backup; 'vdisk release TAG v@a'") {
		t.Error(err)
	}
	if err := s.Remove(Ref{Volume: "w"}, true); err == nil || !strings.Contains(err.Error(), "w@c has the hold backup; 'vdisk release backup w@c'") {
		t.Error(err)
	}
	info, err := s.Volume("v")
	must(t, err)
	if h := info.Snapshots[0].Holds; len(h) != 2 || h[0].Tag != "audit" || h[1].Tag != "backup" || h[1].Created.IsZero() || info.Snapshots[1].Holds != nil {
		t.Errorf("%+v", info)
	}

	for i := range format.MaxHolds {
		must(t, s.Hold(fmt.Sprint("t", i), b))
	}
	if err := s.Hold("more", b); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if err := s.Remove(b, false); err == nil || !strings.Contains(err.Error(), "t11, t12 and 59 more;") {
		t.Error(err)
	}
	must(t, errors.Join(s.Release("audit", a), s.Release("backup", c, a), s.Remove(a, false), s.Remove(Ref{Volume: "w"}, true)))
}

// TestProperties sets and removes properties, within the bounds. They stay when the volume is renamed and rolled back,
// and a clone begins without.
func TestProperties(t *testing.T) {
	s, _ := newStore(t, Options{})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	must(t, errors.Join(s.SetProperties("v", map[string]string{"org:owner": "Zoë", "b": "1", "gone": "x"}), s.SetProperties("v", map[string]string{"gone": "", "b": "2", "never": ""})))
	want := map[string]string{"org:owner": "Zoë", "b": "2"}
	is := func(name string) map[string]string {
		t.Helper()
		info, err := s.Volume(name)
		must(t, err)
		return info.Properties
	}
	must(t, errors.Join(s.Snapshot(Ref{"v", "a"}), s.Clone(Ref{"v", "a"}, "c"), s.Rename(Ref{Volume: "v"}, Ref{Volume: "w"}), s.Rollback(Ref{"w", "a"})))
	if fmt.Sprint(is("w")) != fmt.Sprint(want) || len(is("c")) > 0 {
		t.Error(is("w"), is("c"))
	}
	full := map[string]string{}
	for i := range format.MaxProperties - 2 {
		full[fmt.Sprint(i)] = "x"
	}
	must(t, s.SetProperties("w", full))
	for _, changes := range []map[string]string{{"more": "x"}, {"a b": "x"}, {"b": "a\nb"}, {"b": strings.Repeat("x", format.MaxPropertyValue+1)}} {
		if err := s.SetProperties("w", changes); !errors.Is(err, ErrInvalid) {
			t.Error(changes, err)
		}
	}
	if got := is("w"); len(got) != format.MaxProperties || got["b"] != "2" {
		t.Error(got)
	}
	if err := s.SetProperties("nope", want); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}
