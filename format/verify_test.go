package format

import (
	"bytes"
	"errors"
	"testing"
)

// A stored record is that of its entry, or an error: no bit of it may differ, and no other record is taken for it.
func TestVerifyRecord(t *testing.T) {
	const chunk, off = 17, uint32(ChunkHeaderSize + 4096)
	payload := bytes.Repeat([]byte("payload "), 20)
	record := func(h RecordHeader, payload []byte) []byte {
		h.PayloadLen, h.PayloadCRC = len(payload), Checksum(payload)
		p := make([]byte, h.Size())
		h.Encode(p, chunk, off)
		copy(p[RecordHeaderSize:], payload)
		return p
	}
	data := record(RecordHeader{Seq: 9, Block: 100, Branch: 3, Kind: KindData, Codec: S2, Blocks: 4}, payload)
	e := MakeEntry(5, off, len(data), 4, 2)
	unit, codec, err := VerifyRecord(data, chunk, e, 100)
	if err != nil || codec != S2 || !bytes.Equal(unit, payload) {
		t.Fatal(unit, codec, err)
	}
	var from [MovedSize]byte
	testMoved.Encode(from[:])
	moved := record(RecordHeader{Seq: 9, Block: 100, Branch: 3, Kind: KindMoved, Codec: Zstd, Blocks: 4}, append(from[:], payload...))
	if unit, codec, err := VerifyRecord(moved, chunk, MakeEntry(5, off, len(moved), 4, 0), 100); err != nil || codec != Zstd || !bytes.Equal(unit, payload) {
		t.Error("moved:", unit, codec, err)
	}
	for name, c := range map[string]struct {
		stored []byte
		seq    uint64
		e      Entry
		first  uint64
	}{
		"another block":          {data, chunk, e, 101},
		"another life":           {data, chunk + 1, e, 100},
		"another place":          {data, chunk, MakeEntry(5, off+16, len(data), 4, 2), 100},
		"another size":           {data, chunk, MakeEntry(5, off, len(data)+4*RecordAlign, 4, 2), 100},
		"fewer blocks":           {data, chunk, MakeEntry(5, off, len(data), 2, 1), 100},
		"an event":               {record(RecordHeader{Seq: 9, Kind: KindEvent, Blocks: 4, Block: 100}, payload), chunk, e, 100},
		"cut":                    {data[:RecordHeaderSize-1], chunk, e, 100},
		"what a hole looks like": {make([]byte, len(data)), chunk, e, 100},
	} {
		if _, _, err := VerifyRecord(c.stored, c.seq, c.e, c.first); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range (RecordHeaderSize + len(payload)) * 8 {
		bad := bytes.Clone(data)
		bad[i/8] ^= 1 << (i % 8)
		if _, _, err := VerifyRecord(bad, chunk, e, 100); !errors.Is(err, ErrCorrupt) {
			t.Errorf("bit %d: %v", i, err)
		}
	}
}
