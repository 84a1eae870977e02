package cow

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/workload"
)

// How the data lies that BenchmarkRead reads.
const (
	filled    = "filled"    // written in order, 1 MiB at a time
	scattered = "scattered" // then overwritten at random, 4 KiB at a time
)

// contents are what the data is like.
var contents = map[string]func(p []byte, r *rand.Rand){
	"half": func(p []byte, r *rand.Rand) { workload.HalfCompressible(r, p) },
	"raw":  noise,
}

// BenchmarkRead reads at random (rand) or in order (seq), from the page cache.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	for _, content := range []string{"half", "raw"} {
		for _, layout := range []string{filled, scattered} {
			b.Run(content+"/"+layout, func(b *testing.B) {
				d := benchDevice(b, format.S2, size)
				r := rand.New(rand.NewPCG(1, 2))
				buf := make([]byte, 1<<20)
				contents[content](buf, r)
				write := func(p []byte, off int64) {
					if _, err := d.WriteAt(p, off); err != nil {
						b.Fatal(err)
					}
				}
				for off := int64(0); off < size; off += 1 << 20 {
					write(buf, off)
				}
				if layout == scattered {
					for _, i := range r.Perm(size / 4096) {
						write(buf[i%256*4096:][:4096], int64(i)*4096)
					}
				}
				if err := d.Flush(); err != nil {
					b.Fatal(err)
				}
				for _, n := range []int64{4 << 10, 16 << 10, 1 << 20} {
					for _, order := range []string{"rand", "seq"} {
						if n == 1<<20 && order == "rand" {
							continue
						}
						b.Run(fmt.Sprintf("%s%dK", order, n>>10), func(b *testing.B) {
							b.SetBytes(n)
							b.ReportAllocs()
							cpu := cpuTime()
							for i := range b.N {
								at := int64(i) % (size / n) * n
								if order == "rand" {
									at = r.Int64N(size/n) * n
								}
								if _, err := d.ReadAt(buf[:n], at); err != nil {
									b.Fatal(err)
								}
							}
							b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
						})
					}
				}
			})
		}
	}
}

// waitingFS is a disk each of whose reads takes a system call of 100 µs.
type waitingFS struct{ storage.FS }

type waitingFile struct{ storage.File }

func (fs waitingFS) Create(name string, size int64) (storage.File, error) {
	f, err := fs.FS.Create(name, size)
	return waitingFile{f}, err
}

func (fs waitingFS) Open(name string) (storage.File, error) {
	f, err := fs.FS.Open(name)
	return waitingFile{f}, err
}

func (f waitingFile) ReadAt(p []byte, off int64) (int, error) {
	_ = unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil)
	return f.File.ReadAt(p, off)
}

func (f waitingFile) TryReadAt(p []byte, off int64) bool { return false }

// BenchmarkReadAmongWriters is the latency of a reader at depth 1 while writers press as fast as they can: from the
// page cache, and where each read waits 100 µs for the disk.
func BenchmarkReadAmongWriters(b *testing.B) {
	for _, disk := range []string{"cached", "disk"} {
		for _, writers := range []int{0, 1, 4} {
			b.Run(fmt.Sprintf("%s/writers%d", disk, writers), func(b *testing.B) { readAmongWriters(b, disk == "disk", writers) })
		}
	}
}

func readAmongWriters(b *testing.B, slow bool, writers int) {
	const size = 64 << 20
	o := Options{}
	if slow {
		dir, err := storage.OpenDir(b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		o.fs = waitingFS{dir}
	}
	d := benchDeviceOf(b, o, format.S2, 2*size)
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(r, buf)
	for off := int64(0); off < 2*size; off += 1 << 20 {
		if _, err := d.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	var stop atomic.Bool
	var written atomic.Int64
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(i)))
			for !stop.Load() {
				if _, err := d.WriteAt(buf[r.Int64N(256)*4096:][:4096], size+r.Int64N(size/4096)*4096); err != nil {
					b.Error(err)
					return
				}
				written.Add(1)
			}
		})
	}
	p := make([]byte, 4096)
	var took []time.Duration
	b.ResetTimer()
	for range b.N {
		began := time.Now()
		if _, err := d.ReadAt(p, r.Int64N(size/4096)*4096); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	b.StopTimer()
	stop.Store(true)
	wg.Wait()
	slices.Sort(took)
	n := len(took)
	for name, at := range map[string]int{"p50-µs": n / 2, "p99-µs": n * 99 / 100, "p99.9-µs": n * 999 / 1000, "max-µs": n - 1} {
		b.ReportMetric(float64(took[at].Nanoseconds())/1000, name)
	}
	b.ReportMetric(float64(written.Load())/b.Elapsed().Seconds(), "writes/s")
}
