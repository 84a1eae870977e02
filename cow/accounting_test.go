package cow

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// TestSpaceComesBack builds a deep tree of snapshots and clones, and deletes it in random order. Whatever the order,
// all of the space must come back, to the last byte, when the names are gone.
func TestSpaceComesBack(t *testing.T) {
	t.Parallel()
	rounds := 8
	if raceEnabled {
		rounds = 1
	}
	l := newCrashHarness(t)
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(uint64(seed), 6))
		w, err := l.open(crashImage{fs: crashfs.New(), table: l.newTable(), m: newModel(1, state{}), floor: 1, what: "new"}, never, rng)
		if err != nil {
			t.Fatal(err)
		}
		w.grow(t, rng)
		full := w.s.Info()
		w = w.shrinkAway(t, rng)
		in := w.s.Info()
		if in.LiveBytes != 0 || in.Volumes != 0 || in.Snapshots != 0 || in.Chunks > 2 {
			t.Errorf("seed %d: after everything is deleted: %+v", seed, in)
		}
		if n := w.versions(t); n != 0 {
			t.Errorf("seed %d: %d versions of leaves are left", seed, n)
		}
		if full.LiveBytes == 0 || full.Snapshots < 20 {
			t.Errorf("seed %d: there was little to delete: %+v", seed, full)
		}
		if err := w.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPointFollowsHead makes a point lose its last clone when the head behind it is only partly reaped: a batch has 3
// leaves, and the branch has 32.
func TestPointFollowsHead(t *testing.T) {
	w := newModelStore(t)
	w.m.create("v", 32<<20, format.Raw)
	if _, err := w.s.CreateVolume("v", VolumeOptions{Size: 32 << 20}); w.event(err) != nil {
		t.Fatal(err)
	}
	each := func(block int64) {
		for leaf := range int64(32) {
			if err := w.put("v", leaf<<20+block<<12, 8<<10); err != nil {
				t.Fatal(err)
			}
		}
	}
	point := Ref{"v", "point"}
	each(0)
	w.m.snapshot(point)
	w.m.clone(point, "clone")
	if err := w.event(errors.Join(w.s.Snapshot(point), w.s.Clone(point, "clone"))); err != nil {
		t.Fatal(err)
	}
	each(1) // changes one of the two blocks that the point has, and adds one
	for _, name := range []string{"v", "clone"} {
		w.closeDevice(name)
		w.m.remove(Ref{Volume: name})
		if err := w.event(w.s.Remove(Ref{Volume: name}, true)); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the first commits the removal of the name
			if err := w.s.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 40 {
		w.mustBe(t)
	}
	if in := w.s.Info(); in.LiveBytes != 0 || w.versions(t) != 0 {
		t.Errorf("something is left: %+v", in)
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
}

// grow makes a chain of snapshots, and clones of clones, with writes between.
func (w *modelStore) grow(t *testing.T, rng *rand.Rand) {
	w.must(t, op{"create", 0, rng.Uint32(), 0})
	for range 60 {
		names := slices.Sorted(maps.Keys(w.m.now()))
		name := names[len(names)-1-min(rng.IntN(2), len(names)-1)] // mostly the deepest
		for range 1 + rng.IntN(4) {
			w.must(t, op{[]string{"write", "write", "write", "discard"}[rng.IntN(4)], uint32(rng.IntN(len(names))), rng.Uint32(), rng.Uint32()})
			if err := w.put(name, int64(rng.IntN(60))<<12, int64(1+rng.IntN(8))<<12); err != nil {
				t.Fatal(err)
			}
		}
		sn := Ref{name, w.newName("s")}
		w.m.snapshot(sn)
		if err := w.event(w.s.Snapshot(sn)); err != nil {
			t.Fatal(err)
		}
		if len(names) < 8 && rng.IntN(4) == 0 {
			to := w.newName("zz")
			w.m.clone(sn, to)
			if err := w.event(w.s.Clone(sn, to)); err != nil {
				t.Fatal(err)
			}
		}
		if rng.IntN(3) == 0 {
			w.must(t, op{kind: "checkpoint"})
		}
	}
	w.mustBe(t)
}

// shrinkAway deletes everything, one name at a time, and checks that no deletion makes the used space grow.
func (w *modelStore) shrinkAway(t *testing.T, rng *rand.Rand) *modelStore {
	last := w.s.Info().LiveBytes
	for i := 0; len(w.m.now()) > 0; i++ {
		var refs []Ref
		for name, v := range w.m.now() {
			if len(v.snaps) == 0 || rng.IntN(8) == 0 {
				refs = append(refs, Ref{Volume: name})
			}
			for sn := range v.snaps {
				refs = append(refs, Ref{name, sn})
			}
		}
		slices.SortFunc(refs, func(a, b Ref) int {
			return slices.Compare([]string{a.Volume, a.Snapshot}, []string{b.Volume, b.Snapshot})
		})
		r := refs[rng.IntN(len(refs))]
		if r.Snapshot == "" {
			w.closeDevice(r.Volume)
		}
		if err := w.release(r); err != nil {
			t.Fatal(err)
		}
		w.m.remove(r)
		if err := w.event(w.s.Remove(r, true)); err != nil {
			t.Fatal(err)
		}
		if len(w.m.now()) == 0 {
			break
		}
		switch rng.IntN(6) {
		case 0:
			w.must(t, op{kind: "checkpoint"})
		case 1:
			w = w.again(t)
		case 2: // everything deleted so far
			w.must(t, op{kind: "reap"}, op{kind: "reap"})
			if live := w.s.Info().LiveBytes; live > last {
				t.Errorf("deleting took space: %d live bytes, before %d", live, last)
			} else {
				last = live
			}
			w.mustBe(t)
		}
	}
	for range 100 {
		if err := w.s.Checkpoint(); err != nil {
			t.Fatal(err)
		}
	}
	w.mustBe(t)
	return w
}

func (w *modelStore) versions(t *testing.T) int64 {
	rep := mustCheck(t, w.s)
	if rep.Branches != 0 {
		t.Error(fmt.Sprint(rep.Branches, " branches are left"))
	}
	return rep.Versions
}
