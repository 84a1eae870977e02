package cow

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// largeChunk and smallChunk are of a store that was made where there was much room, and is used where there is little.
const largeChunk, smallChunk = 8 << 20, 2 << 20

// largeChunks makes a store of large chunks with the volumes g, h and k. It writes 16 MiB to what create returns, and
// as much to k, 64 KiB to each in turn, so that half of each chunk dies with the first. It returns the store, opened
// again with small chunks and the options.
func largeChunks(t *testing.T, o Options, create func(s *Store) *Device) *Store {
	t.Helper()
	const size, piece = 16 << 20, 64 << 10
	dir := t.TempDir()
	must(t, Create(dir))
	s := open(t, dir, Options{chunkBytes: largeChunk, checkpointInterval: -1, fs: o.fs})
	for _, name := range []string{"g", "h", "k"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: 4 * size})
		must(t, err)
	}
	g := create(s)
	k := mustOpen(t, s, "k")
	p, r := make([]byte, piece), rand.New(rand.NewPCG(1, 4))
	for at := int64(0); at < size; at += piece {
		for _, d := range []*Device{g, k} {
			noise(p, r)
			_, err := d.WriteAt(p, at)
			must(t, err)
		}
	}
	must(t, errors.Join(g.Close(), k.Close(), s.Close()))
	o.chunkBytes, o.takeAll, o.Logger = smallChunk, true, slog.New(slog.DiscardHandler)
	s = open(t, dir, o)
	t.Cleanup(func() { _ = s.Close() }) // where the test has not come to its end
	return s
}

// writeNew writes up to n new bytes to a volume, from an offset on, and returns how much it took.
func writeNew(t *testing.T, d *Device, at, n int64) (took int64, err error) {
	t.Helper()
	p := make([]byte, 64<<10)
	for took < n && err == nil {
		noise(p, rand.New(rand.NewPCG(uint64(at+took), 4)))
		if _, err = d.WriteAt(p, at+took); err == nil {
			took += int64(len(p))
		}
	}
	if err != nil && !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	return took, err
}

// TestCleanerHasRoomForTheLargestChunk: where writers have taken all the room that they can have, the cleaner can still
// clean chunks that are larger than new ones.
func TestCleanerHasRoomForTheLargestChunk(t *testing.T) {
	s := largeChunks(t, Options{MaxBytes: 64 << 20, checkpointInterval: -1}, func(s *Store) *Device { return mustOpen(t, s, "g") })
	g, h := mustOpen(t, s, "g"), mustOpen(t, s, "h")
	must(t, g.Discard(0, g.Size()))
	// The last checkpoint gives up the chunk that died whole, if there is one.
	must(t, errors.Join(s.Checkpoint(), s.Checkpoint()))
	if took, err := writeNew(t, h, 0, h.Size()); err == nil || took < 20<<20 {
		t.Fatalf("%d bytes filled the store: %v", took, err)
	}
	for n := 0; s.cleanFor(hungry, &throttle{s: s}); n++ {
		if n > 100 {
			t.Fatal("there is no end of cleaning")
		}
	}
	must(t, s.Checkpoint())
	in := s.Info()
	t.Logf("%+v", in)
	if dead := in.ChunkBytes - in.LiveBytes; dead > smallChunk {
		t.Errorf("the cleaner could not give back %d bytes that are dead", dead)
	}
	mustEnd(t, s, g, h)
}

func mustOpen(t *testing.T, s *Store, name string) *Device {
	t.Helper()
	d, err := s.OpenDevice(Ref{Volume: name}, false)
	must(t, err)
	return d
}

// TestFullStoreHasRoomAfterDeletion: when writers have heard that there is no room, what is deleted then comes back for
// the next write, also where it is parts of chunks that are larger than new ones.
func TestFullStoreHasRoomAfterDeletion(t *testing.T) {
	remove := func(r Ref) func(*testing.T, *Store) {
		return func(t *testing.T, s *Store) { must(t, s.Remove(r, true)) }
	}
	snapshotOf := func(t *testing.T, s *Store) *Device {
		must(t, s.Snapshot(Ref{"g", "a"}))
		return mustOpen(t, s, "g")
	}
	for _, c := range []struct {
		name string
		make func(*testing.T, *Store) *Device
		then func(*testing.T, *Store) // before the store is full
		end  func(*testing.T, *Store)
	}{
		{name: "volume", end: remove(Ref{Volume: "g"})},
		{
			name: "snapshot",
			then: func(t *testing.T, s *Store) {
				d := mustOpen(t, s, "g")
				must(t, errors.Join(s.Snapshot(Ref{"g", "a"}), d.Discard(0, d.Size()), d.Close()))
			},
			end: remove(Ref{"g", "a"}),
		},
		{
			name: "clone",
			make: func(t *testing.T, s *Store) *Device {
				must(t, errors.Join(s.Snapshot(Ref{"g", "a"}), s.Clone(Ref{"g", "a"}, "c")))
				return mustOpen(t, s, "c")
			},
			end: remove(Ref{Volume: "c"}),
		},
		{
			name: "rollback", make: snapshotOf,
			end: func(t *testing.T, s *Store) { must(t, s.Rollback(Ref{"g", "a"})) },
		},
		{
			name: "discard",
			end: func(t *testing.T, s *Store) {
				d := mustOpen(t, s, "g")
				must(t, errors.Join(d.Discard(0, d.Size()), d.Close()))
			},
		},
	} {
		for _, disk := range []string{"limit", "disk"} {
			if disk == "disk" && testing.Short() && c.name != "volume" {
				continue
			}
			t.Run(c.name+"/"+disk, func(t *testing.T) {
				const room = 64 << 20
				o := Options{MaxBytes: room}
				var fs *crashfs.FS
				if disk == "disk" {
					fs = crashfs.New()
					fs.SetCapacity(wal.Spare + 2*room)
					o = Options{fs: fs, growTable: fs.Take}
				}
				if c.make == nil {
					c.make = func(t *testing.T, s *Store) *Device { return mustOpen(t, s, "g") }
				}
				s := largeChunks(t, o, func(s *Store) *Device { return c.make(t, s) })
				if c.then != nil {
					c.then(t, s)
				}
				if fs != nil {
					leaveFree(t, fs, wal.Spare+room/2)
				}
				h := mustOpen(t, s, "h")
				full, err := writeNew(t, h, 0, 2*room)
				if err == nil {
					t.Fatal("the store is not full")
				}
				c.end(t, s)
				start := time.Now()
				more, err := writeNew(t, h, full, 10<<20)
				if err != nil {
					t.Errorf("full after %d bytes; 16 MiB were deleted, and after %d more: %v; %+v", full, more, err, s.Info())
				}
				t.Logf("full after %d bytes; %d more took %v", full, more, time.Since(start).Round(time.Millisecond))
				mustEnd(t, s, h)
			})
		}
	}
}

// TestCleanerChoosesWhatFits: with room for less than the best chunk needs, another is cleaned, and none where none
// fits.
func TestCleanerChoosesWhatFits(t *testing.T) {
	s := &slotTable{cleanable: 100}
	for i, c := range []struct{ size, live uint32 }{{64 << 20, 30 << 20}, {64 << 20, 20 << 20}, {4 << 20, 3 << 20}, {4 << 20, 2 << 20}} {
		n := newChunk(uint32(i), uint64(i+1), nil)
		n.Size, n.End, n.live, n.Sealed = c.size, c.size, c.live, true
		s.put(n)
	}
	if n := s.mostLive(); n != 30<<20 {
		t.Errorf("the chunk that has most alive has %d bytes", n)
	}
	for _, want := range []struct {
		room int64
		slot int
	}{{64 << 20, 1}, {25 << 20, 1}, {15 << 20, 3}, {5 << 19, 3}, {1 << 20, -1}} {
		c, tooLarge := s.dirtiest(worthwhile, all, 5, want.room)
		if (c == nil) != (want.slot < 0) || c != nil && int(c.Slot) != want.slot || tooLarge != (c == nil) {
			t.Errorf("with room for %d bytes: %+v, %v", want.room, c, tooLarge)
		}
	}
	s.remove(0)
	s.remove(1)
	if n := s.mostLive(); n != 3<<20 {
		t.Errorf("of small chunks the one that has most alive has %d bytes", n)
	}
}

// TestCleanerWorksInLessThanAChunk: with less room than a new chunk takes, the cleaner begins with chunks that have
// little alive, and goes on with what these give back.
func TestCleanerWorksInLessThanAChunk(t *testing.T) {
	const size, piece, chunk = 24 << 20, 64 << 10, 4 << 20
	s, _ := newStore(t, Options{chunkBytes: chunk, checkpointInterval: -1, takeAll: true})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 * size})
	must(t, err)
	d := mustOpen(t, s, "v")
	p, r := make([]byte, piece), rand.New(rand.NewPCG(1, 4))
	for round := range 2 { // the second leaves a sixteenth
		for at := int64(0); at < size; at += piece {
			if round == 0 || at/piece%16 > 0 {
				noise(p, r)
				_, err := d.WriteAt(p, at)
				must(t, err)
			}
		}
	}
	must(t, errors.Join(s.Checkpoint(), s.Checkpoint()))
	for s.wal.Limit < s.used(true) { // a chunk that was being made when the limit was set is there now
		s.wal.Limit = s.used(true) + chunk/2
		if _, err := writeNew(t, d, size, size); err == nil {
			t.Fatal("there is no limit")
		}
		must(t, s.Checkpoint())
	}
	for n := 0; s.cleanFor(hungry, &throttle{s: s}); n++ {
		if n > 100 {
			t.Fatal("there is no end of cleaning")
		}
	}
	must(t, s.Checkpoint())
	in := s.Info()
	if dead := in.ChunkBytes - in.LiveBytes; dead > chunk {
		t.Errorf("the cleaner could not give back %d bytes that are dead: %+v", dead, in)
	}
	mustEnd(t, s, d)
}

// TestHungryCleanerTakesSmallChunksFirst: while writers wait, a chunk that gives something back soon is cleaned before
// a larger one that is older. Of the larger one, much is moved in one turn of the checkpoint lock.
func TestHungryCleanerTakesSmallChunksFirst(t *testing.T) {
	s := largeChunks(t, Options{checkpointInterval: -1}, func(s *Store) *Device { return mustOpen(t, s, "g") })
	g, h := mustOpen(t, s, "g"), mustOpen(t, s, "h")
	if took, err := writeNew(t, h, 0, 8<<20); err != nil {
		t.Fatalf("after %d bytes: %v", took, err)
	}
	for at := int64(0); at < 8<<20; at += 128 << 10 {
		must(t, h.Discard(at, 64<<10))
	}
	must(t, errors.Join(g.Discard(0, g.Size()), s.Checkpoint(), s.Checkpoint()))
	chosen := func() *chunk {
		c, err := s.victim(worthwhile, all)
		must(t, err)
		if c == nil {
			t.Fatal("there is nothing to clean")
		}
		c.Release()
		return c
	}
	if c := chosen(); c.End <= smallChunk {
		t.Errorf("the oldest chunk was not chosen, but one of %d bytes", c.End)
	}
	s.cleaner.writersWaiting = true
	if c := chosen(); c.End > smallChunk {
		t.Errorf("while writers wait a chunk of %d bytes was chosen", c.End)
	}
	s.cleaner.writersWaiting = false
	m := newMover(s)
	for _, want := range []struct {
		live uint32
		turn int
	}{{heldLarge, heldMost}, {heldLarge + 1, heldLarge}, {1, heldMost}} {
		c := chosen()
		was := c.live
		c.live = want.live
		must(t, m.begin(c))
		c.live = was
		if m.turn != want.turn {
			t.Errorf("of a chunk with %d bytes alive, %d are moved in a turn", want.live, m.turn)
		}
	}
	mustEnd(t, s, g, h)
}
