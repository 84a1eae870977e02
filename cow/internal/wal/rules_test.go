package wal

import (
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// TestFailedLog: after a failure no record is taken, and no buffer written.
func TestFailedLog(t *testing.T) {
	disk := newHookFS()
	l, mu := newLog(t, disk)
	mu.Lock()
	l.add(t, make([]byte, 100))
	mu.Unlock()
	l.WaitIdle()
	_ = l.Fail(errors.New("of a test"))
	disk.onWrite = func(off int64) error {
		t.Errorf("a write at %d after a failure", off)
		return nil
	}
	if err := l.WriteOut(); !errors.Is(err, fault.ErrFailed) {
		t.Error("records are written out: ", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if err := l.Reserve(100, ForData); !errors.Is(err, fault.ErrFailed) {
		t.Error("there is room for a record: ", err)
	}
}

// TestNeedSync: the first sync after a replay includes the chunks that the replay has read, though nothing was written.
func TestNeedSync(t *testing.T) {
	disk := newHookFS()
	l, _ := newLog(t, disk)
	f, err := disk.Create(ChunkName(7), format.ChunkHeaderSize)
	if err != nil {
		t.Fatal(err)
	}
	c := FoundChunk(7, 1, format.ChunkHeaderSize, disk)
	c.file = f
	l.NeedSync(c)
	synced := 0
	disk.onSync = func() { synced++ }
	for range 2 {
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if synced != 1 {
		t.Errorf("the chunk was synced %d times", synced)
	}
}

// TestWriteOut: when it returns, each record appended before is in its file, and no shared buffer says that it holds it:
// the next owner would put it in its place once more, over what came later.
func TestWriteOut(t *testing.T) {
	l, mu := newLog(t, newHookFS())
	var heads [BufferCount]BufferHead
	for i := range heads {
		l.Share(i, make([]byte, BufferSize), &heads[i])
	}
	for range 3 {
		mu.Lock()
		c, off, h := l.add(t, make([]byte, 100))
		mu.Unlock()
		held := 0
		for i := range heads {
			held += int(heads[i].Used.Load())
		}
		if held == 0 {
			t.Error("no shared buffer holds a record that is in no file")
		}
		if err := l.WriteOut(); err != nil {
			t.Fatal(err)
		}
		var r Reader
		if err := r.Begin(c, off, ReplayWindow); err != nil {
			t.Fatal(err)
		}
		if _, payload, err := r.Next(h.Seq); err != nil || payload == nil {
			t.Errorf("record %d is not in its file: %v, %v", h.Seq, err, r.Why)
		}
		for i := range heads {
			if n := heads[i].Used.Load(); n != 0 {
				t.Errorf("buffer %d holds %d bytes that are in their file", i, n)
			}
		}
	}
}

// TestRoomForTheSummary: the records of a full chunk and its summary do not overlap.
func TestRoomForTheSummary(t *testing.T) {
	l, mu := newLog(t, newHookFS())
	l.ChunkBytes = 256 << 10
	mu.Lock()
	defer mu.Unlock()
	first, _, _ := l.add(t, []byte{1})
	for l.Current() == first {
		l.add(t, []byte{1})
	}
	n := (first.End - format.ChunkHeaderSize) / (format.RecordHeaderSize + format.RecordAlign)
	if end := first.End + n*format.SummaryEntrySize + format.SummaryFooterSize; end > first.Size {
		t.Errorf("%d records and their summary end at %d of %d", n, end, first.Size)
	}
}

// TestNumberOfAFailedChunk: a chunk that could not be made may have left a header with its number on the disk.
func TestNumberOfAFailedChunk(t *testing.T) {
	disk := crashfs.New()
	l, mu := newLog(t, disk)
	disk.FailAt(crashfs.OpSync, 1, syscall.EIO)
	mu.Lock()
	defer mu.Unlock()
	was := l.NextChunk()
	if err := l.Reserve(100, ForData); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if l.NextChunk() == was {
		t.Errorf("the number %d is given again", was)
	}
	l.UsedChunk(1 << 60)
	if n := l.NextChunk(); n <= 1<<60 {
		t.Errorf("a chunk has the number %d, and the next one would have %d", 1<<60, n)
	}
}

// TestFileInTheWay: a file that has the name of a new chunk is kept.
func TestFileInTheWay(t *testing.T) {
	disk := crashfs.New()
	if _, err := disk.Create(ChunkName(0), 1); err != nil {
		t.Fatal(err)
	}
	l, mu := newLog(t, disk)
	mu.Lock()
	defer mu.Unlock()
	if err := l.Reserve(100, ForData); err != nil {
		t.Fatal(err)
	}
	if aside := disk.Aside(); len(aside) != 1 {
		t.Errorf("%v are set aside", aside)
	}
}

// TestPool: the pool keeps a few files, of the size of a chunk. One that cannot be removed stays its.
func TestPool(t *testing.T) {
	disk := stubbornFS{FS: crashfs.New(), overwrites: true}
	chunk := func(slot uint32, size int64) *Chunk {
		if _, err := disk.FS.Create(ChunkName(slot), size); err != nil {
			t.Fatal(err)
		}
		return FoundChunk(slot, 1, format.ChunkHeaderSize, disk)
	}
	var mu sync.Mutex
	p := Pool{fs: disk, space: &bareSpace{}, mu: &mu}
	if p.Keep(chunk(9, 2<<20), 1<<20) || p.Keep(chunk(10, 1<<19), 1<<20) {
		t.Error("the pool keeps a file of another size")
	}
	for slot := range uint32(PoolSize + 1) {
		if kept := p.Keep(chunk(slot, 1<<20), 1<<20); kept != (slot < PoolSize) {
			t.Errorf("file %d is kept: %v", slot, kept)
		}
	}
	for range 2 {
		if n, err := p.Empty(); n != 0 || !errors.Is(err, syscall.EIO) || p.Bytes() != PoolSize<<20 {
			t.Errorf("%d files are gone, and %d bytes are left: %v", n, p.Bytes(), err)
		}
	}
}

// TestTryAcquire: a chunk whose last reference is gone belongs to another.
func TestTryAcquire(t *testing.T) {
	c := NewChunk(1, 1, nil)
	if !c.TryAcquire() || !c.InUse() {
		t.Error("a chunk cannot be used")
	}
	c.Release()
	c.Release()
	if c.TryAcquire() {
		t.Error("a chunk is used that nobody has")
	}
}

// TestEndReplay: a log is durable no farther than it goes, and at least as far as the table has it.
func TestEndReplay(t *testing.T) {
	for _, c := range []struct{ known, next, table, want uint64 }{{100, 20, 10, 20}, {15, 20, 10, 15}, {5, 20, 10, 10}} {
		l := &Log{}
		l.Resume(c.next, 1)
		l.KnowDurable(c.known)
		l.EndReplay(c.table)
		if l.Durable() != c.want {
			t.Errorf("%+v: %d", c, l.Durable())
		}
	}
}

// TestMarkOfALostEnd: a mark that speaks of records which a repair has given up is durably gone before the log goes on,
// even if no other can be made.
func TestMarkOfALostEnd(t *testing.T) {
	disk, log := crashfs.New(), slog.New(slog.DiscardHandler)
	begin := func(seq uint64) *Mark {
		m := &Mark{}
		m.Open(disk, [16]byte{1}, log)
		if err := m.Begin(seq); err != nil {
			t.Fatal(err)
		}
		return m
	}
	begin(50)
	disk.FailAt(crashfs.OpCreate, 1, syscall.ENOSPC)
	begin(40)
	left := disk.Crash(crashfs.Choice{})
	if _, err := left.Open(MarkName); !errors.Is(err, fs.ErrNotExist) {
		t.Error("after a power cut the mark is back: ", err)
	}
}

// TestMarksTakeTurns: the mark before the last one stays, since a power cut may tear the last one.
func TestMarksTakeTurns(t *testing.T) {
	disk := crashfs.New()
	m := &Mark{}
	m.Open(disk, [16]byte{1}, slog.New(slog.DiscardHandler))
	if err := m.Begin(1); err != nil {
		t.Fatal(err)
	}
	for seq := uint64(2); seq < 7; seq++ {
		m.set(seq)
		newest, older := m.at(t, 0), m.at(t, 1)
		if max(newest, older) != seq || min(newest, older) != seq-1 {
			t.Errorf("after mark %d there are %d and %d", seq, newest, older)
		}
	}
}

// TestMarkOfAnotherStore: a mark that another store has written says nothing.
func TestMarkOfAnotherStore(t *testing.T) {
	disk, log := crashfs.New(), slog.New(slog.DiscardHandler)
	for store, want := range []uint64{0, 0, 7} { // what its first opening finds
		m := &Mark{}
		m.Open(disk, [16]byte{byte(min(store, 1))}, log)
		if m.Seq() != want {
			t.Errorf("store %d finds the mark %d", store, m.Seq())
		}
		if err := m.Begin(uint64(5 + 2*store)); err != nil {
			t.Fatal(err)
		}
	}
}

// at returns the number in one of the places of the file.
func (m *Mark) at(t *testing.T, place int) uint64 {
	t.Helper()
	mark, err := m.read(place)
	if err != nil {
		t.Fatal(err)
	}
	return mark.Seq
}
