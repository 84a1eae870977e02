package format

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
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
		case KindMoved:
			err = checkMoved(t, &h, payload)
		}
		if err != nil {
			rejected(t, err)
		}
		checkVerifyRecord(t, b, &h, chunk, offset)
	})
}

// checkMoved holds what a moved record is a copy of to encode to the bytes that it was decoded from.
func checkMoved(t *testing.T, h *RecordHeader, payload []byte) error {
	m, err := DecodeMoved(h, payload)
	if err != nil {
		return err
	}
	var again [MovedSize]byte
	if m.Encode(again[:]); !bytes.Equal(again[:], payload[:MovedSize]) {
		t.Fatalf("%x encodes to %x", payload[:MovedSize], again)
	}
	return nil
}

// checkVerifyRecord holds VerifyRecord to return the unit of exactly the records of units, by the entry that names them
// and by no other.
func checkVerifyRecord(t *testing.T, b []byte, h *RecordHeader, chunk uint64, offset uint32) {
	rec := append(bytes.Clone(b), make([]byte, h.Size())...)[:h.Size()]
	h.PayloadCRC = Checksum(rec[RecordHeaderSize:][:h.PayloadLen])
	h.Encode(rec, chunk, offset)
	e := MakeEntry(5, offset, h.Size(), h.Blocks, h.Blocks-1)
	unit, codec, err := VerifyRecord(rec, chunk, e, h.Block)
	if h.Kind != KindData && h.Kind != KindMoved {
		if err == nil {
			t.Fatal("a unit of", h.Kind)
		}
		return
	}
	front := 0
	if h.Kind == KindMoved {
		front = MovedSize
	}
	if err != nil || codec != h.Codec || !bytes.Equal(unit, rec[RecordHeaderSize+front:][:h.PayloadLen-front]) {
		t.Fatal(codec, err)
	}
	if _, _, err := VerifyRecord(rec, chunk, e, h.Block+1); err == nil {
		t.Fatal("a record of another block")
	}
	rec[RecordHeaderSize+h.PayloadLen-1] ^= 1
	if _, _, err := VerifyRecord(rec, chunk, e, h.Block); !errors.Is(err, ErrCorrupt) {
		t.Fatal("a damaged unit:", err)
	}
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
		for _, v := range []any{new(Volume), new(Snapshot), new(Branch), new(Checkpoint), new(ColdMark)} {
			if u, ok := v.(usual); ok && len(b) >= 4 && u.readUsual(b[4:]) {
				slow := reflect.New(reflect.TypeOf(v).Elem()).Interface()
				if err := decodeJSON(b[4:], slow); err != nil || !reflect.DeepEqual(v, slow) {
					t.Fatalf("%q is %+v, and by encoding/json %+v (%v)", b[4:], v, slow, err)
				}
			}
			if err := DecodeRow(b, v); err != nil {
				rejected(t, err)
				continue
			}
			twice := reflect.New(reflect.TypeOf(v).Elem()).Interface()
			again, err := AppendRow(nil, v)
			if err != nil || DecodeRow(again, twice) != nil || !sameRow(v, twice) {
				t.Fatalf("%+v was accepted, and comes back as %+v (%v)", v, twice, err)
			}
		}
		c, err := DecodeChunk(7, b)
		if err != nil {
			rejected(t, err)
		} else if again := c.Encode(); !bytes.Equal(again[:], b) {
			t.Fatal(c)
		}
		f, err := DecodeForwarded(7, b)
		if err != nil {
			rejected(t, err)
		} else if again := f.Encode(); !bytes.Equal(again[:], b) {
			t.Fatal(f)
		}
	})
}

// sameRow compares rows by their JSON, in which a time has one form.
func sameRow(a, b any) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}

// FuzzForwards holds the forwards of a region to encode to what they were decoded from, and to be found.
func FuzzForwards(f *testing.F) {
	f.Add(uint16(0), goldenFile(f, "forwards"))
	f.Add(uint16(0), AppendForwards(nil, testForwards))
	f.Add(uint16(0xffff), AppendForwards(nil, testForwards[:1]))
	f.Fuzz(func(t *testing.T, region uint16, b []byte) {
		b = bytes.Clone(b)
		if len(b) >= 4 {
			le.PutUint32(b, Checksum(b[4:]))
		}
		fs, err := DecodeForwards(region, b)
		if err != nil {
			rejected(t, err)
			return
		}
		if again := AppendForwards(nil, fs); !bytes.Equal(again, b) {
			t.Fatalf("%x encodes to %x", b, again)
		}
		for i, x := range fs {
			if !x.To.Valid() || x.To.IsHole() || x.Offset/ForwardRegion != uint32(region) {
				t.Fatal(x)
			}
			if at, found := SearchForwards(fs, x.Offset); !found || at != i {
				t.Fatal(i, at, found)
			}
			if at, found := SearchForwards(fs, x.Offset+1); found || at != i+1 {
				t.Fatal(i, at, found)
			}
		}
	})
}

// FuzzPacked packs leaves, and compares what comes out. The input is the encoding of a leaf, and edits of it: which
// entries are holes, are replaced, or are changed.
func FuzzPacked(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 1))
	for n := 1; n <= UnitBlocks; n *= 2 {
		f.Add(AppendLeaf(nil, sequentialLeaf(rng, n)), []byte{})
	}
	f.Add(goldenFile(f, "leaf"), []byte{1, 2, 3, 255, 255, 255})
	f.Add(AppendLeaf(nil, evenLeaf(rng, 4, 4)), []byte{16, 1, 7})
	f.Fuzz(func(t *testing.T, b, edits []byte) {
		b = bytes.Clone(b)
		if len(b) >= leafHeaderSize {
			le.PutUint32(b, Checksum(b[4:]))
		}
		l := new(Leaf)
		if DecodeLeaf(b, l) != nil {
			return
		}
		for ; len(edits) >= 3; edits = edits[3:] {
			switch i, from := edits[0], edits[1]; edits[2] % 4 {
			case 0:
				l.Entries[i] = 0
			case 1:
				l.Entries[i] = l.Entries[from]
			case 2:
				l.SetChanged(int(i))
			case 3:
				if e := l.Entries[from] ^ Entry(edits[2]>>2)<<(i%64); e.Valid() {
					l.Entries[from] = e
				}
			}
		}
		checkPacked(t, l)
	})
}

func checkPacked(t interface {
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}, l *Leaf,
) {
	p := AppendPacked(make([]uint64, 0, MaxPacked), l)
	if len(p) > MaxPacked {
		t.Fatal(len(p))
	}
	var got Leaf
	got.Entries[0], got.Changed[0] = 1, 1 // nothing of the old content may be left
	if p.Unpack(&got); got != *l {
		t.Fatal("unpacks to something else")
	}
	for i, e := range l.Entries {
		if p.Entry(i) != e || p.IsChanged(i) != l.IsChanged(i) {
			t.Fatalf("block %d: %v %v, want %v %v", i, p.Entry(i), p.IsChanged(i), e, l.IsChanged(i))
		}
	}
}

// FuzzEntry holds an entry that is valid to be one that MakeEntry makes of its parts.
func FuzzEntry(f *testing.F) {
	f.Add(uint64(0))
	f.Add(uint64(MakeEntry(0, ChunkHeaderSize, minRecord, 1, 0)))
	f.Add(uint64(MakeEntry(MaxSlots-1, MaxChunkSize-minRecord, minRecord, 1, 0)))
	f.Add(uint64(MakeEntry(7, 1<<20, MaxDataRecord, UnitBlocks, UnitBlocks-1)))
	f.Fuzz(func(t *testing.T, v uint64) {
		e := Entry(v)
		if e.IsHole() || !e.Valid() {
			return
		}
		if again := MakeEntry(e.Slot(), e.Offset(), e.Size(), e.Blocks(), e.Index()); again != e {
			t.Fatalf("%v was taken apart, and became %v", e, again)
		}
		if int(e.Share())*e.Blocks() != e.Size() || int(e.Offset())+e.Size() > MaxChunkSize {
			t.Fatal(e)
		}
	})
}

// FuzzName compares the check of names and the parsers of codecs with what their comments say.
func FuzzName(f *testing.F) {
	for _, s := range []string{"a", "vol.1_a-b", "-a", ".a", "a:b+c", "+a", "none", "s2", "zstd", "ü", strings.Repeat("x", maxName), strings.Repeat("x", maxName+1)} {
		f.Add(s)
	}
	allowed := regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\z`)
	allowedInSnapshots := regexp.MustCompile(`\A[A-Za-z0-9][A-Za-z0-9._:+-]{0,62}\z`)
	f.Fuzz(func(t *testing.T, s string) {
		err := CheckSnapshotName(s)
		if (err == nil) != allowedInSnapshots.MatchString(s) || err != nil && !errors.Is(err, ErrName) {
			t.Fatalf("a snapshot, %q: %v", s, err)
		}
		err = CheckName(s)
		if (err == nil) != allowed.MatchString(s) || err != nil && !errors.Is(err, ErrName) {
			t.Fatalf("%q: %v", s, err)
		}
		c, err := ParseCodec(s)
		if (err == nil) != (s == "none" || s == "s2" || s == "zstd") || err == nil && c.String() != s || err != nil && !errors.Is(err, ErrCodec) {
			t.Fatalf("%q: %v, %v", s, c, err)
		}
	})
}

func FuzzEvent(f *testing.F) {
	event, err := AppendEvent(nil, &testEvent)
	must(f, err)
	f.Add(event)
	f.Fuzz(func(t *testing.T, b []byte) {
		var e, twice Event
		if err := DecodeEvent(b, &e); err != nil {
			rejected(t, err)
		} else if again, err := AppendEvent(nil, &e); err != nil && !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		} else if err == nil {
			if must(t, DecodeEvent(again, &twice)); !sameRow(e, twice) {
				t.Fatalf("%+v comes back as %+v", e, twice)
			}
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
