package cow

import (
	"bytes"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// skipChunk leaves the rest of the present chunk, or all of it, without records.
func (s *Store) skipChunk() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wal.SkipChunk()
}

// holdsAt reports whether a volume has the content want at an offset.
func holdsAt(t *testing.T, s *Store, volume string, off int64, want []byte) bool {
	t.Helper()
	d, err := s.OpenDevice(Ref{Volume: volume}, true)
	must(t, err)
	got := make([]byte, len(want))
	_, err = d.ReadAt(got, off)
	must(t, errors.Join(err, d.Close()))
	return bytes.Equal(got, want)
}

// TestChunkMadeForNothing: if a chunk was made for an event that is then refused, or for a discard that then has
// nothing to do, the log goes on in the next chunk.
func TestChunkMadeForNothing(t *testing.T) {
	for _, kind := range []string{"event", "discard"} {
		t.Run(kind, func(t *testing.T) {
			dir := setup(t, 64<<20, format.Raw)
			fs := newHook(t, dir)
			var free atomic.Int64
			free.Store(1 << 30)
			fs.onFree = func() (int64, bool) { return free.Load(), true }
			o := Options{fs: fs, checkpointInterval: -1, chunkBytes: 4 << 20}
			s := open(t, dir, o)
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			_, err = d.WriteAt(randomBytes(4096, 1), 0)
			must(t, err)
			s.wal.WaitIdle()
			free.Store(10 << 20) // others fill the disk
			for i := int64(0); err == nil; i++ {
				_, err = d.WriteAt(randomBytes(64<<10, uint64(i+2)), i%512<<16)
			}
			if !errors.Is(err, ErrNoSpace) {
				t.Fatal(err)
			}
			fits := func(n int) bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.wal.Fits(n, wal.ForEvents)
			}
			names := [2]string{"v", "w"}
			for i := 0; fits(4096); i++ {
				must(t, s.Rename(Ref{Volume: names[i%2]}, Ref{Volume: names[(i+1)%2]}))
			}
			name := d.Ref().Volume
			if kind == "event" {
				if _, err = s.CreateVolume(name, VolumeOptions{Size: 1 << 20}); !errors.Is(err, ErrExists) {
					t.Fatal(err)
				}
			} else {
				for b := int64(0); fits(48); b++ {
					must(t, d.Discard(b*4096, 4096))
				}
				must(t, d.Discard(0, 4096)) // again
			}
			free.Store(1 << 30) // and give the space back
			want := randomBytes(1<<20, 77)
			_, err = d.WriteAt(want, 8<<20)
			must(t, errors.Join(err, d.Flush(), s.Snapshot(Ref{name, "after"})))
			killStore(s)

			o.fs = nil
			s = open(t, dir, o)
			_, _, err = s.lookup(Ref{name, "after"})
			if !holdsAt(t, s, name, 8<<20, want) || err != nil {
				t.Errorf("what was flushed is gone: %v; %+v", err, s.Recovery())
			}
			mustEnd(t, s)
		})
	}
}

// TestEmptyChunks: chunks without records may lie anywhere in the log, as stores of an older version have them.
func TestEmptyChunks(t *testing.T) {
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s, dir := newStore(t, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	empty := func(n int) {
		for range n {
			must(t, s.skipChunk())
		}
	}
	var want [][]byte
	for i, n := range []int{3, 1, 2, 3} {
		empty(n)
		want = append(want, randomBytes(300<<10, uint64(i)))
		_, err = d.WriteAt(want[i], int64(i)<<20)
		must(t, err)
	}
	must(t, errors.Join(d.Flush(), s.Snapshot(Ref{"v", "after"})))
	empty(3) // at the end too
	killStore(s)
	for i := range 3 {
		s = open(t, dir, o)
		if r := s.Recovery(); i < 2 && (r.Records == 0 || r.DroppedBytes != 0 || r.Lost != 0) {
			t.Errorf("%+v", r)
		}
		_, _, err = s.lookup(Ref{"v", "after"})
		must(t, err)
		for j := range want {
			if !holdsAt(t, s, "v", int64(j)<<20, want[j]) {
				t.Fatalf("opening %d: write %d is gone: %+v", i, j, s.Recovery())
			}
		}
		switch i {
		case 1:
			must(t, s.Checkpoint())
			mustCheck(t, s)
			if n := s.Info().Chunks; n > 5 {
				t.Errorf("%d chunks are left, and 4 of them have records", n)
			}
			killStore(s)
		case 2:
			mustEnd(t, s)
		default:
			killStore(s)
		}
	}
}

// TestLogEndsWhereTheNextOwnerFoundItsEnd: a record does not verify once, so the log goes on before it. Later the
// record verifies again. What was written after the first time counts.
func TestLogEndsWhereTheNextOwnerFoundItsEnd(t *testing.T) {
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s, dir := newStore(t, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(100<<10, 1), 0)
	must(t, err)
	s.mu.Lock()
	path, at := filepath.Join(dir, chunksDir, s.wal.Current().Name()), int64(s.wal.Current().End)
	s.mu.Unlock()
	_, err = d.WriteAt(randomBytes(100<<10, 2), 1<<20)
	must(t, errors.Join(err, d.Flush()))
	killStore(s)
	forgetMark(t, dir)
	change(t, path, at+100, flip, 1)
	s = open(t, dir, o)
	if r := s.Recovery(); r.DroppedBytes == 0 {
		t.Fatalf("%+v", r)
	}
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	want := randomBytes(100<<10, 3)
	_, err = d.WriteAt(want, 2<<20)
	must(t, errors.Join(err, d.Flush()))
	killStore(s)
	change(t, path, at+100, flip, 1)
	s = open(t, dir, o)
	if r := s.Recovery(); !holdsAt(t, s, "v", 2<<20, want) {
		t.Errorf("what was flushed last is gone: %+v", r)
	}
	mustEnd(t, s)
}
