package cow

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// TestCheckOfOneVolume: a check of one volume looks at the history and the snapshots of that volume only. A check of a
// volume that does not exist returns ErrNotFound.
func TestCheckOfOneVolume(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	write := func(name string, off int64, seed uint64) {
		d, err := s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		_, err = d.WriteAt(randomBytes(1<<20, seed), off)
		must(t, errors.Join(err, d.Close()))
	}
	for i, name := range []string{"a", "b"} {
		_, err := s.CreateVolume(name, VolumeOptions{Size: 4 << 20, Codec: format.Raw})
		must(t, err)
		write(name, 0, uint64(i+1))
		s.mu.Lock()
		s.wal.Retire() // each volume has its own chunks
		s.mu.Unlock()
	}
	must(t, s.Snapshot(Ref{"a", "s"}))
	write("a", 0, 3)
	must(t, s.Snapshot(Ref{"a", "later"})) // on a branch that the volume has left
	must(t, s.Rollback(Ref{"a", "s"}))
	write("a", 1<<20, 4)
	must(t, s.Clone(Ref{"a", "s"}, "c"))
	must(t, s.Checkpoint())

	check := func(name string, data bool) (CheckReport, error) {
		return s.Check(context.Background(), CheckOptions{Volume: name, ReadData: data}, func(Problem) {})
	}
	for name, want := range map[string]int64{"": 4 << 20, "a": 3 << 20, "b": 1 << 20, "c": 2 << 20} {
		rep, err := check(name, true)
		must(t, err)
		if blocks := want / format.BlockSize; rep.Corrupt+rep.Leaks > 0 || rep.Entries != blocks || rep.DataBytes < want || rep.DataBytes > want*11/10 {
			t.Errorf("%q: %+v, want %d blocks", name, rep, blocks)
		}
	}
	for _, data := range []bool{false, true} {
		if rep, err := check("nobody", data); !errors.Is(err, ErrNotFound) || errors.Is(err, ErrCorrupt) {
			t.Errorf("%+v, %v", rep, err)
		}
	}

	// Cut off the end of the first chunk, which belongs to a and its clone.
	must(t, os.Truncate(filepath.Join(dir, chunksDir, wal.ChunkName(0)), 8192))
	for name, bad := range map[string]bool{"": true, "a": true, "b": false, "c": true} {
		for _, data := range []bool{false, true} {
			rep, err := check(name, data)
			must(t, err)
			if (rep.Corrupt > 0) != bad {
				t.Errorf("%q, reading data %v: %+v", name, data, rep)
			}
		}
	}
	must(t, s.Close())
}
