package cow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

func benchDevice(b *testing.B, codec format.Codec, size int64) *Device {
	return benchDeviceOf(b, Options{}, codec, size)
}

func benchDeviceOf(b *testing.B, o Options, codec format.Codec, size int64) *Device {
	s, _ := newStore(b, o)
	if _, err := s.CreateVolume("v", VolumeOptions{Size: size, Codec: codec}); err != nil {
		b.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close(); s.Close() })
	return d
}

// BenchmarkRandomWrite4K writes to a volume from one goroutine, or two. An operation is one block, from either
// goroutine.
func BenchmarkRandomWrite4K(b *testing.B) {
	for _, codec := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		for _, writers := range []int{1, 2} {
			b.Run(fmt.Sprintf("codec=%v/writers=%d", codec, writers), func(b *testing.B) {
				const size = 1 << 30
				d := benchDevice(b, codec, size)
				buf := make([]byte, 1<<20)
				workload.HalfCompressible(rand.New(rand.NewPCG(1, 2)), buf)
				b.SetBytes(4096)
				b.ReportAllocs()
				b.ResetTimer()
				cpu := cpuTime()
				var wg sync.WaitGroup
				for w := range writers {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(1, uint64(w)))
						for range (b.N + w) / writers {
							at := r.Int64N(256) * 4096
							if _, err := d.WriteAt(buf[at:at+4096], r.Int64N(size/4096)*4096); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "blocks/s")
				b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

func BenchmarkRandomRead4K(b *testing.B) {
	for _, fill := range []int{4096, 1 << 20} {
		b.Run(map[int]string{4096: "written=4K", 1 << 20: "written=1M"}[fill], func(b *testing.B) {
			const size = 256 << 20
			d := benchDevice(b, format.S2, size)
			r := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 1<<20)
			workload.HalfCompressible(r, buf)
			for off := 0; off < size; off += fill {
				if _, err := d.WriteAt(buf[:fill], int64(off)); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if _, err := d.ReadAt(buf[:4096], r.Int64N(size/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFill1M(b *testing.B) {
	d := benchDevice(b, format.S2, 1<<30)
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(rand.New(rand.NewPCG(1, 2)), buf)
	b.SetBytes(1 << 20)
	for i := range b.N {
		if _, err := d.WriteAt(buf, int64(i%1024)<<20); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := d.s.Checkpoint(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(d.s.cache.Used())/float64(min(b.N, 1024)), "map-MiB/TiB")
}

// BenchmarkFlush4K flushes after each random write. It writes to the test's directory, so TMPDIR should be on a disk.
func BenchmarkFlush4K(b *testing.B) {
	const size = 512 << 20
	d := benchDevice(b, format.S2, size)
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(r, buf)
	b.ReportAllocs()
	for b.Loop() {
		at := r.Int64N(256) * 4096
		_, err := d.WriteAt(buf[at:at+4096], r.Int64N(size/4096)*4096)
		if err := errors.Join(err, d.Flush()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSnapshot takes snapshots of a volume, and clones of them, at two depths. The volume has 1 GiB of random 4
// KiB writes, and is written to between the snapshots.
func BenchmarkSnapshot(b *testing.B) {
	for _, depth := range []int{0, 100} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			d := benchDevice(b, format.S2, 1<<30)
			r := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 1<<20)
			workload.HalfCompressible(r, buf)
			write := func(n int) {
				for range n {
					at := r.Int64N(256) * 4096
					if _, err := d.WriteAt(buf[at:at+4096], r.Int64N(1<<18)*4096); err != nil {
						b.Fatal(err)
					}
				}
			}
			write(1 << 18)
			for i := range depth {
				write(100)
				if err := d.s.Snapshot(Ref{"v", fmt.Sprintf("deep%d", i)}); err != nil {
					b.Fatal(err)
				}
			}
			var snap, clone []time.Duration
			b.ResetTimer()
			for i := range b.N {
				write(1000)
				t0 := time.Now()
				name := Ref{"v", fmt.Sprintf("s%d", i)}
				if err := d.s.Snapshot(name); err != nil {
					b.Fatal(err)
				}
				t1 := time.Now()
				if err := d.s.Clone(name, fmt.Sprintf("c%d", i)); err != nil {
					b.Fatal(err)
				}
				snap, clone = append(snap, t1.Sub(t0)), append(clone, time.Since(t1))
			}
			for name, ts := range map[string][]time.Duration{"snap": snap, "clone": clone} {
				slices.Sort(ts)
				b.ReportMetric(float64(ts[len(ts)/2].Microseconds()), name+"-p50-µs")
				b.ReportMetric(float64(ts[len(ts)*99/100].Microseconds()), name+"-p99-µs")
			}
		})
	}
}

// BenchmarkUsage measures reporting the usage of 1000 snapshots, of all of them and of one. The volume has 1 GiB, and
// 500 blocks changed between any two snapshots.
func BenchmarkUsage(b *testing.B) {
	d := benchDevice(b, format.S2, 1<<30)
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(r, buf)
	for off := int64(0); off < 1<<30; off += 1 << 20 {
		if _, err := d.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	for i := range 1000 {
		for range 500 {
			if _, err := d.WriteAt(buf[:4096], r.Int64N(1<<18)*4096); err != nil {
				b.Fatal(err)
			}
		}
		if err := d.s.Snapshot(Ref{"v", fmt.Sprintf("s%d", i)}); err != nil {
			b.Fatal(err)
		}
	}
	if err := d.s.Checkpoint(); err != nil {
		b.Fatal(err)
	}
	for _, of := range []struct {
		name string
		refs []Ref
	}{{"all", nil}, {"one", []Ref{{"v", "s500"}}}} {
		b.Run("of="+of.name, func(b *testing.B) {
			for range b.N {
				if _, err := d.s.Usage(b.Context(), of.refs...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
