package format

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// The fuzz targets hold every decoder to the same rule. If it accepts an input, it decodes the encoding of the result
// to the same result. It rejects any other input with an error of this package. Where a checksum would keep the fuzzer
// out, the target corrects the checksum.

func seedGolden(f *testing.F, pattern string) {
	files, err := filepath.Glob(filepath.Join("..", "testdata", "format", pattern))
	if err != nil || len(files) == 0 {
		f.Fatal(pattern, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		must(f, err)
		f.Add(b)
	}
}

func rejected(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
		t.Fatal("not an error of this package:", err)
	}
}

func FuzzChunkHeader(f *testing.F) {
	f.Add(goldenFile(f, "chunk-header")[:chunkHeaderEnd])
	f.Add(goldenFile(f, "chunk-header-durable")[:chunkHeaderEnd])
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := DecodeChunkHeader(b); err != nil {
			rejected(t, err)
		}
		b = append(bytes.Clone(b), make([]byte, ChunkHeaderSize)...)
		le.PutUint32(b[40:], Checksum(b[:40]))
		if le.Uint64(b[44:]) != 0 {
			le.PutUint32(b[52:], Checksum(b[:52]))
		}
		h, err := DecodeChunkHeader(b)
		if err != nil {
			rejected(t, err)
			return
		}
		again := make([]byte, ChunkHeaderSize)
		if h.Encode(again); !bytes.Equal(again[:chunkHeaderEnd], b[:chunkHeaderEnd]) {
			t.Fatalf("%x encodes to %x", b[:chunkHeaderEnd], again[:chunkHeaderEnd])
		}
	})
}

func FuzzDurableMark(f *testing.F) {
	f.Add(goldenFile(f, "durable-mark"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := DecodeDurableMark(b); err != nil {
			rejected(t, err)
		}
		b = append(bytes.Clone(b), make([]byte, DurableMarkSize)...)[:DurableMarkSize]
		le.PutUint32(b, Checksum(b[4:]))
		m, err := DecodeDurableMark(b)
		if err != nil {
			rejected(t, err)
			return
		}
		again := make([]byte, DurableMarkSize)
		if m.Encode(again); !bytes.Equal(again[4:40], b[4:40]) {
			t.Fatalf("%x encodes to %x", b, again)
		}
	})
}

func FuzzRecord(f *testing.F) {
	seedGolden(f, "record-*")
	f.Fuzz(func(t *testing.T, b []byte) {
		const chunk, offset = 17, 1 << 20
		b = bytes.Clone(b) // the fuzzer's slice must not be changed
		if len(b) >= RecordHeaderSize {
			le.PutUint32(b, saltedChecksum(chunk, offset, b[4:RecordHeaderSize]))
		}
		h, err := DecodeRecordHeader(b, chunk, offset)
		if err != nil {
			rejected(t, err)
			return
		}
		again := make([]byte, RecordHeaderSize)
		if h.Encode(again, chunk, offset); !bytes.Equal(again, b[:RecordHeaderSize]) {
			t.Fatalf("%x encodes to %x", b[:RecordHeaderSize], again)
		}
		payload := b[RecordHeaderSize:]
		payload = payload[:min(len(payload), h.PayloadLen)]
		if err := h.VerifyPayload(payload); err != nil {
			rejected(t, err)
		}
		switch h.Kind {
		case KindData:
			err = Decompress(h.Codec, make([]byte, h.Blocks*BlockSize), payload)
		case KindHole:
			_, err = DecodeHole(payload, h.Block)
		case KindEvent:
			err = DecodeEvent(payload, new(Event))
		}
		if err != nil {
			rejected(t, err)
		}
	})
}

// FuzzSummary holds a summary that verifies to consist of entries that AppendSummary makes.
func FuzzSummary(f *testing.F) {
	seedGolden(f, "summary")
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := decodeSummary(b); err != nil {
			rejected(t, err)
		}
		if len(b) < SummaryFooterSize {
			return
		}
		b = bytes.Clone(b)
		at := len(b) - SummaryFooterSize
		le.PutUint32(b[at+32:], Checksum(b[:at]))
		le.PutUint32(b[at:], saltedChecksum(17, testSummaryEnd, b[at+4:at+summaryFooterEnd]))
		entries, footer, err := decodeSummary(b)
		if err != nil {
			rejected(t, err)
			return
		}
		var again []byte
		for _, e := range entries {
			h := RecordHeader{Block: e.Block, Branch: e.Branch, Kind: e.Kind, Blocks: e.Blocks, PayloadLen: e.Size - RecordHeaderSize}
			switch e.Kind {
			case KindHole:
				h.Blocks, h.PayloadLen = 1, HoleSize
			case KindEvent: // its length is padded here
				h.PayloadLen = int(le.Uint32(b[len(again):]) & MaxPayload)
			}
			again = AppendSummary(again, &h, e.Blocks)
		}
		again = append(again, make([]byte, SummaryFooterSize)...)
		footer.Encode(again[len(again)-SummaryFooterSize:], 17, testSummaryEnd)
		clear(b[at+summaryFooterEnd:])
		if !bytes.Equal(again, b) {
			t.Fatalf("%x encodes to %x", b, again)
		}
	})
}

func FuzzLeaf(f *testing.F) {
	seedGolden(f, "leaf")
	f.Add(AppendLeaf(nil, new(Leaf)))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		if len(b) >= leafHeaderSize {
			le.PutUint32(b, Checksum(b[4:]))
		}
		var l, again Leaf
		if err := DecodeLeaf(b, &l); err != nil {
			rejected(t, err)
			return
		}
		for i, e := range l.Entries {
			if !e.Valid() {
				t.Fatal(i, e)
			}
		}
		if err := DecodeLeaf(AppendLeaf(nil, &l), &again); err != nil || again != l {
			t.Fatal(err)
		}
	})
}

func FuzzRow(f *testing.F) {
	seedGolden(f, "row-*")
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		if len(b) >= 4 {
			le.PutUint32(b, Checksum(b[4:]))
		}
		for _, v := range []any{new(Volume), new(Snapshot), new(Branch), new(Checkpoint)} {
			if err := DecodeRow(b, v); err != nil {
				rejected(t, err)
			} else if again, err := AppendRow(nil, v); err != nil || DecodeRow(again, v) != nil {
				t.Fatalf("%+v was accepted but does not encode: %v", v, err)
			}
		}
		c, err := DecodeChunk(7, b)
		if err != nil {
			rejected(t, err)
		} else if again := c.Encode(); !bytes.Equal(again[:], b) {
			t.Fatal(c)
		}
	})
}

func FuzzEvent(f *testing.F) {
	event, err := AppendEvent(nil, &testEvent)
	must(f, err)
	f.Add(event)
	f.Fuzz(func(t *testing.T, b []byte) {
		var e Event
		if err := DecodeEvent(b, &e); err != nil {
			rejected(t, err)
		} else if again, err := AppendEvent(nil, &e); err != nil && !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		} else if err == nil {
			must(t, DecodeEvent(again, &e))
		}
	})
}

func FuzzStoreInfo(f *testing.F) {
	seedGolden(f, "store")
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeStoreInfo(b)
		if err != nil {
			if !errors.Is(err, ErrNotStore) {
				rejected(t, err)
			}
			return
		}
		again, err := s.Encode()
		must(t, err)
		if s2, err := DecodeStoreInfo(again); err != nil || s2.UUID != s.UUID || !s2.Created.Equal(s.Created) {
			t.Fatal(s2, err)
		}
	})
}

func FuzzDecompress(f *testing.F) {
	for _, c := range []Codec{S2, Zstd} {
		comp, err := NewCompressor(c, 0)
		must(f, err)
		for _, blocks := range []int{1, 2, UnitBlocks} {
			out, _ := comp.Compress(nil, bytes.Repeat([]byte("some text."), blocks*BlockSize/10+1)[:blocks*BlockSize])
			f.Add(uint8(c), uint8(blocks-1), out)
		}
	}
	roomy := make([]byte, UnitSize+64)
	f.Fuzz(func(t *testing.T, c, blocks uint8, src []byte) {
		n := (int(blocks)%UnitBlocks + 1) * BlockSize
		clear(roomy)
		if err := Decompress(Codec(c), roomy[:n], src); err != nil {
			rejected(t, err)
		}
		if !IsZero(roomy[n:]) {
			t.Fatal("wrote beyond the unit")
		}
	})
}

// FuzzCompress compresses and decompresses a unit, and compares the result with the unit.
func FuzzCompress(f *testing.F) {
	f.Add([]byte("abc"))
	var comps []*Compressor
	for _, c := range []Codec{S2, Zstd} {
		comp, err := NewCompressor(c, 0)
		must(f, err)
		comps = append(comps, comp)
	}
	buf := make([]byte, 0, MaxCompressed)
	f.Fuzz(func(t *testing.T, b []byte) {
		src := make([]byte, min(max(1, (len(b)+BlockSize-1)/BlockSize), UnitBlocks)*BlockSize)
		if _, err := io.ReadFull(bytes.NewReader(b), src); err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
			t.Fatal(err)
		}
		for _, comp := range comps {
			out, codec := comp.Compress(buf, src)
			got := make([]byte, len(src))
			if err := Decompress(codec, got, out); err != nil || !bytes.Equal(got, src) {
				t.Fatal(codec, err)
			}
		}
	})
}
