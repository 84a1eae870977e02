package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

type hookFS struct {
	storage.FS
	onCreate   func(name string) error
	onOpen     func(name string) error
	onWrite    func(name string, n int)
	onRead     func(name string) error
	onReadDisk func(name string) error
	onSync     func(name string)
	badAt      func(name string, off int64, n int) error // of a part of a file that is read; nil: all can be read
	onFree     func() (int64, bool)
}

func (h *hookFS) Create(name string, size int64) (storage.File, error) {
	if h.onCreate != nil && name != wal.ReserveName && name != wal.MarkName {
		if err := h.onCreate(name); err != nil {
			return nil, err
		}
	}
	f, err := h.FS.Create(name, size)
	if err != nil {
		return nil, err
	}
	return &hookFile{f, h, name}, nil
}

func (h *hookFS) Open(name string) (storage.File, error) {
	if h.onOpen != nil && name != wal.MarkName {
		if err := h.onOpen(name); err != nil {
			return nil, err
		}
	}
	f, err := h.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return &hookFile{f, h, name}, nil
}

func (h *hookFS) Free() (int64, error) {
	if h.onFree != nil {
		if n, ok := h.onFree(); ok {
			return n, nil
		}
	}
	return h.FS.Free()
}

type hookFile struct {
	storage.File
	h    *hookFS
	name string
}

func (f *hookFile) ReadAt(p []byte, off int64) (int, error) {
	if f.h.onRead != nil {
		if err := f.h.onRead(f.name); err != nil {
			return 0, err
		}
	}
	if f.h.badAt != nil {
		if err := f.h.badAt(f.name, off, len(p)); err != nil {
			return 0, err
		}
	}
	return f.File.ReadAt(p, off)
}

func (f *hookFile) ReadDisk(p []byte, off int64) (int, error) {
	if f.h.onReadDisk != nil {
		if err := f.h.onReadDisk(f.name); err != nil {
			return 0, err
		}
	}
	if f.h.badAt != nil {
		if err := f.h.badAt(f.name, off, len(p)); err != nil {
			return 0, err
		}
	}
	return f.File.ReadDisk(p, off)
}

func (f *hookFile) TryReadAt(p []byte, off int64) bool {
	return f.h.onRead == nil && f.h.badAt == nil && f.File.TryReadAt(p, off)
}

func (f *hookFile) WriteAt(p []byte, off int64) (int, error) {
	if f.h.onWrite != nil {
		f.h.onWrite(f.name, len(p))
	}
	return f.File.WriteAt(p, off)
}

func (f *hookFile) Sync() error {
	if f.h.onSync != nil {
		f.h.onSync(f.name)
	}
	return f.File.Sync()
}

func newHook(t *testing.T, dir string) *hookFS {
	t.Helper()
	f, err := storage.OpenDir(filepath.Join(dir, chunksDir))
	if err != nil {
		t.Fatal(err)
	}
	return &hookFS{FS: f}
}

func killStore(s *Store) {
	close(s.quit)
	s.wg.Wait()
	s.wal.Stop()
	s.release()
}

func open(t *testing.T, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func appended(s *Store) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wal.Appended()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func randomBytes(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, n)
	noise(p, r)
	return p
}

// setup: store with a volume v, cleanly closed.
func setup(t *testing.T, size int64, c format.Codec) string {
	t.Helper()
	s, dir := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: c})
	must(t, err)
	must(t, s.Close())
	return dir
}

// A checkpoint while the first chunk is made puts the replay position behind that chunk.
func TestCheckpointWhileFirstChunkIsMade(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	fs := newHook(t, dir)
	entered, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fs.onCreate = func(string) error { once.Do(func() { close(entered); <-gate }); return nil }
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	data := randomBytes(64<<10, 1)
	done := make(chan error)
	go func() { _, err := d.WriteAt(data, 0); done <- err }()
	<-entered
	must(t, s.Checkpoint())
	close(gate)
	must(t, <-done)
	must(t, d.Flush()) // acknowledged as durable
	killStore(s)
	s = open(t, dir, Options{checkpointInterval: -1})
	t.Logf("recovery: %+v", s.Recovery())
	d, _ = s.OpenDevice(Ref{Volume: "v"}, false)
	got := make([]byte, len(data))
	_, err = d.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, data) {
		t.Errorf("flushed data is lost; zero=%v", format.IsZero(got))
	}
}

// Writes that come while a checkpoint syncs the log are not part of it: a replay begins before them.
func TestWriteWhileACheckpointSyncs(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	fs := newHook(t, dir)
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4096, 1), 0)
	must(t, err)
	want := [][]byte{randomBytes(4096, 2), randomBytes(4096, 3)}
	fs.onSync = func(string) {
		fs.onSync = nil
		for i, p := range want {
			_, err := d.WriteAt(p, int64(i)<<20)
			must(t, err)
		}
	}
	must(t, s.Checkpoint())
	if fs.onSync != nil {
		t.Fatal("the checkpoint did not sync the log")
	}
	must(t, d.Flush())
	killStore(s)
	s = open(t, dir, Options{checkpointInterval: -1})
	for i := range want {
		if !holdsAt(t, s, "v", int64(i)<<20, want[i]) {
			t.Errorf("write %d is gone: %+v", i, s.Recovery())
		}
	}
	if n := s.Recovery().Records; n != 2 {
		t.Errorf("%d records were replayed", n)
	}
	mustEnd(t, s)
}

// Leaves() misses a leaf that is committed and evicted between the table's look-up and the cache's.
func TestExtentsWhileLeafLeavesMemory(t *testing.T) {
	dir := setup(t, 1<<30, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	s.cache.Restrict(3)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	data := randomBytes(4096, 1)
	_, err = d.WriteAt(data, 0)
	must(t, err)
	_, err = d.WriteAt(data, 500<<20) // leaf 500: dirty, not in the table
	must(t, err)
	buf := make([]byte, 4096)
	first := true
	var sum int64
	must(t, d.Extents(0, d.Size(), func(off, length int64, hole bool) bool {
		if first { // what a checkpoint and another reader do meanwhile
			first = false
			must(t, s.Checkpoint())
			for i := int64(501); i < 1000; i++ {
				_, err := d.ReadAt(buf, i<<20)
				must(t, err)
			}
		}
		if !hole {
			sum += length
		}
		return true
	}))
	if sum != 8192 {
		t.Errorf("Extents: %d bytes of data, want 8192", sum)
	}
}

// The same through WriteZeroes only: a checkpoint and reads run beside it.
func TestWriteZeroesBesideCheckpoints(t *testing.T) {
	dir := setup(t, 8<<40, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	s.cache.Restrict(3)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	data, buf := randomBytes(4096, 1), make([]byte, 4096)
	for round := range 20 {
		at := int64(8<<40) - 4096
		_, err = d.WriteAt(data, at)
		must(t, err)
		done := make(chan error)
		go func() { done <- d.WriteZeroes(0, d.Size(), false) }()
		time.Sleep(time.Duration(5) * time.Millisecond)
		must(t, s.Checkpoint())
		for i := int64(0); i < 600; i++ {
			_, err := d.ReadAt(buf, i<<20)
			must(t, err)
		}
		must(t, <-done)
		_, err = d.ReadAt(buf, at)
		must(t, err)
		if !format.IsZero(buf) {
			t.Fatalf("round %d: WriteZeroes of the whole volume returned, and old data is read", round)
		}
		must(t, s.Checkpoint())
		must(t, d.WriteZeroes(0, d.Size(), false))
		must(t, s.Checkpoint())
	}
}

// An event on a full disk gets the error of a data writer's attempt.
func TestEventOnFullDiskBesideWriter(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	fs := newHook(t, dir)
	entered, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1, chunkBytes: 64 << 20})
	fs.onFree = func() (int64, bool) { once.Do(func() { close(entered); <-gate }); return 32 << 20, true }
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	wrote := make(chan error)
	go func() { _, err := d.WriteAt(randomBytes(4096, 1), 0); wrote <- err }()
	<-entered
	renamed := make(chan error)
	go func() { renamed <- s.Rename(Ref{Volume: "v"}, Ref{Volume: "w"}) }()
	time.Sleep(50 * time.Millisecond)
	close(gate)
	t.Logf("write: %v", <-wrote)
	if err := <-renamed; err != nil {
		t.Errorf("event on a disk with 32 MiB free: %v", err)
	}
	time.Sleep(200 * time.Millisecond)
	if err := s.Snapshot(Ref{"w", "a"}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("a new name on a disk with 32 MiB free: %v", err)
	}
}

// A flush beside writers that are faster than the disk.
func TestFlushBesideBusyWriters(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	fs := newHook(t, dir)
	fs.onWrite = func(_ string, n int) {
		if n > 4096 {
			time.Sleep(time.Duration(n) * time.Second / (200 << 20)) // 200 MB/s
		}
	}
	s := open(t, dir, Options{fs: fs, checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	var stop atomic.Bool
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			p := randomBytes(1<<20, uint64(i))
			for !stop.Load() {
				if _, err := d.WriteAt(p, int64(i)<<20); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	flushed := make(chan error, 1)
	start := time.Now()
	before := appended(s)
	go func() { flushed <- d.Flush() }()
	select {
	case err := <-flushed:
		t.Logf("flush took %v: %v", time.Since(start), err)
		if time.Since(start) > time.Second {
			t.Error("too long")
		}
	case <-time.After(8 * time.Second):
		s.mu.Lock()
		n := appended(s) - before
		s.mu.Unlock()
		t.Errorf("flush has not returned after %v; writers wrote %d MiB meanwhile (buffers hold 16 MiB: 0.08 s at this speed)", time.Since(start), n>>20)
	}
	stop.Store(true)
	wg.Wait()
}

// One damaged leaf of a deleted volume.
func TestDamagedLeafOfDeletedVolume(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	for _, n := range []string{"v", "w"} {
		_, err := s.CreateVolume(n, VolumeOptions{Size: 64 << 20})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: n}, false)
		must(t, err)
		_, err = d.WriteAt(randomBytes(4096, 1), 0)
		must(t, err)
		must(t, d.Close())
	}
	must(t, s.Checkpoint())
	must(t, s.Remove(Ref{Volume: "v"}, false))
	must(t, s.wal.Sync())
	var err error
	var v metadata.Version
	must(t, s.meta.View(func(tx *metadata.Tx) error {
		return tx.Versions(func(x metadata.Version, _ *format.Leaf, _ error) error {
			if x.Branch == 1 {
				v = x
			}
			return nil
		})
	}))
	must(t, s.meta.Update(func(tx *metadata.Tx) error { return tx.PutLeaf(v, bytes.Repeat([]byte{7}, 60)) }))
	killStore(s)
	for i := range 3 {
		s, err = Open(dir, Options{checkpointInterval: -1})
		if err != nil {
			t.Fatalf("open %d: %v", i, err)
		}
		if err := s.Checkpoint(); err != nil {
			t.Errorf("checkpoint: %v", err)
		}
		d, err := s.OpenDevice(Ref{Volume: "w"}, false)
		must(t, err)
		_, err = d.WriteAt(randomBytes(4096, 1), 0)
		must(t, err)
		d.Close()
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

// A failure to open a chunk file, once.
func TestChunkOpensAfterFailure(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4096, 1), 0)
	must(t, err)
	d.Close()
	must(t, s.Close())
	fs := newHook(t, dir)
	s = open(t, dir, Options{fs: fs, checkpointInterval: -1})
	d, err = s.OpenDevice(Ref{Volume: "v"}, true)
	must(t, err)
	var n atomic.Int32
	fs.onOpen = func(string) error {
		if n.Add(1) == 1 {
			return errors.New("EMFILE")
		}
		return nil
	}
	buf := make([]byte, 4096)
	for i := range 3 {
		if _, err := d.ReadAt(buf, 0); err != nil && i > 0 {
			t.Errorf("read %d, after one failed open: %v", i, err)
		}
	}
}

// One plan over two leaves, a chunk's slot reused in between.
func TestPlanAcrossSlotReuse(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1, chunkBytes: 64 << 10})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	A, B := randomBytes(4096, 1), randomBytes(4096, 2)
	_, err = d.WriteAt(A, 255*4096)
	must(t, err)
	// the plan's loop over leaves, stopped between the two
	buf := make([]byte, 8192)
	pl := &ReadPlan{d: d}
	var bad error
	var target format.Entry
	must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) {
		target = lf.Entry(255)
		bad = pl.plan(lf, buf[:4096], 255*4096)
	}))
	must(t, bad)
	old := s.slots.get(target.Slot())
	// others go on
	_ = B
	must(t, d.Discard(255*4096, 4096))
	for i := 0; ; i++ {
		if i > 5000 {
			t.Skip("did not come to it")
		}
		_, err = d.WriteAt(randomBytes(4096, uint64(i+10)), 256*4096)
		must(t, err)
		if i%8 == 0 {
			must(t, s.Checkpoint())
		}
		l := s.cache.Lock(d.b.leaf(1, head))
		e := l.Leaf().Entry(0)
		l.Unlock()
		if e == target && s.slots.get(e.Slot()) != old {
			break
		}
	}
	want := make([]byte, 4096)
	_, err = d.ReadAt(want, 256*4096)
	must(t, err)
	must(t, s.cache.View(d.b.leaf(1, head), func(lf *leafcache.Leaf) { bad = pl.plan(lf, buf[4096:], 256*4096) }))
	must(t, bad)
	must(t, pl.locate())
	if err := pl.Fetch(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf[4096:], want) {
		t.Errorf("block 256 reads wrong without an error; it is block 255's old content: %v", bytes.Equal(buf[4096:], A))
	}
}

// A chunk of holes and events is never given back while the store is open.
func TestChunksOfHolesGo(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1, chunkBytes: 64 << 10})
	from := "v"
	for i := 2; i < 3000; i++ {
		to := fmt.Sprint("v", i)
		must(t, s.Rename(Ref{Volume: from}, Ref{Volume: to}))
		from = to
	}
	for range 5 {
		must(t, s.Checkpoint())
	}
	names := chunkFiles(t, s.fs)
	t.Logf("chunk files with no live byte after 5 checkpoints: %d; Info %+v", len(names), s.Info())
	if len(names) > 3+wal.PoolSize {
		t.Errorf("%d files stay", len(names))
	}
	killStore(s)
	s = open(t, dir, Options{checkpointInterval: -1, chunkBytes: 64 << 10})
	names = chunkFiles(t, s.fs)
	t.Logf("after a restart: %d", len(names))
}

// Close while a Check runs.
func TestCloseDuringCheck(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for i := range int64(64) {
		for j := range int64(1) {
			_, err = d.WriteAt(randomBytes(4096, uint64(i*16+j+1)), i<<20+j<<16)
			must(t, err)
		}
	}
	d.Close()
	closed := make(chan error, 1)
	var once sync.Once
	problems := 0
	_, err = s.Check(context.Background(), CheckOptions{ReadData: true, Progress: func(done, total int64) {
		once.Do(func() {
			go func() { closed <- s.Close() }()
			time.Sleep(500 * time.Millisecond)
		})
	}}, func(p Problem) {
		if problems++; problems < 3 {
			t.Logf("%+v", p)
		}
	})
	t.Logf("check: %v, close: %v", err, <-closed)
	if problems > 0 {
		t.Errorf("%d problems reported of a sound store", problems)
	}
}

// A check of the table's pages does not keep checkpoints, and so writers, waiting.
func TestCheckpointWhilePagesAreChecked(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	st, err := s.beginCheck(func() error { return nil })
	must(t, err)
	for i := range int64(20) {
		_, err := d.WriteAt(randomBytes(4096, 1), i<<20)
		must(t, errors.Join(err, s.Checkpoint()))
	}
	must(t, st.Pages())
	must(t, st.Copy(true))
	must(t, st.Tx.Close())
	must(t, errors.Join(d.Close(), s.Close()))
}

var _ = os.Stat
