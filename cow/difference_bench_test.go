package cow

import (
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// BenchmarkDifference takes the difference of two snapshots of a volume of 1 TiB that has a million leaves, and between
// them one that changed.
func BenchmarkDifference(b *testing.B) {
	s, dir := newStore(b, Options{checkpointInterval: -1})
	const leaves = 1 << 20
	_, err := s.CreateVolume("v", VolumeOptions{Size: leaves * leafSize})
	must(b, err)
	d := mustOpenBench(b, s, Ref{Volume: "v"}, false)
	branch := d.b.ID
	must(b, d.Close())
	must(b, s.Close())
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{NoSync: true})
	must(b, err)
	var l format.Leaf
	l.SetChanged(0) // a hole: nothing has to be in the log
	value := format.AppendLeaf(nil, &l)
	for from := uint32(0); from < leaves; from += 4096 {
		must(b, db.Update(func(tx *metadata.Tx) error {
			for index := from; index < from+4096; index++ {
				if err := tx.PutLeaf(metadata.Version{Branch: branch, Leaf: index, Epoch: 1}, value); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	must(b, db.Close())
	s, err = Open(dir, Options{checkpointInterval: -1})
	must(b, err)
	must(b, s.Snapshot(Ref{"v", "a"}))
	d = mustOpenBench(b, s, Ref{Volume: "v"}, false)
	_, err = d.WriteAt(randomBytes(format.BlockSize, 1), 1<<39)
	must(b, err)
	must(b, s.Snapshot(Ref{"v", "b"}))
	from, to := mustOpenBench(b, s, Ref{"v", "a"}, true), mustOpenBench(b, s, Ref{"v", "b"}, true)
	for b.Loop() {
		x, err := s.Difference(b.Context(), from, to)
		must(b, err)
		n := 0
		must(b, x.Extents(b.Context(), 0, x.Size(), func(int64, int64, bool) bool { n++; return true }))
		if n != 1 || x.loaded.Load() != 2 {
			b.Fatal(n, x.loaded.Load())
		}
	}
	for _, dev := range []*Device{from, to, d} {
		must(b, dev.Close())
	}
	must(b, s.Close())
}

func mustOpenBench(b *testing.B, s *Store, r Ref, readOnly bool) *Device {
	d, err := s.OpenDevice(r, readOnly)
	must(b, err)
	return d
}
