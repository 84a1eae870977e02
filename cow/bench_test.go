package cow

import (
	"math/rand/v2"
	"testing"

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
}
