package cow

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

// BenchmarkCold reads a volume in order and at random, in three states: filled in order, then overwritten at random,
// and then rewritten by a cold pass.
func BenchmarkCold(b *testing.B) {
	const size = 256 << 20
	d := benchDevice(b, format.S2, size)
	r := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 4<<20)
	workload.HalfCompressible(r, data)
	read := func(name string, n int, next func(i int) int64) {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			for i := range b.N {
				if _, err := d.ReadAt(buf, next(i)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	both := func(state string) {
		if err := d.s.Checkpoint(); err != nil {
			b.Fatal(err)
		}
		read(state+"/sequential", 1<<20, func(i int) int64 { return int64(i) << 20 % size })
		read(state+"/random", 4096, func(int) int64 { return r.Int64N(size/4096) * 4096 })
		b.Logf("%s: %d MiB live", state, d.s.Info().LiveBytes>>20)
	}
	write := func(n int, off int64) {
		at := r.IntN((len(data)-n)/4096+1) * 4096
		if _, err := d.WriteAt(data[at:at+n], off); err != nil {
			b.Fatal(err)
		}
	}
	for off := int64(0); off < size; off += 1 << 20 {
		write(1<<20, off)
	}
	both("filled")
	for _, block := range r.Perm(size / 4096) {
		write(4096, int64(block)*4096)
	}
	both("overwritten")
	start := time.Now()
	rep, err := d.s.Cold(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("the pass took %v: %+v", time.Since(start).Round(time.Millisecond), rep)
	both("cold")
}
