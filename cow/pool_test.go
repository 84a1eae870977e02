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
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// heldRead is a read that was planned and is not fetched yet.
type heldRead struct {
	pl        ReadPlan
	got, want []byte
	reused    int // files at that time
}

// hold plans a read, or fetches the one that was planned, whatever has happened since.
func (w *modelStore) hold(o op, name string, size int64) error {
	if w.held != nil {
		return w.letGo()
	}
	d, err := w.device(name)
	if err != nil {
		return err
	}
	off := int64(mix(o.b)) % size
	n := min(size-off, 64<<10)
	h := &heldRead{got: make([]byte, n), want: make([]byte, n), reused: w.reused()}
	if _, err := d.ReadAt(h.want, off); err != nil {
		return err
	}
	w.held = h
	return d.PlanRead(&h.pl, h.got, off)
}

// churn overwrites one range until chunks are dead and their files chunks again, while a read is held.
func (w *modelStore) churn(o op, name string, size int64) error {
	if w.held == nil {
		if err := w.hold(o, name, size); err != nil {
			return err
		}
	}
	off := int64(mix(o.b)) % size
	for range 3 {
		if err := w.put(name, off, min(size-off, 200<<10)); err != nil {
			return err
		}
		if err := w.event(w.s.Checkpoint()); err != nil {
			return err
		}
	}
	if o.c%2 == 0 {
		return w.letGo()
	}
	return nil
}

// letGo ends the read that is held.
func (w *modelStore) letGo() error {
	h := w.held
	w.held = nil
	if h == nil {
		return nil
	}
	if len(h.pl.fetches) > 0 {
		w.harness.held.Add(int64(w.reused() - h.reused))
	}
	if err := h.pl.Fetch(); err != nil {
		return fmt.Errorf("a read that was planned a while ago: %w", err)
	}
	if !bytes.Equal(h.got, h.want) {
		return errors.New("a read that was planned a while ago found something else")
	}
	return nil
}

func (w *modelStore) reused() int {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.s.wal.Pool.Reused()
}

// overOld counts the chunks of the log, after a replay that dropped nothing, with something else behind their records.
func overOld(s *Store) (n int64) {
	if s.recovery.DroppedBytes > 0 {
		return 0
	}
	for _, c := range s.slots.all() {
		if c.inTable || c.gone {
			continue
		}
		if sum, err := c.Summary(); sum != nil || err != nil {
			continue
		}
		p := make([]byte, 2*4096)
		f, err := c.Handle()
		if err != nil {
			continue
		}
		if k, err := wal.ReadFull(f, p, int64(c.End)); err == nil && !format.IsZero(p[:k]) {
			n++
		}
	}
	return n
}

// pooled is the slots of the spares.
func (s *Store) pooled() []uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wal.Pool.Spares()
}

// overwrite writes so many chunks' worth of the same range, which kills all chunks but the last.
func (w *modelStore) overwrite(t *testing.T, chunks int) {
	t.Helper()
	for i := range chunks * 8 {
		must(t, w.put("v", int64(i%8)<<16, 64<<10))
	}
}

func newPoolStore(t *testing.T) *modelStore {
	w := newModelStore(t)
	w.s.wal.ChunkBytes = 512 << 10
	w.m.create("v", 4<<20, format.Raw)
	_, err := w.s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, w.event(err))
	return w
}

// Files of dead chunks become chunks again; not more are kept than may be, and none after gc or Close.
func TestPool(t *testing.T) {
	w := newPoolStore(t)
	fs := w.injector.fs
	w.overwrite(t, 8)
	w.must(t, op{kind: "checkpoint"})
	if n := len(w.s.pooled()); n != wal.PoolSize {
		t.Fatalf("%d files are kept", n)
	}
	if in := w.s.Info(); in.SpareBytes != wal.PoolSize*512<<10 || in.Chunks > 3 {
		t.Errorf("%+v", in)
	}
	made := fs.Count(crashfs.OpCreate)
	w.overwrite(t, 3)
	if n := fs.Count(crashfs.OpCreate); n != made || w.reused() < 3 {
		t.Errorf("%d files were made, %d recycled", n-made, w.reused())
	}
	w.mustBe(t)
	_, err := w.s.Clean(context.Background(), 0.5)
	must(t, err)
	w.s.wal.WaitIdle()
	names := chunkFiles(t, fs)
	if in := w.s.Info(); in.SpareBytes != 0 || len(names) != in.Chunks {
		t.Errorf("after gc: %+v, %v", in, names)
	}
	w.overwrite(t, 3)
	w.must(t, op{kind: "checkpoint"})
	if len(w.s.pooled()) == 0 {
		t.Error("nothing is kept")
	}
	w.s.mu.Lock()
	w.s.wal.Pool.Age(wal.PoolIdle + time.Second)
	w.s.mu.Unlock()
	must(t, w.s.wal.Pool.EmptyIdle())
	if n := len(w.s.pooled()); n != 0 {
		t.Errorf("%d files are kept for no use", n)
	}
	w.overwrite(t, 3)
	must(t, w.close())
	names = chunkFiles(t, fs)
	if len(names) > 2 {
		t.Errorf("after Close: %v", names)
	}
}

// A file is not recycled while somebody may read what it held.
func TestPoolWaitsForReaders(t *testing.T) {
	w := newPoolStore(t)
	w.overwrite(t, 1)
	w.must(t, op{kind: "flush"})
	must(t, w.hold(op{}, "v", 4<<20))
	if len(w.held.pl.fetches) == 0 {
		t.Fatal("nothing is to be read from a file")
	}
	c := w.held.pl.records[0].c
	for range 4 {
		w.overwrite(t, 4)
		w.must(t, op{kind: "checkpoint"})
	}
	if w.reused() == 0 || !c.dead || w.s.slots.get(c.Slot) != c {
		t.Errorf("%d files were recycled; that of the chunk that is read: %v", w.reused(), w.s.slots.get(c.Slot) != c)
	}
	must(t, w.letGo())
	for range 4 {
		w.overwrite(t, 4)
		w.must(t, op{kind: "checkpoint"})
	}
	if w.s.slots.get(c.Slot) == c {
		t.Error("the file was not recycled after it was read")
	}
	must(t, w.close())
}

// Where room is short the pool is deleted, and never stands in the way of a chunk.
func TestPoolGoesFirst(t *testing.T) {
	w := newPoolStore(t)
	w.overwrite(t, 8)
	w.must(t, op{kind: "checkpoint"})
	if n := len(w.s.pooled()); n != wal.PoolSize {
		t.Fatalf("%d files are kept", n)
	}
	names := chunkFiles(t, w.injector.fs)
	w.injector.fs.SetCapacity(wal.Spare + int64(len(names))<<19) // all of what data leaves free is taken by the pool
	w.overwrite(t, 3)
	if free, _ := w.injector.fs.Free(); free+w.s.kept() < wal.Spare+512<<10 {
		t.Errorf("%d bytes are free", free)
	}
	w.mustBe(t)
	must(t, w.close())
}

// The pool makes room for the table, too.
func TestPoolGoesWhereTheTableHasNoRoom(t *testing.T) {
	w := newPoolStore(t)
	w.overwrite(t, 8)
	w.must(t, op{kind: "checkpoint"})
	if len(w.s.pooled()) == 0 {
		t.Fatal("nothing is kept")
	}
	w.overwrite(t, 1)
	undo := limitFileSize(t, 8<<10) // the table's meta pages
	err := w.s.Checkpoint()
	undo()
	if !errors.Is(err, syscall.EFBIG) || len(w.s.pooled()) > 0 {
		t.Errorf("%v; %d files are kept", err, len(w.s.pooled()))
	}
	w.mustBe(t)
	must(t, w.close())
}

// Behind the end of the log lies whatever the file was before: even a record with the very next number is not the log's
// if it was the former life's.
func TestFormerLifeIsNotReplayed(t *testing.T) {
	w := newPoolStore(t)
	w.overwrite(t, 8)
	w.must(t, op{kind: "checkpoint"})
	formerly := map[uint32]uint64{} // sequence numbers, by slot
	for _, slot := range w.s.pooled() {
		formerly[slot] = w.s.slots.get(slot).Seq
	}
	for w.s.wal.Current() == nil || formerly[w.s.wal.Current().Slot] == 0 {
		must(t, w.put("v", 0, 16<<10))
	}
	must(t, w.put("v", 0, 16<<10))
	w.must(t, op{kind: "flush"})
	c := w.s.wal.Current()
	payload := bytes.Repeat([]byte("formerly"), 512)
	for _, seq := range []uint64{formerly[c.Slot], c.Seq} {
		h := format.RecordHeader{
			Seq: w.seq(), Branch: w.s.catalog.byName["v"].Branch, Kind: format.KindData, Blocks: 1,
			PayloadLen: len(payload), PayloadCRC: format.Checksum(payload),
		}
		rec := make([]byte, h.Size())
		h.Encode(rec, seq, c.End)
		copy(rec[format.RecordHeaderSize:], payload)
		img := w.now("killed", w.injector.fs.Clone())
		f, err := img.fs.Open(c.Name())
		must(t, err)
		_, err = f.WriteAt(rec, int64(c.End))
		must(t, errors.Join(err, f.Close()))
		if seq == c.Seq {
			img.m = w.m.fork() // the test is right: of this life it would be a write
			img.m.write("v", payload, 0)
		}
		next, err := w.harness.open(img, never, rand.New(rand.NewPCG(1, 1)))
		must(t, err)
		if seq == c.Seq && next.seq() != w.seq()+1 {
			t.Error("a record of the present life was not replayed")
		}
		next.mustBe(t)
		must(t, next.kill())
	}
	must(t, w.close())
}

// A chunk that could not be made is gone for good when a younger one has records: a replay would end at it.
func TestFailedChunkDoesNotComeBack(t *testing.T) {
	w := newPoolStore(t)
	w.overwrite(t, 8)
	w.must(t, op{kind: "checkpoint"})
	for w.s.wal.Next() != nil { // the next chunk is made by the test
		w.s.mu.Lock()
		w.s.wal.NextByHand()
		w.s.mu.Unlock()
		must(t, w.put("v", 0, 16<<10))
	}
	w.injector.fs.FailAt(crashfs.OpSync, 1, syscall.EIO)
	w.s.wal.MakeNext()
	if w.s.wal.Next() != nil || w.s.wal.Err() != nil || w.reused() == 0 {
		t.Fatalf("the header's sync did not fail, or the log did (%v)", w.s.wal.Err())
	}
	reused := w.reused()
	w.overwrite(t, 1)
	w.must(t, op{kind: "flush"})
	if w.reused() == reused {
		t.Fatal("no file was recycled then")
	}
	for _, choice := range w.injector.fs.Choices(1, 8) {
		img := w.now(choice.String(), w.injector.fs.Crash(choice))
		must(t, w.harness.verify(img, 3, rand.New(rand.NewPCG(1, 1))))
	}
	must(t, w.close())
}

// inNewFiles is a disk that does not write over what a file holds.
type inNewFiles struct{ storage.FS }

func (inNewFiles) Overwrites() bool { return false }

// A read that was planned finds the chunk's file also where that is opened for the first time after it was removed.
func TestFirstReadOfARemovedFile(t *testing.T) {
	dir := setup(t, 4<<20, format.Raw)
	o := Options{checkpointInterval: -1}
	s := open(t, dir, o)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(format.BlockSize, 1), 0)
	must(t, errors.Join(err, d.Close(), s.Close()))

	fs, err := storage.OpenDir(filepath.Join(dir, chunksDir))
	must(t, err)
	o.fs = inNewFiles{fs}
	s = open(t, dir, o)
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	pl, got := &ReadPlan{}, make([]byte, format.BlockSize)
	pl.begin(d)
	var bad error
	err = s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { bad = pl.plan(lf, got, 0) })
	must(t, errors.Join(err, bad))
	must(t, d.Discard(0, format.BlockSize)) // what others do meanwhile
	must(t, errors.Join(s.Checkpoint(), s.Checkpoint()))
	if _, err := os.Stat(filepath.Join(dir, chunksDir, pl.records[0].c.Name())); !os.IsNotExist(err) {
		t.Fatalf("the file is there: %v", err)
	}
	if err := errors.Join(pl.locate(), pl.Fetch()); err != nil {
		t.Error(err)
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// chunkFiles lists the files of chunks.
func chunkFiles(t testing.TB, fs storage.FS) (names []string) {
	t.Helper()
	all, err := fs.List()
	must(t, err)
	for _, name := range all {
		if _, ok := wal.ParseChunkName(name); ok {
			names = append(names, name)
		}
	}
	return names
}

// undeletable is a disk on which no file of a chunk can be removed.
type undeletable struct{ storage.FS }

func (undeletable) Overwrites() bool    { return false }
func (undeletable) Remove(string) error { return syscall.EPERM }

// The cleaner may meet damage in a chunk that has died, while a checkpoint decides whether the pool may have its file.
func TestDamageInADeadChunk(t *testing.T) {
	if !raceEnabled {
		t.Skip("only the race detector can see it")
	}
	fs := undeletable{crashfs.New()}
	s, _ := newStore(t, Options{fs: fs, checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 4 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(3) {
		_, err = d.WriteAt(randomBytes(1<<20, uint64(i)), i<<20)
		must(t, err)
	}
	must(t, d.Discard(0, 4<<20))
	if err := s.Checkpoint(); !errors.Is(err, syscall.EPERM) {
		t.Fatalf("no chunk has died: %v", err)
	}
	c := s.checkpoints.pendingRemoval[0]
	m := newMover(s)
	must(t, m.begin(c))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, _, _ = m.stopped(0, 0, ErrCorrupt)
			}
		}
	})
	for range 1000 {
		s.checkpoints.mu.Lock()
		if err := s.removeDead(nil); !errors.Is(err, syscall.EPERM) {
			t.Errorf("removed: %v", err)
		}
		s.checkpoints.mu.Unlock()
	}
	close(stop)
	wg.Wait()
	must(t, d.Close())
	_ = s.Close() // the files cannot be removed
}
