package cow

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
	"github.com/vdisk/vdisk/metadata"
)

// makeWide makes a store with a volume of so many leaves, all mapped, and its snapshot s1. No content is behind them.
func makeWide(dir string, leaves uint32) error {
	if err := Create(dir); err != nil {
		return err
	}
	uuid, err := idOf(dir)
	if err != nil {
		return err
	}
	const record = 4128
	file := make([]byte, format.ChunkHeaderSize+format.LeafBlocks*record)
	head := format.ChunkHeader{Slot: 0, Seq: 1, UUID: uuid}
	head.Encode(file)
	if err := os.WriteFile(filepath.Join(dir, chunksDir, wal.ChunkName(0)), file, 0o600); err != nil {
		return err
	}
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{NoSync: true})
	if err != nil {
		return err
	}
	var l format.Leaf
	for i := range l.Entries {
		l.Entries[i] = format.MakeEntry(0, uint32(format.ChunkHeaderSize+i*record), record, 1, 0)
		l.SetChanged(i)
	}
	value := format.AppendLeaf(nil, &l)
	for from := uint32(0); from < leaves && err == nil; from += 1 << 16 {
		err = db.Update(func(tx *metadata.Tx) error {
			for index := from; index < min(leaves, from+1<<16); index++ {
				if err := tx.PutLeaf(metadata.Version{Branch: 1, Leaf: index, Epoch: 1}, value); err != nil {
					return err
				}
			}
			return nil
		})
	}
	size := int64(leaves) * leafSize
	end := uint32(len(file))
	err = errors.Join(err, db.Update(func(tx *metadata.Tx) error {
		return errors.Join(
			tx.PutChunk(&format.Chunk{Slot: 0, Seq: 1, End: end, Live: end - format.ChunkHeaderSize}),
			tx.PutBranch(&format.Branch{ID: 1, Epoch: 2}),
			tx.PutVolume(&format.Volume{ID: 2, Name: "v", Size: size, Codec: format.S2, LogicalBlock: 512, Branch: 1, Created: Now()}),
			tx.PutSnapshot(&format.Snapshot{ID: 3, Volume: 2, Name: "s1", Branch: 1, Epoch: 1, Size: size, Created: Now(), GUID: newGUID()}),
			tx.PutCheckpoint(&format.Checkpoint{Seq: format.LeafBlocks + 1, ChunkSeq: 2, Offset: format.ChunkHeaderSize, NextID: 4, NextChunkSeq: 2}))
	}))
	return errors.Join(err, db.Close())
}

// firstUnits notes when a stream's second frame is written, which is that of the first units or the end.
type firstUnits struct {
	frames int
	at     time.Time
}

func (w *firstUnits) Write(p []byte) (int, error) {
	if w.frames++; w.frames == 2 {
		w.at = time.Now()
	}
	return len(p), nil
}

// BenchmarkSendOneLeaf sends the difference between two snapshots of a volume of 1 TiB. All of the volume is mapped, and
// one block has changed. The benchmark reports the time until the first units are written.
func BenchmarkSendOneLeaf(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "store")
	must(b, makeWide(dir, 1<<20))
	s, err := Open(dir, Options{ColdAfter: -1})
	must(b, err)
	defer s.Close()
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(b, err)
	_, err = d.WriteAt(randomBytes(4096, 1), 1<<39)
	must(b, errors.Join(err, d.Close(), s.Snapshot(Ref{"v", "s2"})))
	var total time.Duration
	for b.Loop() {
		var w firstUnits
		begin := time.Now()
		got, err := s.Send(b.Context(), SendOptions{Snapshot: Ref{"v", "s2"}, Base: Ref{"v", "s1"}}, &w)
		if err != nil || got[0].Units != 1 {
			b.Fatal(got, err)
		}
		total += w.at.Sub(begin)
	}
	b.ReportMetric(total.Seconds()*1000/float64(b.N), "ms-to-units")
}

// BenchmarkStream sends and receives a volume of 256 MiB, and reads it as an export does. Then 1 % of its leaves change
// in some blocks; it reports what is read for each byte that is sent, and what is sent for each byte as stored.
func BenchmarkStream(b *testing.B) {
	open := func() *Store {
		s, _ := newStore(b, Options{ColdAfter: -1})
		b.Cleanup(func() { s.Close() })
		return s
	}
	const size = 256 << 20
	s, rng := open(), rand.New(rand.NewPCG(1, 1))
	_, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: format.S2})
	must(b, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(b, err)
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		workload.HalfCompressible(rng, buf)
		_, err := d.WriteAt(buf, off)
		must(b, err)
	}
	must(b, errors.Join(d.Flush(), s.Snapshot(Ref{"v", "s1"})))
	b.Run("export", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			for off := int64(0); off < size; off += int64(len(buf)) {
				_, err := d.ReadAt(buf, off)
				must(b, err)
			}
		}
	})
	var file bytes.Buffer
	b.Run("send", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			_, err := s.Send(b.Context(), SendOptions{Snapshot: Ref{"v", "s1"}}, io.Discard)
			must(b, err)
		}
	})
	_, err = s.Send(b.Context(), SendOptions{Snapshot: Ref{"v", "s1"}}, &file)
	must(b, err)
	b.Run("receive", func(b *testing.B) {
		b.SetBytes(size)
		to := open()
		for b.Loop() {
			must(b, receive(to, file.Bytes(), ReceiveOptions{Target: Ref{Volume: "v"}}))
			b.StopTimer()
			must(b, to.Remove(Ref{Volume: "v"}, true))
			b.StartTimer()
		}
	})
	for range size / leafSize / 100 {
		leaf := rng.Int64N(size / leafSize)
		for range 32 {
			workload.HalfCompressible(rng, buf[:4096])
			_, err := d.WriteAt(buf[:4096], leaf*leafSize+rng.Int64N(leafSize/4096)*4096)
			must(b, err)
		}
	}
	must(b, errors.Join(d.Close(), s.Snapshot(Ref{"v", "s2"})))
	b.Run("changed", func(b *testing.B) {
		var got []Sent
		for b.Loop() {
			got, err = s.Send(b.Context(), SendOptions{Snapshot: Ref{"v", "s2"}, Base: Ref{"v", "s1"}}, io.Discard)
			must(b, err)
		}
		b.ReportMetric(float64(got[0].Read)/float64(got[0].Length), "read/sent")
		b.ReportMetric(float64(got[0].Length)/float64(got[0].Bytes), "sent/stored")
	})
}
