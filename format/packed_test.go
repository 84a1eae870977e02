package format

import (
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// sequentialLeaf returns the leaf that one writer of whole units of n blocks makes. The units compress to any length.
func sequentialLeaf(rng *rand.Rand, n int) *Leaf { return evenLeaf(rng, n, maxShare) }

// evenLeaf returns a leaf like that of sequentialLeaf, but the shares of its units differ by less than spread.
func evenLeaf(rng *rand.Rand, n, spread int) *Leaf {
	l := new(Leaf)
	off := uint32(ChunkHeaderSize)
	for i := 0; i < LeafBlocks; i += n {
		size := (3 + rng.IntN(min(spread, maxShare-2))) * RecordAlign * n
		for size > MaxDataRecord {
			size -= RecordAlign * n
		}
		e := MakeEntry(77, off, size, n, 0)
		for j := range n {
			l.Entries[i+j] = e.WithIndex(j)
			l.SetChanged(i + j)
		}
		off += uint32(size)
	}
	return l
}

// drawPackable draws leaves of the shapes that have a packed form of their own, and of shapes that nearly have.
func drawPackable(t *rapid.T) *Leaf {
	rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	var l *Leaf
	switch rapid.IntRange(0, 3).Draw(t, "shape") {
	case 0:
		l = drawLeaf(t)
	case 1:
		l = randomLeaf(rng, rapid.SampledFrom([]int{1, 1 << 16, 1<<16 + 1, 1 << 24}).Draw(t, "slots"))
	default:
		l = evenLeaf(rng, 1<<rapid.IntRange(0, 4).Draw(t, "log"), rapid.SampledFrom([]int{1, 2, 3, 5, 17, maxShare}).Draw(t, "spread"))
	}
	for range rapid.IntRange(0, 20).Draw(t, "edits") {
		i := rng.IntN(LeafBlocks)
		e := drawEntry(t)
		if rng.IntN(2) == 0 {
			e = 0
		}
		for j := range min(1+rng.IntN(16), LeafBlocks-i) {
			if e != 0 && j+e.Index() < e.Blocks() {
				l.Entries[i+j] = e.WithIndex(e.Index() + j)
			} else {
				l.Entries[i+j] = 0
			}
		}
	}
	switch rapid.IntRange(0, 2).Draw(t, "changed") {
	case 0:
		l.Changed = [4]uint64{}
	case 1:
		l.Changed = [4]uint64{}
		for i, e := range l.Entries {
			if e != 0 {
				l.SetChanged(i)
			}
		}
	}
	return l
}

func TestPackedRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		checkPacked(t, drawPackable(t))
	})
}

// TestPackedSize holds packed leaves to the sizes that docs/memory.md, Leaves, promises.
func TestPackedSize(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	wide := sequentialLeaf(rng, 16)
	wide.Entries[0] = 0 // not a sequence any more
	for _, c := range []struct {
		what string
		leaf *Leaf
		most int // words
	}{
		{"holes", new(Leaf), 2},
		{"sequential units of 16", evenLeaf(rng, 16, 250), 3},
		{"sequential units of 4, alike to 60 bytes", evenLeaf(rng, 4, 4), 3},
		{"sequential units of 4", evenLeaf(rng, 4, 250), 9},
		{"sequential blocks", evenLeaf(rng, 1, 250), 1 + 32},
		{"units of 16", wide, 6 + 2 + 15},
		{"random blocks, 4 TiB of log", randomLeaf(rng, 1<<16), 2 + 16*12},
		{"random blocks, 1 PiB of log", randomLeaf(rng, 1<<24), 2 + 256},
	} {
		if n := len(AppendPacked(nil, c.leaf)); n > c.most {
			t.Errorf("%s: %d words, more than %d", c.what, n, c.most)
		}
	}
}

func BenchmarkPacked(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 1))
	sparse := new(Leaf)
	for i := 0; i < LeafBlocks; i += 4 {
		sparse.Entries[i] = randomLeaf(rng, 100).Entries[i]
	}
	for _, c := range []struct {
		what string
		leaf *Leaf
	}{
		{"random", randomLeaf(rng, 1<<12)},
		{"sparse", sparse},
		{"sequence16", sequentialLeaf(rng, 16)},
		{"sequence1", sequentialLeaf(rng, 1)},
	} {
		p := AppendPacked(nil, c.leaf)
		var order [1024]uint8
		for i := range order {
			order[i] = uint8(rng.Uint32())
		}
		b.Run(c.what+"/get", func(b *testing.B) {
			var sum Entry
			for i := range b.N {
				sum += p.Entry(int(order[i%1024]))
			}
			if sum == 1 {
				b.Log(sum)
			}
		})
		b.Run(c.what+"/pack", func(b *testing.B) {
			buf := make([]uint64, 0, MaxPacked)
			for b.Loop() {
				AppendPacked(buf, c.leaf)
			}
		})
		b.Run(c.what+"/unpack", func(b *testing.B) {
			var l Leaf
			for b.Loop() {
				p.Unpack(&l)
			}
			b.ReportMetric(float64(8*len(p)), "bytes")
		})
	}
}
