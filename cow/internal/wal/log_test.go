package wal

import (
	"bytes"
	"errors"
	"log/slog"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// bareSpace is the account of a store that has nothing but the log's own chunks, and room without end.
type bareSpace struct{ taken uint32 }

func (s *bareSpace) FreeSlot() (uint32, bool) { return s.taken, true }
func (s *bareSpace) FreeSlots() int           { return format.MaxSlots }
func (s *bareSpace) Used() int64              { return 0 }
func (s *bareSpace) Held() int64              { return 0 }
func (s *bareSpace) ForCleaner() int64        { return 0 }
func (s *bareSpace) Add(c *Chunk)             { s.taken = max(s.taken, c.Slot+1) }
func (s *bareSpace) Drop(uint32)              {}
func (s *bareSpace) Changed(*Chunk)           {}
func (s *bareSpace) Freed(int64)              {}
func (s *bareSpace) NeedRoom() bool           { return false }
func (s *bareSpace) Rotated(Purpose)          {}

// newLog returns a log that has started, and its lock. The test's cleanup stops it.
func newLog(t *testing.T, fs storage.FS) (*Log, *sync.Mutex) {
	t.Helper()
	var mu sync.Mutex
	reserve, mark := &ReserveFile{}, &Mark{}
	if err := reserve.Open(fs); err != nil {
		t.Fatal(err)
	}
	l := New(fs, &mu, [16]byte{1}, &bareSpace{}, reserve, mark)
	l.ChunkBytes = 4 << 20
	l.Resume(1, 1)
	l.Start()
	t.Cleanup(l.Stop)
	return l, &mu
}

// add appends a record with the payload. The caller holds mu.
func (l *Log) add(t *testing.T, payload []byte) (c *Chunk, off uint32, h format.RecordHeader) {
	t.Helper()
	h = format.RecordHeader{Kind: format.KindEvent, Blocks: 1, PayloadLen: len(payload), PayloadCRC: format.Checksum(payload)}
	if err := l.Reserve(h.Size(), ForData); err != nil {
		t.Fatal(err)
	}
	c, off = l.Append(&h, payload)
	return c, off, h
}

// hookFS calls functions before files are synced and written to; a write fails with the function's error.
type hookFS struct {
	storage.FS
	onSync  func()
	onWrite func(off int64) error
}

type hookFile struct {
	storage.File
	fs *hookFS
}

func newHookFS() *hookFS {
	return &hookFS{crashfs.New(), func() {}, func(int64) error { return nil }}
}

func (h *hookFS) Create(name string, size int64) (storage.File, error) {
	f, err := h.FS.Create(name, size)
	return hookFile{f, h}, err
}

func (f hookFile) Sync() error {
	f.fs.onSync()
	return f.File.Sync()
}

func (f hookFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.onWrite(off); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

// A record in the buffer after one that was cut early, and is being written, is read from its own buffer.
func TestReadBehindCutBuffer(t *testing.T) {
	fs, hold := newHookFS(), make(chan struct{})
	fs.onWrite = func(off int64) error {
		if off >= format.ChunkHeaderSize {
			<-hold
		}
		return nil
	}
	l, mu := newLog(t, fs)
	release := sync.OnceFunc(func() { close(hold) })
	t.Cleanup(release) // before the log is stopped
	for i := range byte(3) {
		payload := bytes.Repeat([]byte{i + 1}, 1000)
		mu.Lock()
		c, off, h := l.add(t, payload)
		l.cut()
		mu.Unlock()
		got := make([]byte, h.Size())
		if !l.Read(c, off, got) {
			t.Fatalf("record %d is in no buffer", i)
		}
		if !bytes.Equal(got[format.RecordHeaderSize:][:1000], payload) {
			t.Fatalf("record %d: %x…", i, got[format.RecordHeaderSize:][:4])
		}
	}
	release()
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
}

// The reader returns the records in order, with the checks of a replay and without.
func TestReader(t *testing.T) {
	l, mu := newLog(t, crashfs.New())
	var c *Chunk
	mu.Lock()
	for i := range byte(5) {
		c, _, _ = l.add(t, bytes.Repeat([]byte{i + 1}, 1000))
	}
	mu.Unlock()
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	f, err := c.Handle()
	if err == nil { // the payload of the fourth
		_, err = f.WriteAt([]byte{9}, format.ChunkHeaderSize+3*int64(format.RecordHeaderSize+1000+8)+500)
	}
	if err != nil {
		t.Fatal(err)
	}
	var r Reader
	if err := r.Begin(c, format.ChunkHeaderSize, ReplayWindow); err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); seq < 4; seq++ {
		if h, payload, err := r.Next(seq); err != nil || h.Seq != seq || payload[0] != byte(seq) || r.Why != nil {
			t.Fatal(seq, h, err, r.Why)
		}
	}
	if h, _, err := r.Next(7); h != nil || err != nil || !errors.Is(r.Why, format.ErrCorrupt) {
		t.Error("a record with another number:", h, err, r.Why)
	}
	if h, payload, err := r.Next(4); h == nil || payload != nil || err != nil || !errors.Is(r.Why, format.ErrCorrupt) {
		t.Error("a record with a damaged payload:", h, err, r.Why)
	}
	for seq := uint64(4); seq < 6; seq++ {
		if h, payload, err := r.Any(); err != nil || h.Seq != seq || payload[0] != byte(seq) {
			t.Fatal(seq, h, err)
		}
	}
	if h, _, err := r.Any(); h != nil || !errors.Is(err, format.ErrCorrupt) {
		t.Error("behind the last record:", h, err)
	}
	if n, err := c.FirstSeq(); n != 1 || err != nil {
		t.Error(n, err)
	}
}

// The bytes behind the end of the log are all counted. That holds, too, if the log ends at a record with a whole header
// and a damaged payload.
func TestTailBehindDamagedRecord(t *testing.T) {
	l, mu := newLog(t, crashfs.New())
	var c *Chunk
	mu.Lock()
	for i := range byte(5) {
		c, _, _ = l.add(t, bytes.Repeat([]byte{i + 1}, 1000))
	}
	mu.Unlock()
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	const size = format.RecordHeaderSize + 1000 + 8
	for _, end := range []uint32{format.ChunkHeaderSize, format.ChunkHeaderSize + 3*size} {
		want := int64(format.ChunkHeaderSize + 5*size - end)
		if n, err := c.Tail(end, 1+uint64(end-format.ChunkHeaderSize)/size); n != want || err != nil {
			t.Errorf("%d bytes lie behind the end at %d, want %d (%v)", n, end, want, err)
		}
	}
}

// Records that are appended while a sync runs are not durable by that sync: neither the log nor the mark says so, and a
// flush of theirs does not end with it.
func TestAppendDuringSync(t *testing.T) {
	fs := newHookFS()
	l, mu := newLog(t, fs)
	l.mark.Open(fs.FS, l.uuid, slog.New(slog.DiscardHandler))
	if err := l.mark.Begin(1); err != nil {
		t.Fatal(err)
	}
	add := func() {
		mu.Lock()
		defer mu.Unlock()
		l.add(t, make([]byte, 1000))
	}
	durable := func() uint64 {
		mu.Lock()
		defer mu.Unlock()
		return l.Durable()
	}
	add()
	if err := l.Sync(); err != nil { // the chunk is there by now
		t.Fatal(err)
	}
	for i := range uint64(3) {
		add()
		syncs := 0
		fs.onSync = func() { syncs++; add() }
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
		fs.onSync = func() {}
		want := 3 + 2*i // one of the two that were appended since
		if durable() != want || l.mark.Seq() != want || syncs != 1 {
			t.Fatalf("the log says %d, the mark %d, and record %d is the first that is not durable; %d syncs", durable(), l.mark.Seq(), want, syncs)
		}
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
		if durable() != want+1 {
			t.Fatalf("a flush ended with record %d, and there are %d", durable()-1, want)
		}
	}
}
