package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
	"github.com/vdisk/vdisk/metadata"
)

// noise fills p with content that no codec makes smaller.
func noise(p []byte, r *rand.Rand) { workload.Random(r, p) }

// limited returns a store of at most 128 MiB, with a filled volume that takes the fraction use of it.
func limited(t testing.TB, use float64) (s *Store, d *Device, blocks int64) {
	s, _ = newStore(t, Options{MaxBytes: 128 << 20, chunkBytes: 2 << 20})
	blocks = int64(use*(128<<20)) / (format.BlockSize + 32)
	_, err := s.CreateVolume("v", VolumeOptions{Size: blocks * format.BlockSize, Codec: format.S2})
	if err == nil {
		d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, format.BlockSize)
	r := rand.New(rand.NewPCG(1, 1))
	for b := range blocks {
		noise(p, r)
		if _, err := d.WriteAt(p, b*format.BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	return s, d, blocks
}

// TestOverwriteOfALimitedStore: overwriting goes on however full a store is, and the cleaner does not write too much
// for it. On an idle machine, at a use of 0.7, it all comes to 2.1 times what the user writes; it is more if the
// cleaner starts late.
func TestOverwriteOfALimitedStore(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of megabytes; the long run has it")
	}
	for _, c := range []struct {
		use, rounds, most float64
	}{{0.7, 3, 3}, {0.86, 1, 15}} {
		t.Run(fmt.Sprint(c.use), func(t *testing.T) {
			s, d, blocks := limited(t, c.use)
			r := rand.New(rand.NewPCG(2, 2))
			p := make([]byte, format.BlockSize)
			model := make([]uint64, blocks) // the seed of each block's content
			appended, cleaned := s.wal.Appended(), s.cleaner.moved
			for i := range int64(c.rounds * float64(blocks)) {
				b := r.Int64N(blocks)
				model[b] = uint64(i + 1)
				noise(p, rand.New(rand.NewPCG(model[b], 3)))
				if _, err := d.WriteAt(p, b*format.BlockSize); err != nil {
					t.Fatalf("write %d: %v", i, err)
				}
			}
			s.mu.Lock()
			appended, cleaned = s.wal.Appended()-appended, s.cleaner.moved-cleaned
			used := s.slots.files
			s.mu.Unlock()
			wa := float64(appended) / float64(appended-cleaned)
			t.Logf("write amplification %.2f, %d MiB used", wa, used>>20)
			if wa > c.most {
				t.Errorf("write amplification %.2f, want at most %.2f", wa, c.most)
			}
			if used > 128<<20 {
				t.Errorf("the chunks take %d bytes", used)
			}
			got := make([]byte, format.BlockSize)
			for b, seed := range model {
				if seed == 0 {
					continue
				}
				noise(p, rand.New(rand.NewPCG(seed, 3)))
				if _, err := d.ReadAt(got, int64(b)*format.BlockSize); err != nil || !bytes.Equal(got, p) {
					t.Fatalf("block %d: %v", b, err)
				}
			}
			mustEnd(t, s, d)
		})
	}
}

// TestMovedBlocksDieAfterReopen: a chunk that was cleaned in part has a row of its moved blocks beside its own row. If
// all of these blocks die at once, in a process that found the row in the table, the row is removed.
func TestMovedBlocksDieAfterReopen(t *testing.T) {
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s, dir := newStore(t, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := make([]byte, 4<<20)
	noise(p, rand.New(rand.NewPCG(1, 1)))
	_, err = d.WriteAt(p, 0)
	must(t, errors.Join(err, s.Snapshot(Ref{Volume: "v", Snapshot: "s"}), s.Checkpoint()))

	c, err := s.victim(0, all)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.cleaner.mu.Lock()
	s.cleaner.mover = newMover(s)
	s.cleaner.mover.most = 64 << 10
	_, err = s.cleanChunk(ctx, c, func(time.Duration) error { cancel(); return nil })
	s.cleaner.mu.Unlock()
	if !errors.Is(err, context.Canceled) || c.moved == 0 || c.live == 0 {
		t.Fatalf("%v; %d blocks moved, %d bytes are left", err, c.moved, c.live)
	}
	c.Release()
	must(t, errors.Join(d.Close(), s.Close()))

	o.reapBatch = 1 << 20
	s, err = Open(dir, o)
	must(t, err)
	must(t, s.Remove(Ref{Volume: "v"}, true))
	for range 4 {
		must(t, s.Checkpoint())
	}
	mustEnd(t, s)
}

// TestCleanEndsAtPartsOfRecords: the cleaner moves a record that a snapshot holds as a whole, including its dead
// blocks. The space of those is reclaimed with the rest of the record. If the cleaner moved records again because of
// them, it would never end.
func TestCleanEndsAtPartsOfRecords(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := make([]byte, 4<<20)
	workload.HalfCompressible(rand.New(rand.NewPCG(1, 1)), p)
	_, err = d.WriteAt(p, 0)
	must(t, err)
	for off := int64(0); off < 4<<20; off += hotUnit {
		_, err := d.WriteAt(p[off:off+format.BlockSize], off)
		must(t, err)
	}
	must(t, s.Snapshot(Ref{Volume: "v", Snapshot: "s"}))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := s.Clean(ctx, 0.05)
	must(t, err)
	if r.Chunks == 0 || r.Moved == 0 {
		t.Fatalf("nothing was cleaned: %+v", r)
	}
	if r, err = s.Clean(ctx, 0.05); err != nil || r.Moved > 0 {
		t.Errorf("cleaned again: %+v, %v", r, err)
	}
	mustCheck(t, s)
	must(t, s.Remove(Ref{Volume: "v", Snapshot: "s"}, false)) // rewritten for the head, without the dead blocks
	if r, err = s.Clean(ctx, 0.05); err != nil || r.Moved == 0 {
		t.Errorf("not cleaned: %+v, %v", r, err)
	}
	rep := mustCheck(t, s)
	t.Logf("%+v", rep)
	must(t, errors.Join(d.Close(), s.Close()))
}

// TestNothingIsMovedAfterAFailedCommit: what the reaper did for a checkpoint that did not commit is neither in the
// table nor in the log. So no record may rely on it: a replay would find other live blocks than a moved record says.
func TestNothingIsMovedAfterAFailedCommit(t *testing.T) {
	for _, again := range []bool{false, true} {
		t.Run(fmt.Sprint(again), func(t *testing.T) {
			w := newModelStore(t)
			w.s.wal.ChunkBytes = 160 << 10
			w.volume(t, "v", 2<<20, format.S2)
			w.write(t, "v", 0, hotUnit, 0)
			w.takeSnapshot(t, "a")
			w.write(t, "v", 0, format.BlockSize, 0)
			w.takeSnapshot(t, "b")
			c := w.fillChunk(t)
			if again {
				must(t, w.cleanChunk(c))
				c = w.fillChunk(t)
			}
			w.m.remove(Ref{"v", "a"})
			must(t, w.event(w.s.Remove(Ref{"v", "a"}, false)))
			w.must(t, op{kind: "checkpoint"}) // from here on the snapshot can be reaped

			undo := limitFileSize(t, 8<<10) // room for the table's meta pages only
			if err := w.s.Checkpoint(); !errors.Is(err, syscall.EFBIG) {
				t.Fatalf("checkpoint: %v", err)
			}
			err := w.cleanChunk(c)
			undo()
			if err != nil && !errors.Is(err, syscall.EFBIG) {
				t.Fatal(err)
			}
			w.must(t, op{kind: "flush"})
			must(t, w.harness.verify(w.now("killed", w.injector.fs.Clone()), 3, rand.New(rand.NewPCG(1, 1))))
			w.must(t, op{kind: "reap"})
			w.mustBe(t)
			must(t, w.close())
		})
	}
}

// cleanChunk moves the live data of a chunk, and counts the records that it wrote.
func (w *modelStore) cleanChunk(c *chunk) error {
	w.s.cleaner.mu.Lock()
	defer w.s.cleaner.mu.Unlock()
	_, err := w.s.cleanChunk(context.Background(), c, nil)
	w.catchUp()
	return err
}

// current returns the chunk that takes the records.
func (s *Store) current() *chunk { return s.slots.get(s.wal.Current().Slot) }

// fillChunk writes until the log goes on in another chunk, and returns the full one.
func (w *modelStore) fillChunk(t *testing.T) *chunk {
	t.Helper()
	c := w.s.current()
	for w.s.current() == c {
		w.write(t, "v", 1<<20, 64<<10, 1)
	}
	w.must(t, op{kind: "checkpoint"})
	return c
}

// TestCleanEndsAtWhatNobodyOwns: a damaged table can give a chunk live bytes that no leaf accounts for. Cleaning ends
// there too, and cleans the other chunks.
func TestCleanEndsAtWhatNobodyOwns(t *testing.T) {
	s, d := halfDead(t, nil)
	s.mu.Lock()
	c := s.slots.all()[0]
	c.live += 4096
	s.slots.recount(c)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := s.Clean(ctx, 0.25)
	if err != nil || r.Chunks < 3 || c.live != 4096 {
		t.Errorf("%+v, %v; %d bytes live", r, err, c.live)
	}
	for _, c := range s.slots.all()[1:] {
		if c.Sealed && c.End-c.live > c.End/2 {
			t.Errorf("%d of %d bytes live in chunk %s", c.live, c.End, c.Name())
		}
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// TestCleanPassesOverWhatCannotBeRead: a chunk that cannot be read stays as it is, and the others are cleaned.
func TestCleanPassesOverWhatCannotBeRead(t *testing.T) {
	var bad atomic.Bool
	s, d := halfDead(t, func(name string) error {
		if bad.Load() && name == wal.ChunkName(0) {
			return syscall.EIO
		}
		return nil
	})
	must(t, s.Checkpoint())
	bad.Store(true)
	r, err := s.Clean(context.Background(), 0.25)
	must(t, err)
	if r.Chunks < 3 || !s.slots.get(0).damaged {
		t.Errorf("%+v", r)
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// halfDead returns a store with some chunks that are half dead.
func halfDead(t *testing.T, onRead func(name string) error) (*Store, *Device) {
	t.Helper()
	dir := setup(t, 4<<20, format.Raw)
	fs := newHook(t, dir)
	fs.onRead = onRead
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1, chunkBytes: 1 << 20})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := randomBytes(4<<20, 1)
	_, err = d.WriteAt(p, 0)
	must(t, err)
	for off := int64(0); off < 4<<20; off += 2 * format.BlockSize {
		must(t, d.Discard(off, format.BlockSize))
	}
	return s, d
}

// TestCleanEndsBesideWriters: a Clean ignores the dead data that others leave while it runs, since otherwise it would
// never end.
func TestCleanEndsBesideWriters(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 256 << 10})
	const blocks = 2048
	_, err := s.CreateVolume("v", VolumeOptions{Size: blocks * format.BlockSize, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(blocks*format.BlockSize, 1), 0)
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		r, p := rand.New(rand.NewPCG(1, 1)), make([]byte, format.BlockSize)
		for !stop.Load() {
			noise(p, r)
			if _, err := d.WriteAt(p, r.Int64N(blocks)*format.BlockSize); err != nil {
				t.Error(err)
				return
			}
		}
	})
	r, err := s.Clean(ctx, 0.05)
	t.Logf("%+v", r)
	stop.Store(true)
	wg.Wait()
	must(t, err)
	must(t, errors.Join(d.Close(), s.Close()))
}

// TestNameOfAnotherLife: while the cleaner works on a record, the record's chunk may be removed, and its slot reused.
// The new chunk may have a record of the same block at the same place, so that the leaf refers to it with an equal
// entry. The old content must not come back.
func TestNameOfAnotherLife(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func(n byte) {
		_, err := d.WriteAt(bytes.Repeat([]byte{n}, format.BlockSize), 0)
		must(t, err)
	}
	entry := func() (e format.Entry) {
		must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { e = lf.Entry(0) }))
		return e
	}
	for entry().Offset() != format.ChunkHeaderSize { // events are in the first chunk
		write(1)
	}
	name := entry()
	m := newMover(s)
	old := s.slots.get(name.Slot())
	must(t, m.begin(old))
	must(t, s.Checkpoint())
	h, payload, err := m.r.Any()
	must(t, err)
	r, err := m.decode(h, payload, format.ChunkHeaderSize)
	must(t, err)
	m.look()
	if ok, err := m.find(&r); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for n := 0; entry() != name || s.slots.get(name.Slot()) == old; n++ {
		if n == 4000 {
			t.Fatal("the slot did not come again")
		}
		write(2)
		if n%100 == 0 {
			must(t, s.Checkpoint())
		}
	}
	if _, err := m.rewrite(&r, 1); !errors.Is(err, errChanged) {
		t.Error(err)
	}
	got := make([]byte, format.BlockSize)
	_, err = d.ReadAt(got, 0)
	must(t, err)
	if got[0] != 2 {
		t.Errorf("the block has %d again", got[0])
	}
	mustEnd(t, s, d)
}

// TestHandedToTheHead: a checkpoint hands a record that a point held to the head, while the cleaner is about to move
// it. The cleaner does not forward a record of a head, which may change, but writes it again. Nothing is left in the
// chunk.
func TestHandedToTheHead(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := make([]byte, hotUnit)
	workload.HalfCompressible(rand.New(rand.NewPCG(1, 1)), p)
	_, err = d.WriteAt(p, 0)
	must(t, errors.Join(err, s.Snapshot(Ref{Volume: "v", Snapshot: "s"})))
	c := s.current()
	for off := int64(1 << 20); s.current() == c; off += 64 << 10 {
		_, err := d.WriteAt(randomBytes(64<<10, uint64(off)), off)
		must(t, err)
	}
	must(t, errors.Join(s.Checkpoint(), s.Remove(Ref{Volume: "v", Snapshot: "s"}, false), s.Checkpoint())) // the next checkpoint reaps it

	m, r := firstData(t, s, c)
	if n, rest, err := m.moveOwn(&r); n != 0 || !rest || err != nil {
		t.Fatal(n, rest, err)
	}
	must(t, s.Checkpoint())
	if n, err := m.moveHeld(&r); n != 0 || !errors.Is(err, errChanged) {
		t.Errorf("moved %d bytes of a head: %v", n, err)
	}
	s.cleaner.mu.Lock()
	_, err = s.cleanChunk(context.Background(), c, nil)
	s.cleaner.mu.Unlock()
	must(t, err)
	if c.live > 0 || c.moved > 0 {
		t.Errorf("%d bytes live in the chunk, and %d blocks of it elsewhere", c.live, c.moved)
	}
	mustEnd(t, s, d)
}

// TestCleanOfAFutureEpoch: a damaged table may have a version of an epoch that its branch has not reached. The cleaner
// reports it, and ends.
func TestCleanOfAFutureEpoch(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, errors.Join(err, s.Snapshot(Ref{Volume: "v", Snapshot: "s"})))
	c := s.current()
	for off := int64(0); s.current() == c; off += 64 << 10 {
		_, err := d.WriteAt(randomBytes(64<<10, uint64(off)), off)
		must(t, err)
	}
	must(t, s.Checkpoint())
	d.b.Epoch--
	s.cleaner.mu.Lock()
	moved, err := s.cleanChunk(context.Background(), c, nil)
	s.cleaner.mu.Unlock()
	if moved > 0 || err != nil || !c.damaged {
		t.Errorf("moved %d bytes, %v; damaged: %v", moved, err, c.damaged)
	}
	d.b.Epoch++
	mustEnd(t, s, d)
}

// hooked opens a store of small chunks that does nothing in the background, with a volume v of 8 MiB.
func hooked(t *testing.T) (*Store, *Device, *hookFS) {
	t.Helper()
	dir := setup(t, 8<<20, format.S2)
	fs := newHook(t, dir)
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1, chunkBytes: 1 << 20})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	return s, d, fs
}

// TestCloseWaitsForClean: after Close, no chunk is made for the cleaner.
func TestCloseWaitsForClean(t *testing.T) {
	s, d, fs := hooked(t)
	_, err := d.WriteAt(randomBytes(4<<20, 1), 0)
	must(t, errors.Join(err, d.Discard(0, 1<<19), s.Checkpoint(), d.Close()))
	reads, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fs.onRead = func(string) error {
		once.Do(func() { close(reads); <-gate })
		return nil
	}
	cleaned, closed := make(chan error, 1), make(chan error, 1)
	go func() { _, err := s.Clean(context.Background(), worthwhile); cleaned <- err }()
	<-reads
	go func() { closed <- s.Close() }()
	<-s.quit
	select {
	case err := <-closed:
		t.Fatal("Close did not wait:", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(gate)
	if err := <-cleaned; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	must(t, <-closed)
}

// TestHelpless: a cleaner that can give nothing back tells the writers that wait for room. It does not do so if one of
// them was given a chunk meanwhile, since it has not seen what that one has overwritten.
func TestHelpless(t *testing.T) {
	s, d, fs := hooked(t)
	for _, others := range []bool{true, false} {
		_, err := d.WriteAt(randomBytes(64<<10, 1), 0)
		must(t, err)
		fs.onWrite = func(string, int) { // called by the checkpoint of a cleaner that found nothing
			s.mu.Lock()
			defer s.mu.Unlock()
			if others {
				logSpace{s}.Rotated(wal.ForData)
			}
		}
		s.cleanFor(hungry, &throttle{s: s})
		if s.cleaner.exhausted == others {
			t.Errorf("cleanerExhausted: %v, while others were given a chunk: %v", s.cleaner.exhausted, others)
		}
	}
	mustEnd(t, s, d)
}

// TestOverwriteBesideACopy overwrites a block after the cleaner has decided to copy it, and before the copy takes its
// place: the copy is refused, and the newer content stays. So is the copy of a block that was discarded.
func TestOverwriteBesideACopy(t *testing.T) {
	for _, how := range []string{"overwritten", "discarded", "untouched"} {
		s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
		_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.Raw})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		want := randomBytes(4096, 1)
		_, err = d.WriteAt(want, 0)
		must(t, err)
		c := s.current()
		for off := int64(1 << 20); s.current() == c; off += 64 << 10 {
			_, err := d.WriteAt(randomBytes(64<<10, uint64(off)), off)
			must(t, err)
		}
		must(t, s.Checkpoint())
		m, r := firstData(t, s, c)
		if ok, err := m.find(&r); !ok || err != nil || r.h.Block != 0 {
			t.Fatal(ok, err, r.h)
		}
		mask, _, err := m.headMask(r.h, r.name)
		if err != nil || mask != 1 {
			t.Fatal(mask, err)
		}
		refused := errChanged
		switch how {
		case "overwritten":
			want = randomBytes(4096, 2)
			_, err = d.WriteAt(want, 0)
		case "discarded":
			want = make([]byte, 4096)
			err = d.Discard(0, 4096)
		default:
			refused = nil
		}
		must(t, err)
		if _, err := m.rewrite(&r, mask); !errors.Is(err, refused) {
			t.Errorf("%s: %v", how, err)
		}
		if !holdsAt(t, s, "v", 0, want) {
			t.Errorf("%s: the block has other content", how)
		}
		mustEnd(t, s, d)
	}
}

// firstData returns a mover that has come to the first data record of a chunk, and the record.
func firstData(t *testing.T, s *Store, c *chunk) (m *mover, r record) {
	t.Helper()
	m = newMover(s)
	must(t, m.begin(c))
	m.look()
	for r.h == nil || r.h.Kind != format.KindData {
		off := m.r.Off
		h, payload, err := m.r.Any()
		must(t, err)
		r, err = m.decode(h, payload, off)
		must(t, err)
	}
	return m, r
}

// TestChunkThatDamageNeeds: the row of the table that says where a region's records were moved to is damaged or missing.
// Then the old chunk is not removed when nothing in it is alive any more, since it still has the records. It goes when the
// row is right again.
func TestChunkThatDamageNeeds(t *testing.T) {
	for _, damage := range []string{"damaged", "missing", "short"} {
		t.Run(damage, func(t *testing.T) {
			o := Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)}
			s, dir := newStore(t, o)
			c, held, d := movedInPart(t, s)
			slot := c.Slot
			var r metadata.Region
			var list []format.Forward
			must(t, s.meta.View(func(tx *metadata.Tx) error {
				return tx.RegionsOf(slot, func(at metadata.Region, fs []format.Forward, bad error) error {
					r, list = at, fs
					return bad
				})
			}))
			right := format.AppendForwards(nil, list)
			put := func(value []byte) {
				t.Helper()
				must(t, s.meta.Update(func(tx *metadata.Tx) error {
					if value == nil {
						return tx.DropForwards(r)
					}
					return tx.PutForwards(r, value)
				}))
				s.forwards.mu.Lock()
				clear(s.forwards.regions)
				s.forwards.mu.Unlock()
			}
			put(map[string][]byte{"damaged": append([]byte{1}, right...), "missing": nil, "short": format.AppendForwards(nil, list[1:])}[damage])
			must(t, errors.Join(d.Discard(1<<20, 2<<20), s.Checkpoint(), s.Checkpoint()))
			if c.live > 0 || c.dead || isMissing(t, filepath.Join(dir, chunksDir, c.Name())) {
				t.Fatalf("%d bytes are alive, dead: %t; the chunk's file is needed", c.live, c.dead)
			}
			sn, err := s.OpenDevice(Ref{"v", "s"}, true)
			must(t, err)
			got := make([]byte, len(held))
			if _, err := sn.ReadAt(got, 0); err != nil || !bytes.Equal(got, held) {
				t.Errorf("the snapshot's data: %v", err)
			}
			put(right)
			must(t, errors.Join(sn.Close(), d.Close(), s.Close()))

			s = open(t, dir, o)
			must(t, errors.Join(s.Checkpoint(), s.Checkpoint()))
			if c := s.slots.get(slot); c == nil || !c.gone {
				t.Error("the chunk is still there")
			}
			mustEnd(t, s)
		})
	}
}

// movedInPart makes a store of a volume with a snapshot, and moves all that the snapshot holds out of the first chunk. Data
// of the head at 1 MiB keeps the chunk.
func movedInPart(t *testing.T, s *Store) (c *chunk, held []byte, d *Device) {
	t.Helper()
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, err)
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	held = randomBytes(256<<10, 1)
	_, err = d.WriteAt(held, 0)
	must(t, errors.Join(err, s.Snapshot(Ref{"v", "s"})))
	_, err = d.WriteAt(randomBytes(2<<20, 2), 1<<20)
	must(t, errors.Join(err, s.Checkpoint()))
	var e format.Entry
	must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { e = lf.Entry(0) }))
	c = s.slots.get(e.Slot())
	c.Acquire()
	defer c.Release()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.cleaner.mu.Lock()
	s.cleaner.mover = newMover(s)
	s.cleaner.mover.most = 64 << 10
	_, err = s.cleanChunk(ctx, c, func(time.Duration) error {
		if int(c.moved) >= len(held)/format.BlockSize {
			cancel()
		}
		return nil
	})
	s.cleaner.mu.Unlock()
	must(t, s.Checkpoint())
	if !errors.Is(err, context.Canceled) || int(c.moved) != len(held)/format.BlockSize || c.live == 0 {
		t.Fatalf("%v; %d blocks moved, %d bytes are left", err, c.moved, c.live)
	}
	return c, held, d
}
