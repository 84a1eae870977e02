package owner

import (
	"fmt"
	"reflect"
	"testing"

	"github.com/vdisk/vdisk/cow"
)

// TestUsageOfVolumes: the usage of volumes with all their snapshots is requested by the names of the volumes alone. The
// size of a request is limited, and a volume may have very many snapshots.
func TestUsageOfVolumes(t *testing.T) {
	dir := newStore(t)
	o := offer(t, dir)
	var refs []cow.Ref
	for i := range 3 {
		r := cow.Ref{Volume: "v", Snapshot: fmt.Sprint("s", i)}
		if err := o.Snapshot(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, r)
	}
	if _, err := o.CreateVolume(t.Context(), "w", cow.VolumeOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	want, err := o.Usage(t.Context(), append([]cow.Ref{{Volume: "v"}}, refs...)...)
	if err != nil || len(want) != 4 {
		t.Fatal(want, err)
	}
	for _, s := range []Store{o, open(t, dir)} {
		got, err := s.VolumeUsage(t.Context(), "v", "nosuch")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%T: %+v, %v; want %+v", s, got, err, want)
		}
		if got, err := s.VolumeUsage(t.Context()); err != nil || len(got) != 0 {
			t.Errorf("%T: of no volume: %+v, %v", s, got, err)
		}
	}
}
