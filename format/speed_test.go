package format

import (
	"math/rand/v2"
	"testing"
)

// halfBlock returns a unit that compresses to about half of its size.
func halfBlock(blocks int) []byte {
	rng := rand.New(rand.NewPCG(9, 9))
	p := make([]byte, blocks*BlockSize)
	for i := range p {
		if i/64%2 == 0 {
			p[i] = byte(rng.Uint32())
		}
	}
	return p
}

// TestHotPathsDoNotAllocate covers the code that runs for each block that is written or read.
func TestHotPathsDoNotAllocate(t *testing.T) {
	src, dst := halfBlock(1), make([]byte, BlockSize)
	comp, err := NewCompressor(S2, 0)
	must(t, err)
	zcomp, err := NewCompressor(Zstd, 0)
	must(t, err)
	buf, zbuf := make([]byte, 0, MaxCompressed), make([]byte, 0, MaxCompressed)
	out, codec := comp.Compress(buf, src)
	zout, zcodec := zcomp.Compress(zbuf, src)
	if codec != S2 || zcodec != Zstd {
		t.Fatal(codec, zcodec)
	}
	rec := make([]byte, RecordHeaderSize)
	leaf := randomLeaf(rand.New(rand.NewPCG(1, 1)), 1<<20)
	enc := AppendLeaf(nil, leaf)
	for name, fn := range map[string]func(){
		"record": func() {
			h := RecordHeader{Seq: 9, Block: 3, Branch: 1, Kind: KindData, Codec: codec, Blocks: 1, PayloadLen: len(out), PayloadCRC: Checksum(out)}
			h.Encode(rec, 5, 8192)
			got, err := DecodeRecordHeader(rec, 5, 8192)
			if err != nil || got != h || got.VerifyPayload(out) != nil {
				t.Error(err)
			}
		},
		"s2 compress":     func() { comp.Compress(buf, src) },
		"s2 decompress":   func() { _ = Decompress(S2, dst, out) },
		"zstd compress":   func() { zcomp.Compress(zbuf, src) },
		"zstd decompress": func() { _ = Decompress(Zstd, dst, zout) },
		"leaf encode":     func() { enc = AppendLeaf(enc[:0], leaf) },
		"leaf decode":     func() { _ = DecodeLeaf(enc, leaf) },
		"is zero":         func() { IsZero(dst) },
	} {
		if n := testing.AllocsPerRun(200, fn); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkCompress(b *testing.B) {
	for _, c := range []Codec{S2, Zstd} {
		for name, blocks := range map[string]int{"4K": 1, "64K": UnitBlocks} {
			b.Run(c.String()+"/"+name, func(b *testing.B) {
				comp, err := NewCompressor(c, 0)
				must(b, err)
				src, buf := halfBlock(blocks), make([]byte, 0, MaxCompressed)
				b.SetBytes(int64(len(src)))
				b.ReportAllocs()
				for b.Loop() {
					comp.Compress(buf, src)
				}
			})
		}
	}
}

func BenchmarkDecompress(b *testing.B) {
	for _, c := range []Codec{S2, Zstd} {
		b.Run(c.String()+"/4K", func(b *testing.B) {
			comp, err := NewCompressor(c, 0)
			must(b, err)
			out, _ := comp.Compress(nil, halfBlock(1))
			dst := make([]byte, BlockSize)
			b.SetBytes(BlockSize)
			b.ReportAllocs()
			for b.Loop() {
				_ = Decompress(c, dst, out)
			}
		})
	}
}

func BenchmarkLeaf(b *testing.B) {
	leaf := randomLeaf(rand.New(rand.NewPCG(1, 1)), 1<<20)
	enc := AppendLeaf(nil, leaf)
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			enc = AppendLeaf(enc[:0], leaf)
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := DecodeLeaf(enc, leaf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkRecordHeader(b *testing.B) {
	h := RecordHeader{Seq: 9, Block: 3, Branch: 1, Kind: KindData, Codec: S2, Blocks: 1, PayloadLen: 2000}
	rec := make([]byte, RecordHeaderSize)
	b.Run("encode", func(b *testing.B) {
		for b.Loop() {
			h.Encode(rec, 5, 8192)
		}
	})
	b.Run("decode", func(b *testing.B) {
		for b.Loop() {
			if _, err := DecodeRecordHeader(rec, 5, 8192); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkIsZero(b *testing.B) {
	p := make([]byte, BlockSize)
	b.SetBytes(BlockSize)
	for b.Loop() {
		if !IsZero(p) {
			b.Fatal()
		}
	}
}
