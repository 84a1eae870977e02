package owner

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/rbddiff"
)

// TestImportDiffOfAnOpenVolume: a difference is not applied to a volume that somebody has open, to read or to write. A
// snapshot of it may be open.
func TestImportDiffOfAnOpenVolume(t *testing.T) {
	dir := t.TempDir()
	if err := cow.Create(dir); err != nil {
		t.Fatal(err)
	}
	o, err := Own(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.CreateVolume(t.Context(), "v", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := o.Snapshot(t.Context(), cow.Ref{Volume: "v", Snapshot: "a"}); err != nil {
		t.Fatal(err)
	}
	var diff bytes.Buffer
	w := rbddiff.NewWriter(&diff, rbddiff.Header{From: "a", To: "b", Size: 1 << 20})
	if err := errors.Join(w.Data([]byte("data"), 4095), w.Zero(0, 100), w.End()); err != nil {
		t.Fatal(err)
	}
	apply := func(force bool) error {
		_, err := o.ImportDiff(t.Context(), "v", cow.VolumeOptions{}, force, sparse.FromStream(bytes.NewReader(diff.Bytes())), nil)
		return err
	}
	open := func(snapshot string, readOnly bool) *cow.Device {
		d, err := o.store.OpenDevice(cow.Ref{Volume: "v", Snapshot: snapshot}, readOnly)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	for _, readOnly := range []bool{false, true} {
		d := open("", readOnly)
		for _, force := range []bool{false, true} {
			if err := apply(force); !errors.Is(err, cow.ErrBusy) {
				t.Errorf("read-only: %v, force: %v: %v", readOnly, force, err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d := open("a", true)
	if err := errors.Join(apply(false), d.Close()); err != nil {
		t.Error(err)
	}
	d = open("b", true)
	got := make([]byte, 6)
	if _, err := d.ReadAt(got, 4094); err != nil || string(got) != "\x00data\x00" {
		t.Errorf("%q, %v", got, err)
	}
	if err := errors.Join(d.Close(), o.Close()); err != nil {
		t.Error(err)
	}
}
