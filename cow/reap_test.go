package cow

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// Deletions of several snapshots of one volume come to their end, one after the other, however many leaves each has to
// look at.
func TestReaperEndsWithManyLeaves(t *testing.T) {
	const leaves = 100
	s, _ := newStore(t, Options{checkpointInterval: -1, reapBatch: 1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 * leaves << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(3) {
		for j := range int64(leaves) { // none of them is written again
			_, err := d.WriteAt(randomBytes(format.BlockSize, uint64(i+1)), (i*leaves+j)<<20)
			must(t, err)
		}
		must(t, s.Snapshot(Ref{"v", fmt.Sprint("s", i)}))
	}
	must(t, s.Checkpoint())
	for i := range 2 {
		must(t, s.Remove(Ref{"v", fmt.Sprint("s", i)}, false))
	}
	n := 0
	for ; s.changed() && n < 12*leaves; n++ {
		must(t, s.Checkpoint())
	}
	t.Logf("%d checkpoints", n)
	if s.changed() {
		t.Error("there is no end to it")
	}
	mustEnd(t, s, d)
}

// A leaf of a head that was given up, which somebody late has brought into memory, is not what the reaper goes by.
func TestLateLookAtAReapedHead(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 1<<20, format.S2)
	for i, n := range []string{"a", "b", "c"} {
		w.write(t, "v", int64(i)*hotUnit, hotUnit, 0)
		w.takeSnapshot(t, n)
	}
	w.scatter(t, "v", 0)
	w.must(t, op{kind: "flush"})
	d, err := w.device("v")
	must(t, err)
	p, err := w.s.newColdPass(place{}, w.s.end())
	must(t, err)
	if err := p.prepare(d.b, 0); err != nil || len(p.units) == 0 {
		t.Fatalf("%d units: %v", len(p.units), err)
	}
	w.closeDevice("v")
	w.m.rollback(Ref{"v", "a"})
	must(t, w.event(w.s.Rollback(Ref{"v", "a"})))
	w.must(t, op{kind: "reap"})
	must(t, p.rewrite())
	for _, n := range []string{"b", "c"} {
		w.m.remove(Ref{"v", n})
		must(t, w.event(w.s.Remove(Ref{"v", n}, false)))
		w.must(t, op{kind: "reap"})
	}
	w.end(t)
}

// The oldest snapshot goes without a look at everything that the volume had then.
func TestOldestSnapshotGoesFast(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, reapBatch: 4})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 30, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func(from, n int64) {
		t.Helper()
		for i := from; i < from+n; i++ {
			_, err := d.WriteAt(randomBytes(format.BlockSize, uint64(i+1)), i<<20)
			must(t, err)
		}
	}
	write(0, 400)
	for i := range int64(4) {
		must(t, s.Snapshot(Ref{"v", fmt.Sprint(i)}))
		write(4*i, 6)
	}
	must(t, s.Checkpoint())
	before := s.Info().LiveBytes
	for i := range 3 {
		must(t, s.Remove(Ref{"v", fmt.Sprint(i)}, false))
		n := 0
		for ; s.changed(); n++ {
			must(t, s.Checkpoint())
		}
		if n > 6 {
			t.Errorf("%d checkpoints of 4 leaves each, where 6 have changed", n)
		}
	}
	if freed := before - s.Info().LiveBytes; freed != 18*(format.BlockSize+format.RecordHeaderSize) {
		t.Errorf("%d bytes have become free", freed)
	}
	mustEnd(t, s, d)
}

// A deletion does not go by successors that the table does not have yet: those of a point that was made after the last
// checkpoint.
func TestSuccessorIsNotInTheTableYet(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 1<<20, format.S2)
	w.write(t, "v", 0, hotUnit, 0)
	w.takeSnapshot(t, "a")
	w.m.remove(Ref{"v", "a"})
	must(t, w.event(w.s.Remove(Ref{"v", "a"}, false)))
	must(t, w.s.Checkpoint()) // the table knows that the name is gone; the next checkpoint lets the reaper work
	w.write(t, "v", 0, hotUnit, 1)
	w.takeSnapshot(t, "b")
	w.must(t, op{kind: "reap"})
	w.end(t)
}

// What a deletion has to look at comes from the table before the store's lock is taken, which keeps writers waiting.
func TestReaperReadsWithoutTheLock(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 30, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(2) {
		for j := range int64(300) {
			_, err := d.WriteAt(randomBytes(format.BlockSize, uint64(i+1)), j<<20)
			must(t, err)
		}
		must(t, s.Snapshot(Ref{"v", fmt.Sprint(i)}))
	}
	must(t, errors.Join(s.Remove(Ref{"v", "1"}, false), s.Checkpoint()))
	with, without := 0, 0
	must(t, s.cache.Close())
	s.cache, err = leafcache.New(MinCacheBytes, func(k leafcache.Key, l *format.Leaf) (uint32, error) { // it has nothing yet
		if s.mu.TryLock() {
			s.mu.Unlock()
			without++
		} else {
			with++
		}
		return s.loadLeaf(k, l)
	})
	must(t, err)
	for s.changed() {
		must(t, s.Checkpoint())
	}
	if with > 0 || without < 300 {
		t.Errorf("%d leaves were read with the lock held, %d without", with, without)
	}
	mustEnd(t, s, d)
}
