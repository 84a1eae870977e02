package cow

import (
	"math/rand/v2"
	"testing"

	"github.com/vdisk/vdisk/format"
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

// BenchmarkMap measures the cache of leaves when it has what is looked for: ns a get and a set, and the memory that
// it takes a TiB that is mapped.
func BenchmarkMap(b *testing.B) {
	for _, kind := range leafKinds {
		const leaves = 16 << 10
		br := &cachedBranch{ID: 7}
		rng := rand.New(rand.NewPCG(1, 2))
		c, err := newLeafCache(256<<20, func(_ leafKey, l *format.Leaf) (uint32, error) {
			testLeaf(rng, kind.blocks, l)
			return 1, nil
		})
		if err != nil {
			b.Fatal(err)
		}
		for i := range uint32(leaves) {
			if err := c.ensure(leafKey{br, i, head}); err != nil {
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
				_ = c.view(leafKey{br, at / format.LeafBlocks, head}, func(lf *leaf) { sum += lf.entry(int(at % format.LeafBlocks)) })
			}
			b.ReportMetric(float64(c.Used())/leaves, "MiB/TiB") // bytes a leaf are MiB a TiB
		})
		b.Run(kind.name+"/set", func(b *testing.B) {
			defer reportCPU(b)()
			for i := range b.N {
				at := order[i%len(order)]
				k := leafKey{br, at / format.LeafBlocks, head}
				l := c.lock(k)
				if l.Leaf() == nil {
					b.Fatal("evicted")
				}
				content, err := l.makeWritable(1)
				if err != nil {
					b.Fatal(err)
				}
				content.SetChanged(int(at % format.LeafBlocks))
				content.Entries[at%format.LeafBlocks] = 0
				l.unlock()
			}
		})
		if err := c.close(); err != nil {
			b.Fatal(err)
		}
	}
}
