package cow

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/workload"
	"github.com/vdisk/vdisk/metadata"
	"golang.org/x/sys/unix"
)

var (
	bigDir   = flag.String("big.dir", "", "where BenchmarkBig makes its store, or finds it")
	bigCache = flag.Int64("big.cache", 64<<20, "the map's cache in BenchmarkBig")
)

// reportCPU reports the processor time of an operation, which says more than the clock's on a machine that does
// something else, too.
func reportCPU(b *testing.B) func() {
	cpu := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := cpu()
	return func() { b.ReportMetric(float64((cpu()-start).Nanoseconds())/float64(b.N), "cpu-ns/op") }
}

// BenchmarkDepth reads random blocks of a volume without history, with 1000 snapshots, and of a clone of a clone 100
// deep.
func BenchmarkDepth(b *testing.B) {
	for _, shape := range []struct {
		name              string
		snapshots, clones int
	}{{"0", 0, 0}, {"snapshots1000", 1000, 0}, {"clones100", 100, 100}} {
		b.Run(shape.name, func(b *testing.B) {
			rng := rand.New(rand.NewPCG(1, 2))
			d := deepDevice(b, rng, shape.snapshots, shape.clones)
			defer d.Close()
			buf := make([]byte, 4096)
			read := func(b *testing.B) {
				if _, err := d.ReadAt(buf, rng.Int64N(deepSize/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
			for range deepSize / 4096 {
				read(b)
			}
			b.Run("warm", func(b *testing.B) {
				defer reportCPU(b)()
				for range b.N {
					read(b)
				}
			})
			b.Run("miss", func(b *testing.B) { // most leaves are looked up in the table
				defer reportCPU(b)()
				for i := range b.N {
					if i%256 == 0 {
						d.s.cache.Forget(&d.b.leaves, true)
					}
					read(b)
				}
			})
		})
	}
}

const deepSize = 256 << 20

// deepDevice is a volume whose blocks were all written, and then ten more before each of its snapshots; or with clones,
// the last clone of the last, so many deep.
func deepDevice(b *testing.B, rng *rand.Rand, snapshots, clones int) *Device {
	d := benchDevice(b, format.S2, deepSize)
	buf := make([]byte, 4096)
	workload.HalfCompressible(rng, buf)
	write := func(n int) {
		for range n {
			if _, err := d.WriteAt(buf, rng.Int64N(deepSize/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
	}
	write(deepSize / 4096)
	for i := range snapshots {
		write(10)
		snap := Ref{d.ref.Volume, fmt.Sprint("s", i)}
		err := d.s.Snapshot(snap)
		if err == nil && i < clones {
			name, last := fmt.Sprint("c", i), d
			if err = d.s.Clone(snap, name); err == nil {
				d, err = d.s.OpenDevice(Ref{Volume: name}, false)
			}
			err = errors.Join(err, last.Close())
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := d.s.Checkpoint(); err != nil {
		b.Fatal(err)
	}
	return d
}

const (
	bigLeaves   = 256 << 10 // 256 GiB
	bigBlocks   = bigLeaves * format.LeafBlocks
	bigRecord   = format.RecordHeaderSize + format.RecordAlign // of a block of one value
	bigPerChunk = (format.MaxChunkSize - format.ChunkHeaderSize) / bigRecord
	// Odd, so that multiplying by it modulo bigBlocks shuffles the blocks.
	bigStride = 0x2545f491
)

// idOf returns the id of the store in a folder.
func idOf(dir string) (id [16]byte, err error) {
	in, err := storage.OpenFolder(dir, false)
	if err != nil {
		return id, err
	}
	defer in.Close()
	info, err := readFormat(in)
	if err != nil {
		return id, err
	}
	return info.ID()
}

// makeBig makes a store with a volume v of 256 GiB. All of v is mapped, to blocks that lie in random order in the log.
func makeBig(final string) error {
	dir := final + ".tmp"
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700), Create(dir)); err != nil {
		return err
	}
	uuid, err := idOf(dir)
	if err != nil {
		return err
	}
	if err := makeBigLog(dir, uuid); err != nil {
		return err
	}
	return errors.Join(makeBigTable(dir), os.Rename(dir, final))
}

func bigBlock(pos uint64) uint64 { return pos * bigStride % bigBlocks }

func makeBigLog(dir string, uuid [16]byte) error {
	c, err := format.NewCompressor(format.S2, 0)
	if err != nil {
		return err
	}
	payload, codec := c.Compress(make([]byte, 0, format.MaxCompressed), []byte(strings.Repeat("x", format.BlockSize)))
	h := format.RecordHeader{Branch: 1, Kind: format.KindData, Codec: codec, Blocks: 1, PayloadLen: len(payload), PayloadCRC: format.Checksum(payload)}
	if h.Size() != bigRecord {
		return fmt.Errorf("a record takes %d bytes", h.Size())
	}
	for first, slot := uint64(0), uint32(0); first < bigBlocks; first, slot = first+bigPerChunk, slot+1 {
		n := min(bigPerChunk, bigBlocks-first)
		file := make([]byte, format.ChunkHeaderSize+n*bigRecord)
		head := format.ChunkHeader{Slot: slot, Seq: uint64(slot) + 1, UUID: uuid}
		head.Encode(file)
		for i := range n {
			h.Seq, h.Block = first+i+1, bigBlock(first+i)
			off := format.ChunkHeaderSize + i*bigRecord
			h.Encode(file[off:off+bigRecord], head.Seq, uint32(off))
			copy(file[off+format.RecordHeaderSize:], payload)
		}
		if err := os.WriteFile(filepath.Join(dir, chunksDir, wal.ChunkName(slot)), file, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func makeBigTable(dir string) error {
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{NoSync: true})
	if err != nil {
		return err
	}
	inverse := uint64(bigStride)
	for range 5 { // Newton's iteration doubles the bits that are right
		inverse *= 2 - bigStride*inverse
	}
	var l format.Leaf
	for from := uint32(0); from < bigLeaves && err == nil; from += 4096 {
		err = db.Update(func(tx *metadata.Tx) error {
			for index := from; index < from+4096; index++ {
				for i := range l.Entries {
					pos := (uint64(index)*format.LeafBlocks + uint64(i)) * inverse % bigBlocks
					l.Entries[i] = format.MakeEntry(uint32(pos/bigPerChunk), uint32(format.ChunkHeaderSize+pos%bigPerChunk*bigRecord), bigRecord, 1, 0)
					l.SetChanged(i)
				}
				if err := tx.PutLeaf(metadata.Version{Branch: 1, Leaf: index, Epoch: 1}, format.AppendLeaf(nil, &l)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	chunks := uint64((bigBlocks + bigPerChunk - 1) / bigPerChunk)
	err = errors.Join(err, db.Update(func(tx *metadata.Tx) error {
		var errs []error
		for i := range chunks {
			n := min(bigPerChunk, bigBlocks-i*bigPerChunk)
			errs = append(errs, tx.PutChunk(&format.Chunk{Slot: uint32(i), Seq: i + 1, End: uint32(format.ChunkHeaderSize + n*bigRecord), Live: uint32(n * bigRecord)}))
		}
		return errors.Join(append(errs,
			tx.PutBranch(&format.Branch{ID: 1, Epoch: 1}),
			tx.PutVolume(&format.Volume{ID: 2, Name: "v", Size: bigBlocks * format.BlockSize, Codec: format.S2, LogicalBlock: 512, Branch: 1, Created: Now()}),
			tx.PutCheckpoint(&format.Checkpoint{Seq: bigBlocks + 1, ChunkSeq: chunks + 1, Offset: format.ChunkHeaderSize, NextID: 3, NextChunkSeq: chunks + 1}))...)
	}))
	return errors.Join(err, db.Close())
}

// memoryOf reads a line of /proc/self/status, in MiB.
func memoryOf(name string) float64 {
	text, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(text)) {
		var kb float64
		if _, err := fmt.Sscanf(line, name+": %f kB", &kb); err == nil {
			return kb / 1024
		}
	}
	return 0
}

// BenchmarkBig works with 256 GiB of blocks that were mapped at random (64 Mi entries, 3.3 GB of store, made once in
// -big.dir): random reads, random writes, and snapshots and clones under a writer. It reports the memory of this
// process.
func BenchmarkBig(b *testing.B) {
	if *bigDir == "" {
		b.Skip("-big.dir says where its store is to be made")
	}
	if _, err := os.Stat(*bigDir); errors.Is(err, fs.ErrNotExist) {
		if err := makeBig(*bigDir); err != nil {
			b.Fatal(err)
		}
	}
	s, err := Open(*bigDir, Options{CacheBytes: *bigCache})
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("opened: RSS %.0f MiB, at most %.0f", memoryOf("VmRSS"), memoryOf("VmHWM"))
	defer func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	}()
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	rss := func(b *testing.B) {
		b.ReportMetric(memoryOf("RssAnon"), "anon-MiB")
		b.ReportMetric(memoryOf("RssFile"), "file-MiB")
		b.ReportMetric(memoryOf("VmRSS"), "RSS-MiB")
	}
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 2))
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(rng, buf)
	b.Run("read", func(b *testing.B) {
		p := make([]byte, 4096)
		for range b.N {
			if _, err := d.ReadAt(p, rng.Int64N(bigBlocks)*4096); err != nil {
				b.Fatal(err)
			}
		}
		rss(b)
	})
	write := func(b *testing.B) {
		at := rng.Int64N(256) * 4096
		if _, err := d.WriteAt(buf[at:at+4096], rng.Int64N(bigBlocks)*4096); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("write", func(b *testing.B) {
		for range b.N {
			write(b)
		}
		rss(b)
	})
	b.Run("snapshot", func(b *testing.B) { benchSnapshots(b, s, write); rss(b) })
}

// benchSnapshots takes a snapshot and clones it, every 10 ms, while somebody writes, and measures what a small
// fdatasync of another file takes at the same time.
func benchSnapshots(b *testing.B, s *Store, write func(*testing.B)) {
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writes := 0
	writer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				write(b)
				writes++
			}
		}
	})
	f, err := os.Create(*bigDir + ".sync")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = errors.Join(f.Close(), os.Remove(f.Name())) }()
	var snap, clone, disk []time.Duration
	run := time.Now().UnixNano()
	for i := range b.N {
		name := Ref{"v", fmt.Sprintf("s%d-%d", run, i)}
		t0 := time.Now()
		err := s.Snapshot(name)
		t1 := time.Now()
		if err == nil {
			err = s.Clone(name, fmt.Sprintf("c%d-%d", run, i))
		}
		t2 := time.Now()
		if err != nil {
			b.Error(err)
			break
		}
		_, err = f.WriteAt(make([]byte, 4096), int64(i)*4096)
		if err = errors.Join(err, unix.Fdatasync(int(f.Fd()))); err != nil {
			b.Error(err)
			break
		}
		snap, clone, disk = append(snap, t1.Sub(t0)), append(clone, t2.Sub(t1)), append(disk, time.Since(t2))
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	writer.Wait()
	for name, ts := range map[string][]time.Duration{"snap": snap, "clone": clone, "fdatasync": disk} {
		slices.Sort(ts)
		b.ReportMetric(float64(ts[len(ts)/2].Microseconds()), name+"-p50-µs")
		b.ReportMetric(float64(ts[len(ts)*99/100].Microseconds()), name+"-p99-µs")
	}
	b.ReportMetric(float64(writes)/b.Elapsed().Seconds(), "writes/s")
}
