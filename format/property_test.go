package format

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/klauspost/compress/s2"
	"pgregory.net/rapid"
)

func drawEntry(t *rapid.T) Entry {
	blocks := rapid.IntRange(1, UnitBlocks).Draw(t, "blocks")
	most := recordSize(blocks*BlockSize, blocks) / (blocks * RecordAlign)
	least := recordSize(1, blocks) / (blocks * RecordAlign)
	size := rapid.IntRange(least, most).Draw(t, "share") * blocks * RecordAlign
	offset := rapid.IntRange(ChunkHeaderSize/RecordAlign, (MaxChunkSize-size)/RecordAlign).Draw(t, "offset")
	slot := rapid.Uint32Range(0, MaxSlots-1).Draw(t, "slot")
	return MakeEntry(slot, uint32(offset*RecordAlign), size, blocks, rapid.IntRange(0, blocks-1).Draw(t, "index"))
}

func TestEntryProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := drawEntry(t)
		again := MakeEntry(e.Slot(), e.Offset(), e.Size(), e.Blocks(), e.Index())
		if !e.Valid() || e.IsHole() || again != e || int(e.Share())*e.Blocks() != e.Size() {
			t.Fatal(e, again)
		}
		i := rapid.IntRange(0, e.Blocks()-1).Draw(t, "i")
		if o := e.WithIndex(i); o.Index() != i || !o.SameRecord(e) || o.WithIndex(e.Index()) != e {
			t.Fatal(e, o)
		}
		if o := drawEntry(t); o.SameRecord(e) != (o.Slot() == e.Slot() && o.Offset() == e.Offset() && o.Size() == e.Size() && o.Blocks() == e.Blocks()) {
			t.Fatal(e, o)
		}
	})
}

func TestImpossibleEntriesAreInvalid(t *testing.T) {
	for i, e := range []Entry{
		MakeEntry(MaxSlots, 4096, 48, 1, 0), MakeEntry(0, 4097, 48, 1, 0), MakeEntry(0, 0, 48, 1, 0),
		MakeEntry(0, MaxChunkSize, 48, 1, 0), MakeEntry(0, MaxChunkSize-32, 48, 1, 0),
		MakeEntry(0, 4096, 32, 1, 0), MakeEntry(0, 4096, 0, 1, 0), MakeEntry(0, 4096, -48, 1, 0), MakeEntry(0, 4096, 49, 1, 0),
		MakeEntry(0, 4096, 4160, 1, 0), MakeEntry(0, 4096, MaxDataRecord+256, 16, 0), MakeEntry(0, 4096, 48, 2, 0),
		MakeEntry(0, 4096, 64, 0, 0), MakeEntry(0, 4096, 17*16, 17, 0), MakeEntry(0, 4096, 64, 2, 2), MakeEntry(0, 4096, 64, 2, -1),
		1, entrySet, MakeEntry(1, 4096, 48, 1, 0) &^ entrySet, MakeEntry(1, 4096, 64, 2, 0).WithIndex(2),
	} {
		if e.Valid() {
			t.Error(i, e)
		}
	}
}

func TestRecordRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blocks := rapid.IntRange(1, UnitBlocks).Draw(t, "blocks")
		h := RecordHeader{
			Seq:        rapid.Uint64Min(1).Draw(t, "seq"),
			Block:      rapid.Uint64Range(0, MaxBlocks/UnitBlocks-1).Draw(t, "unit")*UnitBlocks + uint64(UnitBlocks-blocks),
			Branch:     rapid.Uint32Min(1).Draw(t, "branch"),
			Kind:       KindData,
			Codec:      rapid.SampledFrom([]Codec{S2, Zstd}).Draw(t, "codec"),
			Blocks:     blocks,
			PayloadLen: rapid.IntRange(1, blocks*BlockSize).Draw(t, "length"),
			PayloadCRC: rapid.Uint32().Draw(t, "crc"),
		}
		chunk := rapid.Uint64().Draw(t, "chunk")
		offset := rapid.Uint32Range(ChunkHeaderSize/RecordAlign, uint32(MaxChunkSize-h.Size())/RecordAlign).Draw(t, "offset") * RecordAlign
		b := make([]byte, RecordHeaderSize)
		h.Encode(b, chunk, offset)
		if got, err := DecodeRecordHeader(b, chunk, offset); err != nil || got != h {
			t.Fatal(got, err)
		}
		if h.Size()%(RecordAlign*blocks) != 0 || h.Size() > MaxDataRecord || !MakeEntry(1, offset, h.Size(), blocks, 0).Valid() {
			t.Fatal(h.Size())
		}
		// The salt is as docs/format.md describes: the place comes before the header.
		place := le.AppendUint32(le.AppendUint64(nil, chunk), offset)
		if want := Checksum(append(place, b[4:]...)); le.Uint32(b) != want {
			t.Fatalf("checksum %08x, want %08x", le.Uint32(b), want)
		}
	})
}

// drawLeaf draws leaves of all shapes that writes make: units, parts of units, neighbours in the log, single blocks,
// holes.
func drawLeaf(t *rapid.T) *Leaf {
	l := new(Leaf)
	for i := 0; i < LeafBlocks; {
		e := drawEntry(t)
		n := min(rapid.IntRange(1, 80).Draw(t, "run"), LeafBlocks-i)
		run := l.Entries[i : i+n]
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 1:
			n = min(n, e.Blocks()-e.Index())
			for j := range n {
				run[j] = e.WithIndex(e.Index() + j)
			}
		case 2:
			e = MakeEntry(e.Slot(), e.Offset(), 48, 1, 0)
			for j := range run {
				run[j] = MakeEntry(e.Slot(), e.Offset()+uint32(j)*48, 48, 1, 0)
				if !run[j].Valid() {
					run[j] = 0
				}
			}
		case 3:
			n = 1
			run[0] = e
		}
		i += n
	}
	for i := range l.Changed {
		l.Changed[i] = rapid.Uint64().Draw(t, "changed")
	}
	return l
}

func TestLeafRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := drawLeaf(t)
		b := AppendLeaf([]byte("before"), l)
		var got Leaf
		got.Entries[0], got.Changed[0] = 1, 1 // nothing of the old content may be left
		if err := DecodeLeaf(b[6:], &got); err != nil || got != *l {
			t.Fatal(err)
		}
		if len(b)-6 > MaxLeafSize {
			t.Fatal(len(b))
		}
	})
}

func TestChangedBits(t *testing.T) {
	l := new(Leaf)
	for i := range LeafBlocks {
		l.SetChanged(i)
		for j := range LeafBlocks {
			if l.IsChanged(j) != (j <= i) {
				t.Fatal(i, j)
			}
		}
	}
}

// randomLeaf returns the leaf that random writes of single blocks make. Its entries are unrelated.
func randomLeaf(rng *rand.Rand, slots int) *Leaf {
	l := new(Leaf)
	for i := range l.Entries {
		size := minRecord + rng.IntN(maxShare-2)*RecordAlign
		offset := (ChunkHeaderSize + rng.IntN(MaxChunkSize-ChunkHeaderSize-size)) &^ (RecordAlign - 1)
		l.Entries[i] = MakeEntry(uint32(rng.IntN(slots)), uint32(offset), size, 1, 0)
		l.SetChanged(i)
	}
	return l
}

// TestLeafSize holds the encoding to the sizes that docs/format.md promises.
func TestLeafSize(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	most := 0
	for range 200 {
		most = max(most, len(AppendLeaf(nil, randomLeaf(rng, 1<<20))))
	}
	t.Log("random single blocks:", most)
	// Two of these fit in a page of bbolt, with their keys and their headers.
	if most > 1950 {
		t.Errorf("%d bytes for random single blocks", most)
	}
	extreme := new(Leaf) // the first and the last slot in turn
	fragments := new(Leaf)
	log := new(Leaf)
	units := new(Leaf)
	for i := range LeafBlocks {
		slot := uint32(i%2) * (MaxSlots - 1)
		extreme.Entries[i] = MakeEntry(slot, ChunkHeaderSize, 48, 1, 0)
		fragments.Entries[i] = MakeEntry(slot, ChunkHeaderSize, 64, 2, 0)
		log.Entries[i] = MakeEntry(MaxSlots-1, ChunkHeaderSize+uint32(i)*4128, 4128, 1, 0)
		units.Entries[i] = MakeEntry(1, ChunkHeaderSize+uint32(i/16)*8192, 8192, 16, i%16)
	}
	for _, c := range []struct {
		name string
		leaf *Leaf
		most int
	}{
		{"holes", new(Leaf), 42},
		{"written in order, raw", log, 50},
		{"written in order, units", units, 40 + 16*7},
		{"single blocks, far apart", extreme, 40 + 2 + 256*8},
		{"a block of each of 256 units, far apart", fragments, MaxLeafSize},
	} {
		n := len(AppendLeaf(nil, c.leaf))
		t.Log(c.name+":", n)
		if n > c.most {
			t.Errorf("%s: %d bytes, the most is %d", c.name, n, c.most)
		}
	}
}

func TestCompressRoundTrip(t *testing.T) {
	if n := s2.MaxEncodedLen(UnitSize); n > MaxCompressed {
		t.Fatal("s2 needs", n)
	}
	rng := rand.New(rand.NewPCG(3, 3))
	for _, c := range []Codec{Raw, S2, Zstd} {
		for _, level := range []int{0, 1, 3, 6, 19} {
			if c != Zstd && level != 0 {
				if _, err := NewCompressor(c, level); !errors.Is(err, ErrCodec) {
					t.Error(c, level, err)
				}
				continue
			}
			comp, err := NewCompressor(c, level)
			must(t, err)
			buf := make([]byte, 0, MaxCompressed)
			used := map[Codec]bool{}
			for range 60 {
				src := mixed(rng, 1+rng.IntN(UnitBlocks))
				if rng.IntN(2) == 0 {
					clear(src[1+rng.IntN(len(src)-1):]) // zeros at the end are left out
				}
				kept := slices.Clone(src)
				out, codec := comp.Compress(buf, src)
				used[codec] = true
				switch {
				case codec == Raw && &out[0] != &src[0], codec != Raw && &out[0] != &buf[:1][0]:
					t.Fatal(c, "the result is elsewhere")
				case codec != Raw && recordSize(len(out), len(src)/BlockSize) >= recordSize(len(src), len(src)/BlockSize):
					t.Fatal(c, len(out), "bytes for", len(src))
				}
				roomy := make([]byte, len(src)+100)
				dst := roomy[:len(src)]
				copy(dst, bytes.Repeat([]byte{0xff}, len(dst)))
				must(t, Decompress(codec, dst, out))
				if !bytes.Equal(dst, kept) || !IsZero(roomy[len(src):]) {
					t.Fatal(c, level, len(src))
				}
				short := roomy[:contentLen(src)]
				if codec == Raw {
					short = dst
				}
				for _, wrong := range [][]byte{short[:len(short)-1], nil} {
					if err := Decompress(codec, wrong, out); !errors.Is(err, ErrCorrupt) {
						t.Fatal(c, len(wrong), err)
					}
				}
			}
			if !used[c] || !used[Raw] {
				t.Error(c, level, "used", used)
			}
		}
	}
	if err := Decompress(7, nil, nil); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	for _, c := range []struct {
		codec Codec
		level int
	}{{3, 0}, {Zstd, 20}, {Zstd, -1}, {S2, 1}, {Raw, 1}} {
		if _, err := NewCompressor(c.codec, c.level); !errors.Is(err, ErrCodec) {
			t.Error(c, err)
		}
	}
}

// TestDecompressionBomb decompresses a few bytes that claim to hold, or do hold, far more than a unit.
func TestDecompressionBomb(t *testing.T) {
	dst := make([]byte, UnitSize)
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0}
	comp, err := NewCompressor(Zstd, 0)
	must(t, err)
	bomb := comp.zstd.EncodeAll(make([]byte, 64<<20), nil)
	frames := bytes.Repeat(comp.zstd.EncodeAll(make([]byte, UnitSize), nil), 2)
	allocated := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			for _, err := range []error{Decompress(S2, dst, huge), Decompress(Zstd, dst, bomb), Decompress(Zstd, dst, frames)} {
				if !errors.Is(err, ErrCorrupt) {
					b.Fatal(err)
				}
			}
		}
	}).AllocedBytesPerOp()
	if allocated > 64<<10 {
		t.Error(allocated, "bytes allocated")
	}
}
