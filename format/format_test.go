package format

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	testUUID      = [16]byte{0x12, 0x3e, 0x45, 0x67, 0xe8, 0x9b, 0x12, 0xd3, 0xa4, 0x56, 0x42, 0x66, 0x14, 0x17, 0x40, 0x00}
	testTime      = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)
	testVolume    = Volume{ID: 1, Name: "vol.1_a-b", Size: 1 << 40, Codec: S2, LogicalBlock: 4096, Branch: 2, Created: testTime}
	testSnap      = Snapshot{ID: 3, Volume: 1, Name: "before", Branch: 2, Epoch: 7, Size: 1 << 40, Created: testTime}
	testReceiving = Volume{
		ID: 9, Name: "vol.receiving", Size: 1 << 40, Codec: Zstd, Level: 5, LogicalBlock: 512, Branch: 10, Created: testTime,
		Properties: map[string]string{"org:owner": "Zoë", "b": ""},
		Receiving:  &Receiving{Volume: "vol", Snapshot: "v2", GUID: GUID{1, 2, 15: 3}, Base: GUID{4}, Size: 1 << 30, Created: testTime, Block: 1 << 18},
	}
	testGUID      = Snapshot{ID: 3, Volume: 1, Name: "before", Branch: 2, Epoch: 7, Size: 1 << 40, Created: testTime, GUID: GUID{1, 2, 15: 3}}
	testTimed     = Snapshot{ID: 3, Volume: 1, Name: "auto-2026-03-01T12:00:00+01:00", Branch: 2, Epoch: 7, Size: 1 << 40, Created: testTime, GUID: GUID{5}}
	testHeld      = Snapshot{ID: 3, Volume: 1, Name: "before", Branch: 2, Epoch: 7, Size: 1 << 40, Created: testTime, GUID: GUID{4}, Holds: map[string]time.Time{"backup": testTime, "a.b": testTime.Add(time.Hour)}}
	testBranch    = Branch{ID: 4, Epoch: 1, OriginBranch: 2, OriginEpoch: 7}
	testCold      = ColdMark{ChunkSeq: 16, Offset: 1 << 21}
	testCheck     = Checkpoint{Seq: 1 << 40, ChunkSeq: 17, Offset: 1 << 20, NextID: 5, NextChunkSeq: 18}
	testEvent     = Event{Op: "clone", Volumes: []Volume{testVolume}, Snapshots: []Snapshot{testSnap}, Branches: []Branch{testBranch}, DropVolumes: []uint32{8}}
	testChunk     = Chunk{Slot: 0xabcdef, Seq: 17, End: 1 << 20, Live: 1<<20 - 4096}
	testForwarded = Forwarded{Slot: 0xabcdef, Seq: 17, Blocks: 1000}
	testMoved     = Moved{From: MakeEntry(5, 8192, 4128, 2, 0), Mask: 2}
	testForwards  = []Forward{{Offset: 8192, Mask: 2, To: MakeEntry(9, 4096, 4160, 2, 0)}, {Offset: 12320, Mask: 1, To: MakeEntry(9, 8256, 4144, 1, 0)}}
	testChunkHd   = ChunkHeader{Slot: 0xabcdef, Seq: 17, UUID: testUUID}
	testMark      = DurableMark{UUID: testUUID, Seq: 1 << 41}
	testDurable   = ChunkHeader{Slot: 0xabcdef, Seq: 17, UUID: testUUID, Durable: 1 << 41}
)

// testLeaf has every kind of run, short and long, and distances between slots of one to four bytes.
func testLeaf() *Leaf {
	l := new(Leaf)
	i := 0
	put := func(e Entry) { l.Entries[i] = e; i++ }
	i += 70 // holes, long
	for n := range uint32(70) {
		put(MakeEntry(n*n*5%MaxSlots, ChunkHeaderSize+n*80, 48+16*int(n), 1, 0)) // singles, long
	}
	for n := range uint32(66) {
		put(MakeEntry(MaxSlots-1, 1<<20+n*4128, 4128, 1, 0)) // one after the other, long
	}
	i++
	for n := range 16 {
		put(MakeEntry(0, ChunkHeaderSize, MaxDataRecord, 16, n)) // a whole unit
	}
	put(MakeEntry(3, 1<<25, 5*320, 5, 2)) // parts of one, overwritten in the middle
	put(MakeEntry(4, 1<<25+16, 48, 1, 0))
	put(MakeEntry(3, 1<<25, 5*320, 5, 4))
	put(MakeEntry(9, MaxChunkSize-96, 48, 1, 0)) // up to the end of the chunk
	put(MakeEntry(9, MaxChunkSize-48, 48, 1, 0))
	l.SetChanged(0)
	l.SetChanged(100)
	l.SetChanged(255)
	return l
}

func testRecord(t testing.TB, h RecordHeader, payload []byte) []byte {
	h.PayloadLen, h.PayloadCRC = len(payload), Checksum(payload)
	rec := make([]byte, h.Size())
	h.Encode(rec, 17, 1<<20)
	copy(rec[RecordHeaderSize:], payload)
	return rec
}

var testUnit = bytes.Repeat([]byte("a compressible unit of blocks. "), 265)[:2*BlockSize]

func goldenFile(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "testdata", "format", name))
	must(t, err)
	return b
}

const testSummaryEnd = 1 << 21

// testSummary is the summary of a data, a hole, an event and a moved record, in a file that ends at testSummaryEnd.
func testSummary() ([]SummaryEntry, SummaryFooter, []byte) {
	unit := RecordHeader{Seq: 1000, Block: 1<<33 + 3, Branch: 2, Kind: KindData, Codec: S2, Blocks: 5, PayloadLen: 9000}
	hole := RecordHeader{Seq: 1001, Block: 256, Branch: 3, Kind: KindHole, Blocks: 1, PayloadLen: HoleSize}
	event := RecordHeader{Seq: 1002, Kind: KindEvent, Blocks: 1, PayloadLen: MaxPayload}
	b := AppendSummary(nil, &unit, 0)
	b = AppendSummary(b, &hole, 256)
	b = AppendSummary(b, &event, 0)
	moved := RecordHeader{Seq: 1003, Block: 14, Branch: 2, Kind: KindMoved, Codec: S2, Blocks: 2, PayloadLen: MovedSize + 9}
	b = AppendSummary(b, &moved, 0)
	f := SummaryFooter{FirstSeq: 1000, Records: 4, EntriesCRC: Checksum(b), End: uint32(ChunkHeaderSize + unit.Size() + hole.Size() + event.Size() + moved.Size())}
	b = append(b, make([]byte, SummaryFooterSize)...)
	f.Encode(b[4*SummaryEntrySize:], 17, testSummaryEnd)
	return []SummaryEntry{
		{Kind: KindData, Branch: 2, Block: 1<<33 + 3, Blocks: 5, Size: unit.Size()},
		{Kind: KindHole, Branch: 3, Block: 256, Blocks: 256, Size: hole.Size()},
		{Kind: KindEvent, Blocks: 1, Size: event.Size()},
		{Kind: KindMoved, Branch: 2, Block: 14, Blocks: 2, Size: moved.Size()},
	}, f, b
}

// decodeSummary reads a whole summary.
func decodeSummary(b []byte) (entries []SummaryEntry, f SummaryFooter, err error) {
	at := max(0, len(b)-SummaryFooterSize)
	if f, err = DecodeSummaryFooter(b[at:], 17, testSummaryEnd); err != nil {
		return nil, f, err
	}
	if err := f.VerifyEntries(b[:at]); err != nil {
		return nil, f, err
	}
	for b = b[:at]; len(b) > 0; b = b[SummaryEntrySize:] {
		e, err := DecodeSummaryEntry(b)
		if err != nil {
			return nil, f, err
		}
		entries = append(entries, e)
	}
	return entries, f, nil
}

// goldenPayload returns testUnit as the golden file has it compressed. A codec may compress differently in a later
// version, and does so on other processors, but it must still read what it once wrote.
func goldenPayload(t testing.TB, name string, c Codec) []byte {
	if !*update {
		b := goldenFile(t, name)
		h, err := DecodeRecordHeader(b, 17, 1<<20)
		must(t, err)
		return b[RecordHeaderSize:][:h.PayloadLen]
	}
	comp, err := NewCompressor(c, 0)
	must(t, err)
	out, codec := comp.Compress(nil, testUnit)
	if codec != c {
		t.Fatal(codec)
	}
	return out
}

// TestGolden compares the encoding of every structure with that of version 1, because existing stores depend on it.
func TestGolden(t *testing.T) {
	hole := make([]byte, HoleSize)
	EncodeHole(hole, 1<<30)
	event, err := AppendEvent(nil, &testEvent)
	must(t, err)
	info := NewStoreInfo(testUUID, testTime)
	infoText, err := info.Encode()
	must(t, err)
	chunkHeader := make([]byte, ChunkHeaderSize)
	testChunkHd.Encode(chunkHeader)
	chunkRow, forwardedRow := testChunk.Encode(), testForwarded.Encode()
	moved := make([]byte, MovedSize)
	testMoved.Encode(moved)

	durableHeader := make([]byte, ChunkHeaderSize)
	testDurable.Encode(durableHeader)
	_, _, summary := testSummary()
	mark := make([]byte, DurableMarkSize)
	testMark.Encode(mark)

	golden := map[string][]byte{
		"chunk-header-durable": durableHeader,
		"durable-mark":         mark,
		"table-copy":           testCopy(),
		"summary":              summary,
		"store":                infoText,
		"chunk-header":         chunkHeader,
		"record-s2":            testRecord(t, RecordHeader{Seq: 1000, Block: 14, Branch: 2, Kind: KindData, Codec: S2, Blocks: 2}, goldenPayload(t, "record-s2", S2)),
		"record-zstd":          testRecord(t, RecordHeader{Seq: 1004, Block: 14, Branch: 2, Kind: KindData, Codec: Zstd, Blocks: 2}, goldenPayload(t, "record-zstd", Zstd)),
		"record-raw":           testRecord(t, RecordHeader{Seq: 1001, Block: 1 << 33, Branch: 2, Kind: KindData, Codec: Raw, Blocks: 1}, testUnit[:BlockSize]),
		"record-hole":          testRecord(t, RecordHeader{Seq: 1002, Block: 5, Branch: 2, Kind: KindHole, Blocks: 1}, hole),
		"record-event":         testRecord(t, RecordHeader{Seq: 1003, Kind: KindEvent, Blocks: 1}, event),
		"leaf":                 AppendLeaf(nil, testLeaf()),
		"row-chunk":            chunkRow[:],
		"record-moved":         testRecord(t, RecordHeader{Seq: 1005, Block: 14, Branch: 2, Kind: KindMoved, Codec: S2, Blocks: 2}, append(moved, goldenPayload(t, "record-s2", S2)...)),
		"forwards":             AppendForwards(nil, testForwards),
		"row-forwarded":        forwardedRow[:],
	}
	for name, row := range map[string]any{"row-volume": &testVolume, "row-snapshot": &testSnap, "row-volume-4": &testReceiving, "row-snapshot-4": &testGUID, "row-snapshot-held": &testHeld, "row-snapshot-5": &testTimed, "row-branch": &testBranch, "row-checkpoint": &testCheck, "row-cold": &testCold} {
		golden[name], err = AppendRow(nil, row)
		must(t, err)
	}
	for name, got := range golden {
		if *update {
			must(t, os.WriteFile(filepath.Join("..", "testdata", "format", name), got, 0o644))
		}
		want := goldenFile(t, name)
		if !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%q, want\n%q", name, got, want)
		}
	}
}

// TestGoldenDecode decodes the golden files: what version 1 wrote must be understood, whatever the encoder of today
// writes. TestGolden holds each file to be the encoding of the value here.
func TestGoldenDecode(t *testing.T) {
	file := func(name string) []byte { return goldenFile(t, name) }
	info, err := DecodeStoreInfo(file("store"))
	must(t, err)
	if id, err := info.ID(); err != nil || id != testUUID || !info.Created.Equal(testTime) {
		t.Error(info, err)
	}
	if h, err := DecodeChunkHeader(file("chunk-header")); err != nil || h != testChunkHd {
		t.Error(h, err)
	}
	if m, err := DecodeDurableMark(file("durable-mark")); err != nil || m != testMark {
		t.Error(m, err)
	}
	if h, err := DecodeChunkHeader(file("chunk-header-durable")); err != nil || h != testDurable {
		t.Error(h, err)
	}
	wantEntries, wantFooter, _ := testSummary()
	if entries, f, err := decodeSummary(file("summary")); err != nil || f != wantFooter || !slices.Equal(entries, wantEntries) {
		t.Error(entries, f, err)
	}
	for name, seq := range map[string]uint64{"record-s2": 1000, "record-zstd": 1004, "record-raw": 1001, "record-hole": 1002, "record-event": 1003} {
		rec := file(name)
		h, err := DecodeRecordHeader(rec, 17, 1<<20)
		must(t, err)
		if h.Seq != seq || h.Size() != len(rec) {
			t.Error(name, h, len(rec))
		}
		payload := rec[RecordHeaderSize:][:h.PayloadLen]
		must(t, h.VerifyPayload(payload))
		switch h.Kind {
		case KindData:
			unit := make([]byte, h.Blocks*BlockSize)
			if err := Decompress(h.Codec, unit, payload); err != nil || !bytes.Equal(unit, testUnit[:len(unit)]) {
				t.Error(name, err)
			}
		case KindHole:
			if n, err := DecodeHole(payload, h.Block); n != 1<<30 || err != nil {
				t.Error(name, n, err)
			}
		case KindEvent:
			var e Event
			if err := DecodeEvent(payload, &e); err != nil || len(e.DropVolumes) != 1 || !reflect.DeepEqual(e.Volumes[0], testVolume) {
				t.Error(name, e, err)
			}
		}
	}
	var l Leaf
	if err := DecodeLeaf(file("leaf"), &l); err != nil || l != *testLeaf() {
		t.Error(err)
	}
	if c, err := DecodeChunk(testChunk.Slot, file("row-chunk")); err != nil || c != testChunk {
		t.Error(c, err)
	}
	if r, err := DecodeForwarded(testForwarded.Slot, file("row-forwarded")); err != nil || r != testForwarded {
		t.Error(r, err)
	}
	if fs, err := DecodeForwards(0, file("forwards")); err != nil || !slices.Equal(fs, testForwards) {
		t.Error(fs, err)
	}
	rec := file("record-moved")
	h, err := DecodeRecordHeader(rec, 17, 1<<20)
	must(t, err)
	if m, err := DecodeMoved(&h, rec[RecordHeaderSize:]); err != nil || m != testMoved || h.Kind != KindMoved {
		t.Error(h, m, err)
	}
	var v, v4 Volume
	var s, s4, s5, held Snapshot
	var b Branch
	var c Checkpoint
	var m ColdMark
	for name, row := range map[string]any{"row-volume": &v, "row-snapshot": &s, "row-volume-4": &v4, "row-snapshot-4": &s4, "row-snapshot-held": &held, "row-snapshot-5": &s5, "row-branch": &b, "row-checkpoint": &c, "row-cold": &m} {
		must(t, DecodeRow(file(name), row))
	}
	if !reflect.DeepEqual(v, testVolume) || !reflect.DeepEqual(v4, testReceiving) || !reflect.DeepEqual(s4, testGUID) || !reflect.DeepEqual(s5, testTimed) || !reflect.DeepEqual(held, testHeld) || !reflect.DeepEqual(s, testSnap) || b != testBranch || c != testCheck || m != testCold {
		t.Error(v, v4, s, s4, s5, held, b, c, m)
	}
}

// TestEveryFlippedBitIsFound changes each bit of each golden file: no decoder accepts the file then.
func TestEveryFlippedBitIsFound(t *testing.T) {
	decoders := map[string]func([]byte) error{
		"record-s2": func(b []byte) error {
			h, err := DecodeRecordHeader(b, 17, 1<<20)
			if err != nil {
				return err
			}
			if !IsRecordHeader(b, 17, 1<<20) || IsRecordHeader(b, 18, 1<<20) || IsRecordHeader(b, 17, 1<<20+16) {
				t.Error("IsRecordHeader does not say what DecodeRecordHeader says")
			}
			payload := b[RecordHeaderSize:]
			return h.VerifyPayload(payload[:min(h.PayloadLen, len(payload))])
		},
		"leaf":              func(b []byte) error { return DecodeLeaf(b, new(Leaf)) },
		"row-chunk":         func(b []byte) error { _, err := DecodeChunk(1, b); return err },
		"row-volume":        func(b []byte) error { return DecodeRow(b, new(Volume)) },
		"row-volume-4":      func(b []byte) error { return DecodeRow(b, new(Volume)) },
		"row-snapshot-5":    func(b []byte) error { return DecodeRow(b, new(Snapshot)) },
		"row-snapshot-held": func(b []byte) error { return DecodeRow(b, new(Snapshot)) },
		"summary":           func(b []byte) error { _, _, err := decodeSummary(b); return err },
		"table-copy":        func(b []byte) error { return wholeCopy(b) },
		"durable-mark":      func(b []byte) error { _, err := DecodeDurableMark(b); return err },
		"chunk-header-durable": func(b []byte) error {
			if len(b) >= chunkHeaderEnd { // the padding does not count, so make it whole
				b = append(b[:chunkHeaderEnd:chunkHeaderEnd], make([]byte, ChunkHeaderSize-chunkHeaderEnd)...)
			}
			_, err := DecodeChunkHeader(b)
			return err
		},
	}
	for name, decode := range decoders {
		data := goldenFile(t, name)
		end := len(data)
		switch name {
		case "chunk-header-durable":
			end = 56 // the rest may be padding
		case "summary":
			end -= SummaryFooterSize - summaryFooterEnd
		case "record-s2":
			h, err := DecodeRecordHeader(data, 17, 1<<20)
			must(t, err)
			end = RecordHeaderSize + h.PayloadLen
		}
		must(t, decode(data))
		for bit := range end * 8 {
			data[bit/8] ^= 1 << (bit % 8)
			if err := decode(bytes.Clone(data)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: bit %d: %v", name, bit, err)
			}
			data[bit/8] ^= 1 << (bit % 8)
		}
		for n := range end {
			if err := decode(bytes.Clone(data[:n:n])); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: cut to %d bytes: %v", name, n, err)
			}
		}
	}
}

// TestChunkHeaderSaysOfTheCheckpoint changes each bit of the checkpoint, which older programs take for padding: the
// header then says nothing about a checkpoint, and the rest of it still counts.
func TestChunkHeaderSaysOfTheCheckpoint(t *testing.T) {
	h := ChunkHeader{Slot: 3, Seq: 1 << 40, UUID: [16]byte{1, 2}, Durable: 77, Checkpoint: 55}
	b := make([]byte, ChunkHeaderSize)
	h.Encode(b)
	got, err := DecodeChunkHeader(b)
	if err != nil || got != h {
		t.Fatalf("%+v, %v", got, err)
	}
	h.Checkpoint = 0
	for bit := 56 * 8; bit < chunkHeaderEnd*8; bit++ {
		b[bit/8] ^= 1 << (bit % 8)
		if got, err := DecodeChunkHeader(b); err != nil || got != h {
			t.Errorf("bit %d: %+v, %v", bit, got, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
}

// TestRecordIsBoundToItsPlace decodes a record that is left over from an earlier life of the slot, and one in the wrong
// place. Neither verifies.
func TestRecordIsBoundToItsPlace(t *testing.T) {
	h := RecordHeader{Seq: 1, Branch: 1, Kind: KindHole, Blocks: 1, PayloadLen: HoleSize}
	b := make([]byte, RecordHeaderSize)
	h.Encode(b, 5, 8192)
	if got, err := DecodeRecordHeader(b, 5, 8192); err != nil || got != h {
		t.Fatal(got, err)
	}
	for _, place := range [][2]uint64{{4, 8192}, {6, 8192}, {5, 8208}, {5, 4096}, {8192, 5}, {5 << 32, 8192}} {
		if _, err := DecodeRecordHeader(b, place[0], uint32(place[1])); !errors.Is(err, ErrCorrupt) {
			t.Error(place, err)
		}
	}
	if _, err := DecodeRecordHeader(make([]byte, RecordHeaderSize), 5, 8192); !errors.Is(err, ErrCorrupt) {
		t.Error("zeros are a record:", err)
	}
}

func TestSummaryIsBoundToItsPlace(t *testing.T) {
	_, f, b := testSummary()
	b = b[len(b)-SummaryFooterSize:]
	for _, place := range [][2]uint64{{16, testSummaryEnd}, {17, testSummaryEnd - 16}, {testSummaryEnd, 17}} {
		if _, err := DecodeSummaryFooter(b, place[0], uint32(place[1])); !errors.Is(err, ErrCorrupt) {
			t.Error(place, err)
		}
	}
	for name, spoil := range map[string]func(*SummaryFooter){
		"no sequence":           func(f *SummaryFooter) { f.FirstSeq = 0 },
		"no records":            func(f *SummaryFooter) { f.Records = 0 },
		"more than fit":         func(f *SummaryFooter) { f.Records = int(f.End) },
		"no end":                func(f *SummaryFooter) { f.End = ChunkHeaderSize },
		"behind the file's end": func(f *SummaryFooter) { f.End = testSummaryEnd },
	} {
		bad := f
		spoil(&bad)
		bad.Encode(b, 17, testSummaryEnd)
		if _, err := DecodeSummaryFooter(b, 17, testSummaryEnd); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRecordFields(t *testing.T) {
	good := RecordHeader{Seq: 1, Block: 32, Branch: 1, Kind: KindData, Codec: S2, Blocks: 16, PayloadLen: 40000}
	bad := map[string]func(h *RecordHeader){
		"no sequence":          func(h *RecordHeader) { h.Seq = 0 },
		"no branch":            func(h *RecordHeader) { h.Branch = 0 },
		"beyond every volume":  func(h *RecordHeader) { h.Block = MaxBlocks },
		"across a unit":        func(h *RecordHeader) { h.Block = 33 },
		"unknown codec":        func(h *RecordHeader) { h.Codec = 3 },
		"unknown kind":         func(h *RecordHeader) { h.Kind = 5 },
		"no kind":              func(h *RecordHeader) { h.Kind = 0 },
		"no payload":           func(h *RecordHeader) { h.PayloadLen = 0 },
		"raw and short":        func(h *RecordHeader) { h.Codec = Raw },
		"longer than raw":      func(h *RecordHeader) { h.PayloadLen = 16*BlockSize + 1 },
		"hole of a unit":       func(h *RecordHeader) { h.Kind, h.Codec, h.PayloadLen = KindHole, Raw, HoleSize },
		"compressed hole":      func(h *RecordHeader) { h.Kind, h.Blocks, h.PayloadLen = KindHole, 1, HoleSize },
		"hole with more":       func(h *RecordHeader) { *h = RecordHeader{Seq: 1, Branch: 1, Kind: KindHole, Blocks: 1, PayloadLen: 9} },
		"event of a branch":    func(h *RecordHeader) { *h = RecordHeader{Seq: 1, Branch: 1, Kind: KindEvent, Blocks: 1, PayloadLen: 9} },
		"event of a block":     func(h *RecordHeader) { *h = RecordHeader{Seq: 1, Block: 1, Kind: KindEvent, Blocks: 1, PayloadLen: 9} },
		"event without a text": func(h *RecordHeader) { *h = RecordHeader{Seq: 1, Kind: KindEvent, Blocks: 1} },
	}
	b := make([]byte, RecordHeaderSize)
	good.Encode(b, 1, 4096)
	if got, err := DecodeRecordHeader(b, 1, 4096); err != nil || got != good {
		t.Fatal(got, err)
	}
	for name, spoil := range bad {
		h := good
		spoil(&h)
		h.Encode(b, 1, 4096)
		if got, err := DecodeRecordHeader(b, 1, 4096); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, offset := range []uint32{0, 4080, 4100, MaxChunkSize - 16, ^uint32(15)} {
		good.Encode(b, 1, offset)
		if _, err := DecodeRecordHeader(b, 1, offset); !errors.Is(err, ErrCorrupt) {
			t.Error("offset", offset, err)
		}
	}
}

func TestLaterVersionsAreNamed(t *testing.T) {
	h := make([]byte, ChunkHeaderSize)
	testChunkHd.Encode(h)
	h[8] = 2
	le.PutUint32(h[40:], Checksum(h[:40]))
	_, chunkErr := DecodeChunkHeader(h)
	l := AppendLeaf(nil, testLeaf())
	l[4] = 2
	le.PutUint32(l, Checksum(l[4:]))
	_, storeErr := DecodeStoreInfo([]byte(`{"format":"vdisk store","version":6,"shape":"new"}`))
	for what, err := range map[string]error{"chunk": chunkErr, "leaf": DecodeLeaf(l, new(Leaf)), "store": storeErr} {
		if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "up to") || what == "store" && !strings.Contains(err.Error(), "version 6") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestStoreInfo(t *testing.T) {
	for text, want := range map[string]error{
		``:                                     ErrNotStore,
		`[]`:                                   ErrNotStore,
		`PK`:                                   ErrNotStore,
		`{"version":1}`:                        ErrNotStore,
		`{"format":"x","version":1}`:           ErrNotStore,
		`{"format":"vdisk store"}`:             ErrCorrupt,
		`{"format":"vdisk store","version":1}`: ErrCorrupt,
		`{"format":"vdisk store","version":1,"uuid":"123e4567-e89b-12d3-a456-4266141740"}`:         ErrCorrupt,
		`{"format":"vdisk store","version":1,"uuid":"123E4567-e89b-12d3-a456-426614174000"}`:       ErrCorrupt,
		`{"format":"vdisk store","version":1,"uuid":"123e4567e89b12d3a456426614174000"}`:           ErrCorrupt,
		`{"format":"vdisk store","version":1,"uuid":"123e4567-e89b-12d3-a456-426614174000","x":1}`: ErrCorrupt,
	} {
		if _, err := DecodeStoreInfo([]byte(text)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

func TestRowsAreChecked(t *testing.T) {
	if _, err := AppendRow(nil, 7); !errors.Is(err, errNotRow) {
		t.Error(err)
	}
	for _, v := range []any{7, nil, testVolume, (*Volume)(nil)} {
		if err := DecodeRow(make([]byte, 10), v); !errors.Is(err, errNotRow) {
			t.Errorf("%T: %v", v, err)
		}
	}
	spoilt := []func(v *Volume){
		func(v *Volume) { v.ID = 0 }, func(v *Volume) { v.Branch = 0 }, func(v *Volume) { v.Name = "a/b" },
		func(v *Volume) { v.Size = 0 }, func(v *Volume) { v.Size = maxVolumeSize + 1 }, func(v *Volume) { v.Codec = 3 },
		func(v *Volume) { v.Level = 20 }, func(v *Volume) { v.LogicalBlock = 1024 },
		func(v *Volume) { v.Created = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
	}
	for i, spoil := range spoilt {
		v := testVolume
		spoil(&v)
		if b, err := AppendRow([]byte("x"), v); err == nil || string(b) != "x" {
			t.Error(i, err)
		}
		if _, err := AppendEvent(nil, &Event{Volumes: []Volume{v}}); err == nil {
			t.Error(i, "event")
		}
	}
	seal := func(text string) []byte { return append(le.AppendUint32(nil, Checksum([]byte(text))), text...) }
	for _, text := range []string{
		``, `{`, `null`, `{}`, `{"id":1,"epoch":1} {}`, `{"id":1,"epoch":1}x`, `{"id":1,"epoch":1,"more":1}`,
		`{"id":-1,"epoch":1}`, `{"id":1,"epoch":1,"origin_branch":2}`, `{"id":1,"epoch":1,"origin_branch":1,"origin_epoch":1}`,
	} {
		if err := DecodeRow(seal(text), new(Branch)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", text, err)
		}
	}
	b := Branch{ID: 9, Epoch: 9, OriginBranch: 9, OriginEpoch: 9}
	if err := DecodeRow(seal(`{"id":1,"epoch":2}`), &b); err != nil || b != (Branch{ID: 1, Epoch: 2}) {
		t.Error(b, err, "something of the old row was left")
	}
}

func TestEventLimit(t *testing.T) {
	e := Event{Op: "x", DropVolumes: make([]uint32, 600_000)}
	if _, err := AppendEvent(nil, &e); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
}

func TestCheckName(t *testing.T) {
	for _, s := range []string{"a", "Z9", "0", "a.b_c-d", strings.Repeat("x", 63)} {
		if err := errors.Join(CheckName(s), CheckSnapshotName(s)); err != nil {
			t.Error(s, err)
		}
	}
	for _, s := range []string{"a:", "a+", "auto-2026-11-30T12:00:00+01:00"} {
		if err := CheckSnapshotName(s); err != nil {
			t.Error(s, err)
		}
		if err := CheckName(s); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", ".", "..", "-a", "_a", ":a", "+a", "a/b", "a b", "a@b", "ä", "a\n", "a\x00", strings.Repeat("x", 64)} {
		for _, err := range []error{CheckName(s), CheckSnapshotName(s)} {
			if !errors.Is(err, ErrName) {
				t.Errorf("%q: %v", s, err)
			}
		}
	}
}

func TestIsZero(t *testing.T) {
	p := make([]byte, 70)
	for n := range len(p) {
		if !IsZero(p[:n]) {
			t.Error(n, "zeros")
		}
		for i := range n {
			p[i] = 1
			if IsZero(p[:n]) {
				t.Error(n, i)
			}
			p[i] = 0
		}
	}
}

// mixed returns a unit with a random part of random length, so that codecs compress it more or less well.
func mixed(rng *rand.Rand, blocks int) []byte {
	p := make([]byte, blocks*BlockSize)
	random := rng.IntN(len(p) + 1)
	for i := range p[:random] {
		p[i] = byte(rng.Uint32())
	}
	for i := range p[random:] {
		p[random+i] = byte(i / 7)
	}
	return p
}
