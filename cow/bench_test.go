package cow

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// halfCompressible fills p so that each 4 KiB block compresses to about a half, as fio's
// buffer_compress_percentage=50 does.
func halfCompressible(r *rand.Rand, p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		var x uint64
		if i%4096 < 2048 {
			x = r.Uint64()
		}
		for j := range 8 {
			p[i+j] = byte(x >> (8 * j))
		}
	}
}

func benchDevice(b *testing.B, codec format.Codec, size int64) *Device {
	s, _ := newStore(b, Options{})
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

func BenchmarkRandomWrite4K(b *testing.B) {
	for _, codec := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		b.Run(codec.String(), func(b *testing.B) {
			const size = 1 << 30
			d := benchDevice(b, codec, size)
			r := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 1<<20)
			halfCompressible(r, buf)
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				at := r.Int64N(256) * 4096
				if _, err := d.WriteAt(buf[at:at+4096], r.Int64N(size/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRandomRead4K(b *testing.B) {
	for _, fill := range []int{4096, 1 << 20} {
		b.Run(map[int]string{4096: "written4K", 1 << 20: "written1M"}[fill], func(b *testing.B) {
			const size = 256 << 20
			d := benchDevice(b, format.S2, size)
			r := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 1<<20)
			halfCompressible(r, buf)
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
	halfCompressible(rand.New(rand.NewPCG(1, 2)), buf)
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
	b.ReportMetric(d.s.cache.perLeaf(min(b.N, 1024)), "map-MiB/TiB")
}

// BenchmarkSnapshot takes snapshots, and clones of them, of a volume with 1 GiB of
// random 4 KiB writes that goes on being written, at two depths.
func BenchmarkSnapshot(b *testing.B) {
	for _, depth := range []int{0, 100} {
		b.Run(fmt.Sprintf("depth%d", depth), func(b *testing.B) {
			d := benchDevice(b, format.S2, 1<<30)
			r := rand.New(rand.NewPCG(1, 2))
			buf := make([]byte, 1<<20)
			halfCompressible(r, buf)
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
