package cow

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// manySnapshots takes n snapshots of a volume at once, a thousand in an event.
func manySnapshots(t *testing.T, s *Store, name string, n int) {
	t.Helper()
	for from := 0; from < n; from += 1000 {
		must(t, s.transact(func() (*format.Event, error) {
			v := s.catalog.byName[name]
			b := v.branch.Branch
			ev := &format.Event{Op: "snapshot"}
			for i := from; i < min(n, from+1000); i++ {
				ev.Snapshots = append(ev.Snapshots, format.Snapshot{
					ID: s.catalog.newID(), Volume: v.ID, Name: fmt.Sprintf("a-snapshot-with-a-name-of-some-length-%08d", i),
					Branch: b.ID, Epoch: b.Epoch, Size: v.Size, Created: Now(),
				})
				b.Epoch++
			}
			ev.Branches = append(ev.Branches, b)
			return ev, nil
		}))
	}
}

// TestRemoveWithVeryManySnapshots: however many snapshots a volume has, they go with it in one event, which a crash
// leaves whole; what a clone needs stays.
func TestRemoveWithVeryManySnapshots(t *testing.T) {
	const n = 10_000
	dir := setup(t, 64<<20, format.S2)
	o := Options{checkpointInterval: -1}
	s := open(t, dir, o)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	want := randomBytes(1<<20, 1)
	_, err = d.WriteAt(want, 0)
	must(t, err)
	manySnapshots(t, s, "v", n)
	_, err = d.WriteAt(randomBytes(1<<20, 2), 0)
	must(t, err)
	must(t, errors.Join(s.Clone(Ref{"v", "a-snapshot-with-a-name-of-some-length-00000007"}, "c"), d.Close()))
	start := time.Now()
	if in, err := s.Volume("v"); err != nil || len(in.Snapshots) != n {
		t.Errorf("%d snapshots: %v", len(in.Snapshots), err)
	}
	us, err := s.VolumeUsage(t.Context(), "v", "none")
	if err != nil || len(us) != n+1 || us[0].Ref != (Ref{Volume: "v"}) {
		t.Errorf("usage of %d: %v", len(us), err)
	}
	t.Logf("described in %v", time.Since(start).Round(time.Millisecond))
	if err := s.Remove(Ref{Volume: "v"}, false); !errors.Is(err, ErrBusy) || len(err.Error()) > 500 || !strings.Contains(err.Error(), fmt.Sprint(n-5, " more")) {
		t.Errorf("without -r: %.600v", err)
	}
	must(t, s.Remove(Ref{Volume: "v"}, true))
	killStore(s)
	s = open(t, dir, o)
	if vs := s.Volumes(); len(vs) != 1 || vs[0].Name != "c" || vs[0].Origin != "(deleted)" {
		t.Fatalf("after a crash: %+v", vs)
	}
	if in := s.Info(); in.Snapshots != 0 {
		t.Errorf("%d snapshots are left", in.Snapshots)
	}
	must(t, s.reclaimDeleted(t.Context()))
	s.mu.Lock()
	left := len(s.catalog.snapshots)
	s.mu.Unlock()
	if left != 1 {
		t.Errorf("%d points are left, and one is needed", left)
	}
	c, err := s.OpenDevice(Ref{Volume: "c"}, false)
	must(t, err)
	got := make([]byte, len(want))
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the clone has other content: %v", err)
	}
	must(t, errors.Join(c.Close(), s.Remove(Ref{Volume: "c"}, true), s.reclaimDeleted(t.Context())))
	if in := s.Info(); in.LiveBytes != 0 {
		t.Errorf("%+v", in)
	}
	mustEnd(t, s)
}

// TestClonesAreListed: each snapshot names its clones, and not the volume that was rolled back to it.
func TestClonesAreListed(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	for i := range 3 {
		sn := Ref{"v", fmt.Sprint("s", i)}
		must(t, s.Snapshot(sn))
		for j := range i {
			must(t, s.Clone(sn, fmt.Sprintf("c%d%d", i, 1-j)))
		}
	}
	must(t, s.Rollback(Ref{"v", "s1"}))
	in, err := s.Volume("v")
	must(t, err)
	var got []string
	for _, sn := range in.Snapshots {
		got = append(got, fmt.Sprint(sn.Name, sn.Clones))
	}
	if fmt.Sprint(got) != "[s0[] s1[c11] s2[c20 c21]]" || in.Origin != "v@s1" {
		t.Errorf("%v, origin %s", got, in.Origin)
	}
	must(t, s.Close())
}
