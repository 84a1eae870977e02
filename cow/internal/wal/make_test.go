package wal

import (
	"errors"
	"sync"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// stubbornFS fails the syncs of files, and keeps files that are to be removed.
type stubbornFS struct {
	storage.FS
	overwrites bool
}

type unsyncedFile struct{ storage.File }

func (s stubbornFS) Create(name string, size int64) (storage.File, error) {
	f, err := s.FS.Create(name, size)
	return unsyncedFile{f}, err
}
func (s stubbornFS) Remove(string) error { return syscall.EIO }
func (s stubbornFS) Overwrites() bool    { return s.overwrites }
func (unsyncedFile) Sync() error         { return syscall.EIO }

// A chunk that could not be made, and whose file stays, would end a replay before younger chunks. So the log fails.
func TestChunkThatStays(t *testing.T) {
	l, mu := newLog(t, stubbornFS{FS: crashfs.New()})
	mu.Lock()
	defer mu.Unlock()
	if err := l.Reserve(4096, ForData); !errors.Is(err, fault.ErrFailed) || !errors.Is(l.Err(), fault.ErrFailed) {
		t.Errorf("room for a record: %v; the log: %v", err, l.Err())
	}
}

// Where overwriting a file takes new space, a file of the pool would have none.
func TestPoolNeedsOverwrites(t *testing.T) {
	for _, overwrites := range []bool{true, false} {
		fs := stubbornFS{FS: crashfs.New(), overwrites: overwrites}
		if _, err := fs.FS.Create(ChunkName(0), 4<<20); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		p := Pool{fs: fs, space: &bareSpace{}, mu: &mu}
		if kept := p.Keep(FoundChunk(0, 1, format.ChunkHeaderSize, fs), 4<<20); kept != overwrites {
			t.Errorf("overwrites: %t, kept: %t", overwrites, kept)
		}
	}
}

// Content that was written into a file in an earlier life must not have known the file's later sequence number.
func TestChunkNumbersCannotBeGuessed(t *testing.T) {
	steps := map[uint64]bool{}
	for range 16 {
		step := seqStep()
		if step < 1<<28 || step >= 1<<29 {
			t.Errorf("a step of %d", step)
		}
		steps[step] = true
	}
	if len(steps) < 15 { // two may be the same by chance, once in 2^20 runs
		t.Errorf("16 steps have %d values", len(steps))
	}
}

// A chunk file of another store, or of another slot, is damage.
func TestHeaderOfAnotherStore(t *testing.T) {
	fs := crashfs.New()
	l, mu := newLog(t, fs)
	mu.Lock()
	c, _, _ := l.add(t, make([]byte, 100))
	mu.Unlock()
	if h, err := l.Header(c.Name(), c.Slot); err != nil || h.Seq != c.Seq {
		t.Fatal(h, err)
	}
	if _, err := l.Header(c.Name(), c.Slot+1); !errors.Is(err, format.ErrCorrupt) {
		t.Error("another slot:", err)
	}
	other := New(fs, mu, [16]byte{2}, &bareSpace{}, &ReserveFile{}, &Mark{})
	if _, err := other.Header(c.Name(), c.Slot); !errors.Is(err, format.ErrCorrupt) {
		t.Error("another store:", err)
	}
}

// A file of the pool has one chunk that closes it, also if it cannot become the next chunk.
func TestFileOfThePoolIsClosedOnce(t *testing.T) {
	fs := crashfs.New()
	l, mu := newLog(t, stubbornFS{FS: fs, overwrites: true})
	old := FoundChunk(7, 1, format.ChunkHeaderSize, fs)
	if _, err := fs.Create(old.Name(), l.ChunkBytes); err != nil {
		t.Fatal(err)
	}
	if !l.Pool.Keep(old, l.ChunkBytes) {
		t.Fatal("the pool does not take the file")
	}
	mu.Lock()
	c, _, _ := l.add(t, make([]byte, 100))
	mu.Unlock()
	if c.Slot != old.Slot {
		t.Fatal("the file was not used again")
	}
	if err := errors.Join(old.Close(), l.Sync(), c.Close()); err != nil {
		t.Error(err)
	}
}
