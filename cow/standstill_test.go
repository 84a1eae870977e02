package cow

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

// slowTable is a store of at most limit bytes whose commits take 20 ms, whatever the disk is.
func slowTable(t *testing.T, limit int64) *Store {
	s, _ := newStore(t, Options{MaxBytes: limit, chunkBytes: 2 << 20, onCommit: func(done bool) error {
		if !done {
			time.Sleep(20 * time.Millisecond)
		}
		return nil
	}})
	return s
}

// half makes a volume, and fills it with blocks that compress to a half.
func half(t *testing.T, s *Store, name string, size int64) *Device {
	t.Helper()
	_, err := s.CreateVolume(name, VolumeOptions{Size: size, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: name}, false)
	must(t, err)
	p := make([]byte, 128<<10)
	r := rand.New(rand.NewPCG(1, 1))
	for off := int64(0); off < size; off += int64(len(p)) {
		workload.HalfCompressible(r, p)
		_, err := d.WriteAt(p, off)
		must(t, err)
	}
	return d
}

// overwriter writes blocks of a volume again and again, some much more often than others.
type overwriter struct {
	d      *Device
	pick   func() int64
	p      []byte
	writes atomic.Int64
	worst  time.Duration
}

func newOverwriter(d *Device, size int64) *overwriter {
	r := rand.New(rand.NewPCG(2, 2))
	z := rand.NewZipf(r, 1.1, 1, uint64(size/format.BlockSize-1))
	perm := r.Perm(int(size / format.BlockSize))
	w := &overwriter{d: d, p: make([]byte, 1<<20), pick: func() int64 { return int64(perm[z.Uint64()]) }}
	workload.HalfCompressible(r, w.p)
	return w
}

func (w *overwriter) write() error {
	n := w.writes.Add(1)
	start := time.Now()
	_, err := w.d.WriteAt(w.p[n%256*format.BlockSize:][:format.BlockSize], w.pick()*format.BlockSize)
	w.worst = max(w.worst, time.Since(start))
	return err
}

// longest is more than a write waits in these tests on the busiest machine. The promise is 2 s on one with nothing else
// to do; a writer that stands still waits for ever, or for as long as a deletion takes.
const longest = 30 * time.Second

// TestWritesGoOnWhileSnapshotsAreRemoved: while many snapshots of another volume go, which takes a checkpoint after the
// other, the cleaner finds room for a writer on a store that is full, though all that it can move is held by a
// snapshot.
func TestWritesGoOnWhileSnapshotsAreRemoved(t *testing.T) {
	s := slowTable(t, 64<<20)
	g := half(t, s, "g", 16<<20)
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, format.BlockSize)
	const snapshots = 200
	for i := range snapshots {
		must(t, s.Snapshot(Ref{"g", fmt.Sprint(i)}))
		for range 16 {
			workload.HalfCompressible(r, p)
			_, err := g.WriteAt(p, r.Int64N(16<<20/format.BlockSize)*format.BlockSize)
			must(t, err)
		}
	}
	const size = 24 << 20
	w := newOverwriter(half(t, s, "h", size), size)
	n := 0
	turn := func() {
		must(t, s.Snapshot(Ref{"h", fmt.Sprint(n)}))
		if n >= 3 {
			must(t, s.Remove(Ref{"h", fmt.Sprint(n - 3)}, false))
		}
		n++
	}
	for !w.d.Paced() { // until there is little room
		if w.writes.Load()%2000 == 0 {
			turn()
		}
		must(t, w.write())
	}
	turn()
	for i := range snapshots {
		must(t, s.Remove(Ref{"g", fmt.Sprint(i)}, false))
	}
	w.worst = 0
	reaping := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.catalog.unnamedPoints) > 10
	}
	before, start := w.writes.Load(), time.Now()
	for reaping() && w.worst < longest {
		if w.writes.Load()%2000 == 0 {
			turn()
		}
		must(t, w.write())
	}
	t.Logf("%d writes in %v, the longest waited %v; %+v", w.writes.Load()-before, time.Since(start).Round(time.Millisecond), w.worst.Round(time.Millisecond), s.Info())
	if w.worst >= longest {
		t.Errorf("a write waited for %v while snapshots were removed", w.worst)
	}
	mustEnd(t, s, g, w.d)
}

// TestCleanerTakesFewTurns: a chunk that snapshots hold whole is moved in a few turns of the checkpoint lock, however
// many records it has. While there is a checkpoint after the other, each turn costs one.
func TestCleanerTakesFewTurns(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 4 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	w := newOverwriter(d, 8<<20)
	for i := range int64(2048 + 1024) { // the second half twice
		w.pick = func() int64 { return i % 2048 }
		must(t, w.write())
	}
	must(t, errors.Join(s.Snapshot(Ref{"v", "a"}), s.Checkpoint()))
	quit, done := make(chan struct{}), make(chan error, 1)
	turns, last := 0, s.cleaner.moved
	go func() {
		for {
			select {
			case <-quit:
				done <- nil
				return
			default:
			}
			s.checkpoints.mu.Lock()
			err := s.checkpointLocked()
			s.mu.Lock()
			if s.cleaner.moved != last { // since the checkpoint before
				turns, last = turns+1, s.cleaner.moved
			}
			s.mu.Unlock()
			time.Sleep(5 * time.Millisecond) // long enough for a mutex to be handed over to who waits
			s.checkpoints.mu.Unlock()
			if err != nil {
				done <- err
				return
			}
		}
	}()
	r, err := s.cleanOne(t.Context(), worthwhile, all, nil)
	close(quit)
	must(t, errors.Join(err, <-done))
	t.Logf("%+v in %d turns", r, turns)
	if records := r.Moved / 2112; records < 500 || turns > 4 {
		t.Errorf("cleaning a chunk of some %d records took %d turns", records, turns)
	}
	mustEnd(t, s, d)
}

// TestRoomComesBeforeAllIsReaped: where writers wait for room, the cleaner goes on as soon as some of what was deleted
// has been reaped, and not when all has.
func TestRoomComesBeforeAllIsReaped(t *testing.T) {
	s, _ := newStore(t, Options{chunkBytes: 2 << 20, reapBatch: 1, checkpointInterval: -1})
	const pieces, piece = 512, 64 << 10
	var ds [2]*Device
	for i, name := range []string{"g", "h"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: pieces / 8 << 20, Codec: format.Raw})
		must(t, err)
		ds[i], err = s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
	}
	p := randomBytes(piece, 1)
	for i := range int64(pieces) { // every chunk has some of both, an eighth of it g's, of as many leaves
		off := i * piece
		if i%8 == 0 {
			off = i / 8 << 20
		}
		_, err := ds[min(i%8, 1)].WriteAt(p, off)
		must(t, err)
	}
	must(t, errors.Join(s.Checkpoint(), ds[0].Close(), s.Remove(Ref{Volume: "g"}, true)))
	before := s.changes.gen
	if !s.cleanFor(hungry, &throttle{s: s}) {
		t.Error("nothing was gained")
	}
	t.Logf("%d checkpoints", s.changes.gen-before)
	if s.changes.gen-before > 10 || !s.reapsMore() {
		t.Errorf("writers waited for %d checkpoints; there is more to reap: %v", s.changes.gen-before, s.reapsMore())
	}
	mustEnd(t, s, ds[1])
}

// TestDeadNeighboursComeBack: of units that snapshots hold in part, what nobody holds comes back, beside a writer and
// snapshots that come and go. Else it would be moved along for ever, until there is no room left.
func TestDeadNeighboursComeBack(t *testing.T) {
	const size, keep = 40 << 20, 6
	s, _ := newStore(t, Options{MaxBytes: 64 << 20, chunkBytes: 2 << 20})
	s.wal.Limit, s.opts.takeAll = 34<<20, true // less than Options takes
	w := newOverwriter(half(t, s, "v", size), size)
	for n := range 16 {
		must(t, s.Snapshot(Ref{"v", fmt.Sprint(n)}))
		if n >= keep {
			must(t, s.Remove(Ref{"v", fmt.Sprint(n - keep)}, false))
		}
		for range 800 {
			if err := w.write(); err != nil || w.worst > longest {
				t.Fatalf("after %d writes, and a longest wait of %v: %v; %+v", w.writes.Load(), w.worst, err, s.Info())
			}
		}
	}
	t.Logf("the longest of %d writes waited %v; %+v", w.writes.Load(), w.worst.Round(time.Millisecond), s.Info())
	mustEnd(t, s, w.d)
}

// TestCleanLeavesOutWhatIsDead: if a snapshot holds one block of a unit, only that block is moved, however the volume
// is compressed.
func TestCleanLeavesOutWhatIsDead(t *testing.T) {
	for _, codec := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		t.Run(codec.String(), func(t *testing.T) {
			const size = 8 << 20
			s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
			_, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: codec})
			must(t, err)
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			model := make([]byte, size)
			r := rand.New(rand.NewPCG(1, 1))
			workload.HalfCompressible(r, model)
			_, err = d.WriteAt(model, 0)
			must(t, err)
			for off := 0; off < size; off += hotUnit {
				for i := range hotUnit / format.BlockSize { // all but one
					if i == off/hotUnit%4 {
						continue
					}
					p := model[off+i*format.BlockSize:][:format.BlockSize]
					workload.HalfCompressible(r, p)
					_, err = d.WriteAt(p, int64(off+i*format.BlockSize))
					must(t, err)
				}
			}
			must(t, errors.Join(s.Snapshot(Ref{"v", "a"}), s.Checkpoint()))
			before := s.Info()
			_, err = s.Clean(t.Context(), worthwhile)
			must(t, err)
			in := s.Info()
			stored := int64(size) // each block once
			if codec != format.Raw {
				stored /= 2
			}
			t.Logf("%d bytes in chunks, before %d, for %d", in.ChunkBytes, before.ChunkBytes, stored)
			if in.ChunkBytes > stored+stored/4 {
				t.Errorf("the chunks have %d bytes, and %d of them are dead", in.ChunkBytes, in.ChunkBytes-stored)
			}
			got := make([]byte, size)
			for _, ref := range []Ref{{"v", ""}, {"v", "a"}} {
				sd, err := s.OpenDevice(ref, true)
				must(t, err)
				if _, err := sd.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
					t.Errorf("%v has other content: %v", ref, err)
				}
				must(t, sd.Close())
			}
			again, err := s.Clean(t.Context(), worthwhile)
			if err != nil || again.Moved > 0 {
				t.Errorf("cleaned again: %+v, %v", again, err)
			}
			mustEnd(t, s, d)
		})
	}
}
