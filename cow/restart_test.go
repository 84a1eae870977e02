package cow

import (
	"bytes"
	"errors"
	"flag"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
	"github.com/vdisk/vdisk/metadata"
)

var (
	restartLog    = flag.Float64("restart.log", 0.125, "GiB of log behind the last checkpoint in BenchmarkRestart")
	restartVolume = flag.Int64("restart.volume", 16, "GiB of the volume in BenchmarkRestart")
	restartBlocks = flag.Float64("restart.blocks", 1, "million mapped blocks in the tables of BenchmarkRestart and BenchmarkOpen")
	restartDir    = flag.String("restart.dir", "", "directory for their stores; default a temporary one")
)

// bigStore makes a store with a volume whose table maps so many million blocks, each to a place of its own.
func bigStore(b *testing.B, size int64) (dir string) {
	parent := *restartDir
	if parent == "" {
		parent = b.TempDir()
	}
	parent, err := os.MkdirTemp(parent, "restart")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(parent) })
	dir = filepath.Join(parent, "store")
	if err := Create(dir); err != nil {
		b.Fatal(err)
	}
	s, err := Open(dir, Options{checkpointInterval: -1})
	if err != nil {
		b.Fatal(err)
	}
	_, err = s.CreateVolume("v", VolumeOptions{Size: size, Codec: format.S2})
	if err := errors.Join(err, s.Close()); err != nil {
		b.Fatal(err)
	}
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{})
	if err != nil {
		b.Fatal(err)
	}
	leaves := uint32(*restartBlocks * 1e6 / format.LeafBlocks)
	rng := rand.New(rand.NewPCG(1, 1))
	for from := uint32(0); from < leaves; from += 20000 {
		err := db.Update(func(tx *metadata.Tx) error {
			tb, err := tx.Load()
			for i := from; i < min(leaves, from+20000) && err == nil; i++ {
				var l format.Leaf
				for j := range l.Entries {
					l.Entries[j] = format.MakeEntry(1000+rng.Uint32N(1000), 4096+16*rng.Uint32N(1<<21), 2112, 1, 0)
					l.SetChanged(j)
				}
				err = tx.PutLeaf(metadata.Version{Branch: tb.Branches[0].ID, Leaf: i, Epoch: 1}, format.AppendLeaf(nil, &l))
			}
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
	return dir
}

// BenchmarkOpen opens a store that was closed: in the same boot, and (but for the page cache) in another.
func BenchmarkOpen(b *testing.B) {
	dir := bigStore(b, 1<<40)
	for _, boot := range []string{"same", "other"} {
		b.Run(boot+"Boot", func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				if boot == "other" {
					if err := os.Remove(filepath.Join(dir, tableFile+metadata.VerifiedSuffix)); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
				s, err := Open(dir, Options{checkpointInterval: -1})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkRestart opens a store whose owner was killed, with a log of random half-compressible 4 KiB writes behind its
// last checkpoint.
func BenchmarkRestart(b *testing.B) {
	size := *restartVolume << 30
	dir := bigStore(b, size)
	o := Options{checkpointInterval: -1, CacheBytes: 2 << 30, Outlive: true, Logger: slog.New(slog.DiscardHandler)}
	s, err := Open(dir, o)
	if err != nil {
		b.Fatal(err)
	}
	writeLog(b, s, size, uint64(*restartLog*(1<<30)))
	s.abandon(b)
	var r Recovery
	var cpu time.Duration
	for b.Loop() {
		before := cpuTime()
		if s, err = Open(dir, o); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		cpu += cpuTime() - before
		r = s.Recovery()
		s.abandon(b)
		b.StartTimer()
	}
	b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
	b.ReportMetric(float64(r.Records), "records")
	b.ReportMetric(float64(r.Bytes), "log-bytes")
	b.ReportMetric(float64(r.Summaries), "summaries")
}

// cpuTime is what the process has had so far: on a busy machine it says more than the clock.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// writeLog writes until the log has grown by n bytes.
func writeLog(b *testing.B, s *Store, size int64, n uint64) {
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		b.Fatal(err)
	}
	appended := func() uint64 { s.mu.Lock(); defer s.mu.Unlock(); return s.wal.Appended() }
	end := appended() + n
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			buf := make([]byte, 1<<20)
			workload.HalfCompressible(r, buf)
			for appended() < end {
				for range 1000 {
					at := r.Int64N(256) * 4096
					if _, err := d.WriteAt(buf[at:at+4096], r.Int64N(size/4096)*4096); err != nil {
						b.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

// What was allocated behind a log that ended without a Close is given back once nothing there can be part of it.
func TestAllocatedBehindTheEndIsGivenBack(t *testing.T) {
	dir := setup(t, 64<<20, format.Raw)
	o := Options{checkpointInterval: -1}
	data := randomBytes(64<<10, 1)
	for i := range int64(3) {
		s := open(t, dir, o)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		_, err = d.WriteAt(data, i<<20)
		must(t, errors.Join(err, d.Flush()))
		killStore(s)
	}
	s := open(t, dir, o)
	must(t, s.Checkpoint())
	var size int64
	for _, name := range chunkFiles(t, s.fs) {
		f, err := s.fs.Open(name)
		must(t, err)
		n, err := f.Size()
		must(t, errors.Join(err, f.Close()))
		size += n
	}
	if size > 1<<20 || size != s.used(true) {
		t.Errorf("%d bytes of log are in files of %d bytes, which are counted as %d", 3*len(data), size, s.used(true))
	}
	mustCheck(t, s)
	d, err := s.OpenDevice(Ref{Volume: "v"}, true)
	must(t, err)
	got := make([]byte, len(data))
	for i := range int64(3) {
		if _, err := d.ReadAt(got, i<<20); err != nil || !bytes.Equal(got, data) {
			t.Errorf("read %d: %v", i, err)
		}
	}
	must(t, errors.Join(d.Close(), s.Close()))
}
