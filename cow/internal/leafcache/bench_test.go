package leafcache

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"golang.org/x/sys/unix"
)

// testLeaf fills l as one writer of units of so many blocks makes it, or with 0 as random writes do.
func testLeaf(rng *rand.Rand, blocks int, l *format.Leaf) {
	off, size := uint32(format.ChunkHeaderSize), 0
	for i := 0; i < format.LeafBlocks; i += max(blocks, 1) {
		n := max(blocks, 1)
		size = (100 + rng.IntN(60)) * format.RecordAlign * n
		slot := uint32(5)
		if blocks == 0 {
			slot, off = uint32(rng.IntN(2048)), format.ChunkHeaderSize+uint32(rng.IntN(4_000_000))*format.RecordAlign
		}
		for j := range n {
			l.Entries[i+j] = format.MakeEntry(slot, off, size, n, j)
		}
		off += uint32(size)
	}
	l.Changed = [4]uint64{^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0)}
}

// leafKinds are the leaves whose memory and speed are measured: name and blocks of a unit.
var leafKinds = []struct {
	name   string
	blocks int
}{{"random", 0}, {"sequential4K", 1}, {"sequential16K", 4}, {"sequential64K", 16}}

// BenchmarkMap measures the cache of leaves when it has what is looked for: ns a get and a set, and the memory that it
// takes a TiB that is mapped.
func BenchmarkMap(b *testing.B) {
	for _, kind := range leafKinds {
		const leaves = 16 << 10
		br := &Branch{ID: 7}
		rng := rand.New(rand.NewPCG(1, 2))
		c, err := New(256<<20, func(_ Key, l *format.Leaf) (uint32, error) {
			testLeaf(rng, kind.blocks, l)
			return 1, nil
		})
		if err != nil {
			b.Fatal(err)
		}
		for i := range uint32(leaves) {
			if err := c.Ensure(Key{br, i, Head}); err != nil {
				b.Fatal(err)
			}
		}
		var order [4096]uint32
		for i := range order {
			order[i] = rng.Uint32N(leaves * format.LeafBlocks)
		}
		b.Run(kind.name+"/get", func(b *testing.B) {
			defer reportCPU(b)()
			var sum format.Entry
			for i := range b.N {
				at := order[i%len(order)]
				_ = c.View(Key{br, at / format.LeafBlocks, Head}, func(lf *Leaf) { sum += lf.Entry(int(at % format.LeafBlocks)) })
			}
			b.ReportMetric(float64(c.Used())/leaves, "MiB/TiB") // bytes a leaf are MiB a TiB
		})
		b.Run(kind.name+"/set", func(b *testing.B) {
			defer reportCPU(b)()
			var dead format.Entry
			for n := range b.N {
				at := order[n%len(order)]
				k := Key{br, at / format.LeafBlocks, Head}
				l := c.Lock(k)
				if l.Leaf() == nil {
					b.Fatal("evicted")
				}
				content, err := l.MakeWritable(1)
				if err != nil {
					b.Fatal(err)
				}
				i := int(at % format.LeafBlocks)
				if content.IsChanged(i) { // as the store does it
					dead += content.Entries[i]
				} else {
					content.SetChanged(i)
				}
				content.Entries[i] = 0
				l.Unlock()
			}
		})
		if err := c.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

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
