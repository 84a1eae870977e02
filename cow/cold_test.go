package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// quickCodec is the codec of tests that make very many passes.
var quickCodec = func() *codecPool {
	p, err := newCodecPool(format.Zstd, 3)
	if err != nil {
		panic(err)
	}
	return p
}()

// faults returns the number of operations of the disk that have failed.
func (w *modelStore) faults() int {
	if fs, ok := w.s.fs.(*crashfs.FS); ok {
		return fs.Failed()
	}
	return 0
}

// cold makes a whole cold pass, or a part of one over what the table has at the moment, and counts the records that it
// wrote.
func (w *modelStore) cold(o op) error {
	s := w.s
	if o.c%3 == 0 {
		twice := o.b%2 == 1
		if twice { // otherwise the reaper may hand something to a head that is new to the second pass
			if err := w.event(s.reclaimDeleted(context.Background())); err != nil {
				return err
			}
		}
		faults := w.faults()
		rep, err := s.Cold(context.Background())
		w.catchUp()
		if err := w.event(err); err != nil || !twice {
			return err
		}
		// A second pass right after it finds nothing to do.
		seq := w.seq()
		again, err := s.Cold(context.Background())
		wrote := w.seq() != seq
		w.catchUp()
		if err := w.event(err); err != nil {
			return err
		}
		if wrote && w.faults() == faults { // a pass leaves out what it cannot read
			return fmt.Errorf("a cold pass wrote %+v, and the next %+v", rep, again)
		}
		return nil
	}
	from := place{}
	if o.b%2 == 0 {
		from = s.marked()
	}
	p, err := s.newColdPass(from, s.end())
	if err != nil {
		return err
	}
	for n := mix(o.b) % 12; n > 0; n-- {
		more, err := p.step()
		w.catchUp()
		if err != nil && !errors.Is(err, errBusy) && !errors.Is(err, ErrNoSpace) {
			return err
		}
		if !more {
			s.coldDone(p.to)
			return nil
		}
	}
	return nil
}

// catchUp counts records that the store has written by itself.
func (w *modelStore) catchUp() {
	for w.m.next() < w.seq() {
		w.m.record(w.m.now())
	}
}

// volume makes a volume in both the model and the store.
func (w *modelStore) volume(t *testing.T, name string, size int64, codec format.Codec) {
	t.Helper()
	w.m.create(name, size, codec)
	if _, err := w.s.CreateVolume(name, VolumeOptions{Size: size, Codec: codec}); w.event(err) != nil {
		t.Fatal(err)
	}
}

// scatter writes the blocks of a volume's first MiB, one at a time, in random order.
func (w *modelStore) scatter(t *testing.T, name string, kind int) {
	t.Helper()
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(format.LeafBlocks) {
		w.write(t, name, int64(i)*format.BlockSize, format.BlockSize, kind)
	}
}

func (w *modelStore) write(t *testing.T, name string, off, n int64, kind int) {
	t.Helper()
	d, err := w.device(name)
	must(t, err)
	w.writes++
	p := make([]byte, n)
	fill(p, kind, rand.New(rand.NewPCG(w.writes, 1)))
	w.m.write(name, p, off)
	_, err = d.WriteAt(p, off)
	must(t, err)
}

func (w *modelStore) discard(t *testing.T, name string, off, n int64) {
	t.Helper()
	d, err := w.device(name)
	must(t, err)
	w.m.discard(name, off, n)
	must(t, d.Discard(off, n))
}

func (w *modelStore) takeSnapshot(t *testing.T, name string) {
	t.Helper()
	w.m.snapshot(Ref{"v", name})
	must(t, w.event(w.s.Snapshot(Ref{"v", name})))
}

// whole makes a whole cold pass.
func (w *modelStore) whole(t *testing.T) ColdReport {
	t.Helper()
	rep, err := w.s.Cold(context.Background())
	w.catchUp()
	must(t, w.event(err))
	return rep
}

func (w *modelStore) end(t *testing.T) {
	t.Helper()
	w.mustBe(t)
	next := w.again(t)
	next.mustBe(t)
	must(t, next.close())
}

// TestColdRaces changes a leaf between the pass's reading and rewriting of it.
func TestColdRaces(t *testing.T) {
	t.Parallel()
	const unit = format.UnitSize
	for _, c := range []struct {
		name  string
		units int // how many may be rewritten
		do    func(*testing.T, *modelStore)
	}{
		{"nothing", 16, func(*testing.T, *modelStore) {}},
		{"write of a first block", 15, func(t *testing.T, w *modelStore) { w.write(t, "v", 3*unit, 4096, 0) }},
		{"write of a last block", 15, func(t *testing.T, w *modelStore) { w.write(t, "v", 4*unit-4096, 4096, 0) }},
		{"write of a part of a block", 15, func(t *testing.T, w *modelStore) { w.write(t, "v", 3*unit+7*4096+512, 512, 0) }},
		{"write of two units", 14, func(t *testing.T, w *modelStore) { w.write(t, "v", 5*unit-4096, 8192, 0) }},
		{"writes of all blocks", 0, func(t *testing.T, w *modelStore) { w.scatter(t, "v", 0) }},
		{"write of another leaf", 16, func(t *testing.T, w *modelStore) { w.write(t, "v", 1<<20, 4096, 0) }},
		{"discard of a block", 15, func(t *testing.T, w *modelStore) { w.discard(t, "v", 8*unit+4096, 4096) }},
		{"discard of all", 0, func(t *testing.T, w *modelStore) { w.discard(t, "v", 0, 2<<20) }},
		{"zeros", 14, func(t *testing.T, w *modelStore) { w.write(t, "v", 9*unit+8192, unit, 2) }},
		{"snapshot", 0, func(t *testing.T, w *modelStore) { w.takeSnapshot(t, "new") }},
		{"snapshot and write", 0, func(t *testing.T, w *modelStore) { w.takeSnapshot(t, "new"); w.write(t, "v", 4*unit+4096, 4096, 0) }},
		{"snapshot, and all is written again", 0, func(t *testing.T, w *modelStore) { w.takeSnapshot(t, "new"); w.scatter(t, "v", 0) }},
		{"clone", 16, func(t *testing.T, w *modelStore) {
			w.m.clone(Ref{"v", "old"}, "c")
			must(t, w.event(w.s.Clone(Ref{"v", "old"}, "c")))
		}},
		{"rollback", 0, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.rollback(Ref{"v", "old"})
			must(t, w.event(w.s.Rollback(Ref{"v", "old"})))
		}},
		{"rollback and write", 0, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.rollback(Ref{"v", "old"})
			must(t, w.event(w.s.Rollback(Ref{"v", "old"})))
			w.write(t, "v", 0, unit, 0)
		}},
		{"delete", 0, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.remove(Ref{Volume: "v"})
			must(t, w.event(w.s.Remove(Ref{Volume: "v"}, true)))
		}},
		{"delete and reap", 0, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.remove(Ref{Volume: "v"})
			must(t, w.event(w.s.Remove(Ref{Volume: "v"}, true)))
			w.must(t, op{kind: "reap"}, op{kind: "reap"})
		}},
		{"shrink", 8, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.resize("v", 8*unit)
			must(t, w.event(w.s.Resize("v", 8*unit, true)))
		}},
		{"shrink and grow", 7, func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			for _, n := range []int64{8*unit - 512, 2 << 20} {
				w.m.resize("v", n)
				must(t, w.event(w.s.Resize("v", n, true)))
			}
		}},
		{"clean", 0, func(t *testing.T, w *modelStore) {
			must(t, w.s.Checkpoint())
			for w.s.cleaner.mover == nil || w.s.cleaner.mover.c != nil && w.s.cleaner.mover.c.live > 0 {
				if err := w.clean(op{}); err != nil {
					t.Fatal(err)
				}
			}
			for range 8 { // all chunks
				must(t, w.clean(op{}))
				must(t, w.s.Checkpoint())
			}
		}},
		{"checkpoints", 16, func(t *testing.T, w *modelStore) { w.must(t, op{kind: "reap"}) }},
		{"another pass", 0, func(t *testing.T, w *modelStore) { w.whole(t) }},
		{"deletion of the snapshot before", 16, func(t *testing.T, w *modelStore) {
			w.m.remove(Ref{"v", "old"})
			must(t, w.event(w.s.Remove(Ref{"v", "old"}, false)))
			w.must(t, op{kind: "reap"})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newModelStore(t)
			w.volume(t, "v", 2<<20, format.S2)
			w.write(t, "v", 0, 1<<20, 1)
			w.takeSnapshot(t, "old")
			w.scatter(t, "v", 0)
			w.must(t, op{kind: "flush"})
			d, err := w.device("v")
			must(t, err)
			p, err := w.s.newColdPass(place{}, w.s.end())
			must(t, err)
			if err := p.prepare(d.b, 0); err != nil || len(p.units) != 16 {
				t.Fatalf("%d units: %v", len(p.units), err)
			}
			c.do(t, w)
			seq := w.seq()
			must(t, p.rewrite())
			w.catchUp()
			if n := int(w.seq() - seq); n != c.units {
				t.Errorf("%d units were rewritten, want %d", n, c.units)
			}
			w.end(t)
		})
	}
}

// TestColdAndSlotReuse makes a block's entry come again, in another chunk of the same slot, between the pass's reading
// and rewriting of the block.
func TestColdAndSlotReuse(t *testing.T) {
	dir := setup(t, 4<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1, chunkBytes: 64 << 10})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func(seed uint64, block int64) []byte {
		p := randomBytes(format.BlockSize, seed)
		_, err := d.WriteAt(p, block*format.BlockSize)
		must(t, err)
		return p
	}
	write(1, 300)
	write(2, 0)
	p, err := s.newColdPass(place{}, s.end())
	must(t, err)
	k := d.b.leaf(0, head)
	must(t, p.prepare(d.b, 0))
	// Rewriting would gain nothing, so the pass makes no unit. The unit is made here, from what the pass read.
	_, _, err = p.read(d.b, 0)
	must(t, err)
	u := &p.units[0]
	u.payload = p.data[:format.BlockSize]
	u.h = format.RecordHeader{Branch: d.b.ID, Kind: format.KindData, Blocks: 1, PayloadLen: len(u.payload), PayloadCRC: format.Checksum(u.payload)}
	target := p.leaf.Entries[0]
	var now []byte
	for i := uint64(3); ; i++ {
		if i > 5000 {
			t.Fatal("the entry has not come again")
		}
		now = write(i, 0)
		if i%8 == 0 {
			write(i, 300)
			must(t, s.Checkpoint())
		}
		l := s.cache.Lock(k)
		e := l.Leaf().Entry(0)
		l.Unlock()
		if e == target {
			break
		}
	}
	must(t, p.rewrite())
	got := make([]byte, format.BlockSize)
	_, err = d.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, now) {
		t.Error("the cold pass has brought old content back")
	}
	mustEnd(t, s, d)
}

// TestColdGains looks at the units that a pass writes, and at those that it leaves.
func TestColdGains(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		codec   format.Codec
		kind    int
		scatter bool
		units   int     // of 16 blocks, afterwards
		most    float64 // the most space it may take, as a part of the space before
	}{
		{"text in order", format.S2, 5, false, 16, 0.8},
		{"text in any order", format.S2, 5, true, 16, 0.6},
		{"text, by zstd", format.Zstd, 5, false, 16, 0.95},
		{"noise in order", format.S2, 1, false, 0, 1},
		{"noise in any order", format.S2, 1, true, 16, 1},
		{"uncompressed, in order", format.Raw, 5, false, 0, 1},
		{"uncompressed, in any order", format.Raw, 5, true, 16, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newModelStore(t)
			w.s.cold.codec = nil
			w.volume(t, "v", 1<<20, c.codec)
			if c.scatter {
				w.scatter(t, "v", c.kind)
			} else {
				w.write(t, "v", 0, 1<<20, c.kind)
			}
			live := w.s.Info().LiveBytes
			rep := w.whole(t)
			d, err := w.device("v")
			must(t, err)
			units := 0
			must(t, w.s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) {
				for i := 0; i < format.LeafBlocks; i += 16 {
					if lf.Entry(i).Blocks() == 16 && lf.Entry(i+15) == lf.Entry(i).WithIndex(15) {
						units++
					}
				}
			}))
			now := w.s.Info().LiveBytes
			t.Logf("%d bytes, now %d; %+v", live, now, rep)
			if units != c.units || float64(now) > c.most*float64(live) || (c.units > 0) != (rep.Leaves > 0) {
				t.Errorf("%d units; %d bytes, and were %d: %+v", units, now, live, rep)
			}
			if again := w.whole(t); again != (ColdReport{}) {
				t.Errorf("the next pass has done %+v", again)
			}
			w.end(t)
		})
	}
}

// TestColdShared: a disk image that a snapshot and clones share becomes smaller, once for all of them. Its space comes
// back when the last of them is gone.
func TestColdShared(t *testing.T) {
	w := newModelStore(t)
	w.s.cold.codec = nil
	w.volume(t, "v", 2<<20, format.S2)
	w.write(t, "v", 0, 1<<20, 5)
	w.write(t, "v", 9*4096, 4096, 5) // makes parts of records dead
	w.write(t, "v", 17*4096, 8192, 1)
	w.discard(t, "v", 30*4096, 4096)
	w.takeSnapshot(t, "golden")
	for _, name := range []string{"c1", "c2"} {
		w.m.clone(Ref{"v", "golden"}, name)
		must(t, w.event(w.s.Clone(Ref{"v", "golden"}, name)))
	}
	w.write(t, "c1", 5*4096, 3*4096, 5)
	w.write(t, "v", 70*4096, 9*4096, 5)
	w.must(t, op{kind: "checkpoint"})
	live := w.s.Info().LiveBytes
	rep := w.whole(t)
	now := w.s.Info().LiveBytes
	t.Logf("%d bytes, now %d; %+v", live, now, rep)
	if float64(now) > 0.85*float64(live) {
		t.Errorf("%d bytes are live, and were %d", now, live)
	}
	if again := w.whole(t); again != (ColdReport{}) {
		t.Errorf("the next pass has done %+v", again)
	}
	w.mustBe(t)
	w = w.again(t)
	w.mustBe(t)
	_, err := w.s.Clean(context.Background(), 0.05)
	w.catchUp()
	must(t, err)
	w.mustBe(t)
	for _, r := range []Ref{{Volume: "c2"}, {"v", "golden"}, {Volume: "v"}, {Volume: "c1"}} {
		if r.Snapshot == "" {
			w.closeDevice(r.Volume)
		}
		w.m.remove(r)
		must(t, w.event(w.s.Remove(r, true)))
		for range 12 {
			must(t, w.s.Checkpoint())
		}
		w.mustBe(t)
	}
	if in := w.s.Info(); in.LiveBytes != 0 || w.versions(t) != 0 {
		t.Errorf("something is left: %+v", in)
	}
	must(t, w.close())
}

// TestColdPointRaces lets others work on a volume while the pass moves a version that the volume's snapshot holds.
func TestColdPointRaces(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(*testing.T, *modelStore)
	}{
		{"write", func(t *testing.T, w *modelStore) { w.write(t, "v", 100<<10, 100<<10, 5) }},
		{"discard", func(t *testing.T, w *modelStore) { w.discard(t, "v", 0, 1<<20) }},
		{"snapshot", func(t *testing.T, w *modelStore) { w.takeSnapshot(t, "new"); w.write(t, "v", 0, 8192, 5) }},
		{"deletion of the snapshot", func(t *testing.T, w *modelStore) {
			w.m.remove(Ref{"v", "golden"})
			must(t, w.event(w.s.Remove(Ref{"v", "golden"}, false)))
		}},
		{"deletion of all", func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.remove(Ref{Volume: "v"})
			must(t, w.event(w.s.Remove(Ref{Volume: "v"}, true)))
		}},
		{"rollback", func(t *testing.T, w *modelStore) {
			w.closeDevice("v")
			w.m.rollback(Ref{"v", "golden"})
			must(t, w.event(w.s.Rollback(Ref{"v", "golden"})))
			w.write(t, "v", 100<<10, 100<<10, 5)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newModelStore(t)
			w.volume(t, "v", 1<<20, format.S2)
			w.write(t, "v", 0, 1<<20, 5)
			w.takeSnapshot(t, "golden")
			must(t, w.s.Checkpoint())
			d, err := w.device("v")
			must(t, err)
			s, b := w.s, d.b
			p, err := s.newColdPass(place{}, s.end())
			must(t, err)
			l := coldLeaf{b: b}
			s.checkpoints.mu.Lock()
			if epoch, err := s.version(b, 0, 1, true, &p.leaf); err != nil || epoch != 1 {
				t.Fatal(epoch, err)
			}
			c.do(t, w)
			for l.block < format.LeafBlocks {
				must(t, p.version(&l))
			}
			s.checkpoints.mu.Unlock()
			w.catchUp()
			if p.report.Leaves != 1 {
				t.Errorf("%+v", p.report)
			}
			w.mustBe(t)
			w.must(t, op{kind: "reap"})
			w.end(t)
		})
	}
}

// TestColdPresentEpoch: a pass does not take a version of the present epoch for one that a point has, even though a
// snapshot may be taken a moment later. What the pass has read of the version may have changed before that.
func TestColdPresentEpoch(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 1<<20, format.S2)
	w.write(t, "v", 0, 1<<20, 5)
	must(t, w.s.Checkpoint())
	d, err := w.device("v")
	must(t, err)
	p, err := w.s.newColdPass(place{}, w.s.end())
	must(t, err)
	l := coldLeaf{b: d.b, epoch: head, ofPoint: true}
	must(t, p.points(&l))
	if l.ofPoint || l.block > 0 {
		t.Errorf("after %+v", l)
	}
	must(t, w.close())
}

// TestColdMark: leaves that a pass has gone over are skipped by the next one, after a restart too. Leaves that have
// changed since are not skipped.
func TestColdMark(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 2<<20, format.S2)
	w.write(t, "v", 0, 2<<20, 1)
	w.whole(t)
	must(t, w.event(w.s.Checkpoint()))
	w = w.again(t)
	due := func() int {
		p, err := w.s.newColdPass(w.s.marked(), w.s.end())
		must(t, err)
		_, err = p.scan()
		must(t, err)
		return len(p.due)
	}
	if n := due(); n != 0 || w.s.marked() == (place{}) {
		t.Errorf("%d leaves are due after a pass, the mark is %+v", n, w.s.marked())
	}
	w.write(t, "v", 5<<12, 4096, 1)
	must(t, w.event(w.s.Checkpoint()))
	if n := due(); n != 1 {
		t.Errorf("%d leaves are due, one has changed", n)
	}
	p, err := w.s.newColdPass(place{}, w.s.marked()) // with the state before the write
	must(t, err)
	if _, err := p.scan(); err != nil || len(p.due) != 1 || p.due[0].index != 1 {
		t.Errorf("due is %+v: the leaf that has changed is not cold", p.due)
	}
	must(t, w.close())
}

// TestColdClock: a horizon is never younger than it should be, nor much older.
func TestColdClock(t *testing.T) {
	c := coldClock{after: 160 * time.Second}
	start := time.Now()
	for i := range 2000 {
		now := start.Add(time.Duration(i) * time.Second)
		c.sample(now, place{ChunkSeq: uint64(i)})
		got := int(c.horizon(now).ChunkSeq)
		if i >= 160 && (got > i-160 || got < i-180) || i < 160 && got != 0 {
			t.Fatalf("after %d s the horizon is at %d s", i, got)
		}
		if len(c.samples) > 20 {
			t.Fatalf("%d samples", len(c.samples))
		}
	}
}

// TestColdIdle: the pass runs by itself, but not while others work.
func TestColdIdle(t *testing.T) {
	s, _ := newStore(t, Options{ColdAfter: 200 * time.Millisecond, checkpointInterval: 100 * time.Millisecond})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := make([]byte, 4<<20)
	fill(p, 5, rand.New(rand.NewPCG(1, 1)))
	_, err = d.WriteAt(p, 0)
	must(t, err)
	got := make([]byte, len(p))
	live := s.Info().LiveBytes
	for until := time.Now().Add(3 * time.Second); time.Now().Before(until); {
		for i := range int64(1024) {
			_, err = d.ReadAt(got[:4096], i<<12)
			must(t, err)
		}
	}
	if now := s.Info().LiveBytes; now != live {
		t.Errorf("beside reads, %d live bytes became %d", live, now)
	}
	for until := time.Now().Add(time.Minute); s.Info().LiveBytes > live*9/10; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%d bytes are live still", live)
		}
	}
	_, err = d.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, p) {
		t.Error("it reads otherwise")
	}
	mustEnd(t, s, d)
}

// TestColdOnAFullStore: if there is little room, a pass changes nothing.
func TestColdOnAFullStore(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 2<<20, format.S2)
	w.write(t, "v", 0, 2<<20, 5)
	w.injector.fs.SetCapacity(wal.Spare + 6<<20)
	seq := w.seq()
	if rep, err := w.s.Cold(context.Background()); !errors.Is(err, ErrNoSpace) || w.seq() != seq {
		t.Errorf("%+v: %v", rep, err)
	}
	w.injector.fs.SetCapacity(1 << 30)
	if rep := w.whole(t); rep.Leaves != 2 {
		t.Errorf("%+v", rep)
	}
	w.end(t)
}

// TestColdGoesOn: if a pass runs out of room in the middle of a leaf, it finishes the leaf once there is room.
func TestColdGoesOn(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 1<<20, format.S2)
	w.scatter(t, "v", 1)
	must(t, w.event(w.s.Checkpoint()))
	d, err := w.device("v")
	must(t, err)
	p, err := w.s.newColdPass(place{}, w.s.end())
	must(t, err)
	w.injector.fs.SetCapacity(4 << 20)
	if err := p.head(d.b, 0); !errors.Is(err, ErrNoSpace) || p.next == 0 {
		t.Fatalf("after %d units: %v", p.next, err)
	}
	w.injector.fs.SetCapacity(1 << 30)
	must(t, p.head(d.b, 0))
	w.catchUp()
	if p.report.Leaves != 1 || p.next != 0 {
		t.Errorf("%+v, %d", p.report, p.next)
	}
	if rep := w.whole(t); rep != (ColdReport{}) {
		t.Errorf("the next pass has done %+v", rep)
	}
	w.end(t)
}

// TestColdLeavesDamage: a pass does not copy damaged data, and rewrites everything else.
func TestColdLeavesDamage(t *testing.T) {
	for _, snapshot := range []bool{false, true} {
		s, dir := newStore(t, Options{checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)})
		_, err := s.CreateVolume("v", VolumeOptions{Size: 2 << 20, Codec: format.S2})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		p := make([]byte, 2<<20)
		fill(p, 5, rand.New(rand.NewPCG(1, 1)))
		_, err = d.WriteAt(p, 0)
		must(t, err)
		if snapshot {
			must(t, s.Snapshot(Ref{"v", "s"}))
		}
		must(t, s.Checkpoint())
		f, err := os.OpenFile(filepath.Join(dir, chunksDir, wal.ChunkName(0)), os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte("damage"), format.ChunkHeaderSize+5000)
		must(t, errors.Join(err, f.Close()))
		rep, err := s.Cold(context.Background())
		if err != nil || rep.Leaves != 1 {
			t.Errorf("%+v: %v", rep, err)
		}
		got := make([]byte, 1<<20)
		if _, err := d.ReadAt(got, 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("read of the damaged leaf: %v", err)
		}
		if _, err := d.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, p[1<<20:]) {
			t.Errorf("read of the other: %v", err)
		}
		must(t, errors.Join(d.Close(), s.Close()))
	}
}

// TestColdPassesOverWhatCannotBeRead: a pass goes on to the end even if one chunk cannot be read.
func TestColdPassesOverWhatCannotBeRead(t *testing.T) {
	for _, held := range []bool{false, true} {
		t.Run(fmt.Sprint(held), func(t *testing.T) {
			dir := setup(t, 4<<20, format.S2)
			fs := newHook(t, dir)
			s := open(t, dir, Options{fs: fs, checkpointInterval: -1, chunkBytes: 512 << 10})
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			p := make([]byte, 4<<20)
			fill(p, 5, rand.New(rand.NewPCG(1, 1)))
			_, err = d.WriteAt(p, 0)
			must(t, err)
			if held {
				must(t, s.Snapshot(Ref{"v", "s"}))
			}
			must(t, s.Checkpoint())
			fs.onRead = func(name string) error {
				if name == wal.ChunkName(0) {
					return syscall.EIO
				}
				return nil
			}
			rep, err := s.Cold(context.Background())
			if err != nil || rep.Leaves < 2 || rep.Leaves == 4 {
				t.Errorf("%+v, %v", rep, err)
			}
			fs.onRead = nil
			must(t, errors.Join(d.Close(), s.Close()))
		})
	}
}

// TestColdAfterAFailedCommit: a moved record is logged with its live blocks, and after a failed commit those in memory
// are not those of the table, with which a replay would begin. So nothing of a point is moved until a commit succeeds.
func TestColdAfterAFailedCommit(t *testing.T) {
	w := newModelStore(t)
	w.volume(t, "v", 1<<20, format.S2)
	w.write(t, "v", 0, 1<<20, 5)
	w.takeSnapshot(t, "golden")
	w.write(t, "v", 0, 4096, 5)
	w.must(t, op{kind: "checkpoint"})
	s := w.s
	d, err := w.device("v")
	must(t, err)
	p, err := s.newColdPass(place{}, s.end())
	must(t, err)
	w.write(t, "v", 64<<10, 4096, 5)
	undo := limitFileSize(t, 8<<10)
	err = s.Checkpoint()
	undo()
	if !errors.Is(err, syscall.EFBIG) {
		t.Fatalf("checkpoint: %v", err)
	}
	before := w.seq()
	l := coldLeaf{b: d.b, epoch: 1, ofPoint: true}
	if err := p.points(&l); !errors.Is(err, errFull) || w.seq() != before {
		t.Errorf("%v; %d records were moved", err, w.seq()-before)
	}
	w.must(t, op{kind: "checkpoint"})
	for l = (coldLeaf{b: d.b, epoch: 1, ofPoint: true}); l.ofPoint; {
		must(t, p.points(&l))
	}
	if w.seq() == before {
		t.Error("nothing is moved after a commit that succeeded")
	}
	w.catchUp()
	w.mustBe(t)
	must(t, w.close())
}
