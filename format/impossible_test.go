package format

import (
	"errors"
	"testing"
)

// TestImpossibleValues: what verifies and cannot be is damage all the same. Nothing that another program, or a fault of
// this one, has put under a checksum may lead behind a chunk, a volume or a table of slots.
func TestImpossibleValues(t *testing.T) {
	moved := RecordHeader{Seq: 1, Branch: 1, Kind: KindMoved, Codec: Raw, Blocks: 2, PayloadLen: MovedSize + 2*BlockSize}
	from := MakeEntry(1, 4096, 2*64, 2, 0)
	decodeMoved := func(m Moved) error {
		p := make([]byte, moved.PayloadLen)
		m.Encode(p)
		_, err := DecodeMoved(&moved, p)
		return err
	}
	decodeHole := func(block, blocks uint64) error {
		p := make([]byte, HoleSize)
		EncodeHole(p, blocks)
		_, err := DecodeHole(p, block)
		return err
	}
	decodeHeader := func(h ChunkHeader) error {
		p := make([]byte, ChunkHeaderSize)
		h.Encode(p)
		_, err := DecodeChunkHeader(p)
		return err
	}
	decodeLeaf := func(runs ...byte) error {
		p := make([]byte, leafHeaderSize, leafHeaderSize+len(runs))
		p[4] = layoutVersion
		p = append(p, runs...)
		le.PutUint32(p, Checksum(p[4:]))
		return DecodeLeaf(p, new(Leaf))
	}
	decodeChunk := func(c Chunk) error {
		p := c.Encode()
		_, err := DecodeChunk(c.Slot, p[:])
		return err
	}
	whole := AppendLeaf(nil, new(Leaf))[leafHeaderSize:]
	for name, err := range map[string]error{
		"a hole":         decodeHole(MaxBlocks-1, 1),
		"a moved record": decodeMoved(Moved{From: from, Mask: 3}),
		"a header":       decodeHeader(ChunkHeader{Slot: MaxSlots - 1, Seq: 1}),
		"a leaf":         decodeLeaf(whole...),
		"a row":          decodeChunk(Chunk{Slot: MaxSlots - 1, Seq: 1, End: MaxChunkSize, Live: MaxChunkSize}),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"a hole of nothing":                      decodeHole(0, 0),
		"a hole behind the largest volume":       decodeHole(MaxBlocks, 1),
		"a hole over the end of the largest":     decodeHole(MaxBlocks-1, 2),
		"a hole whose end does not fit 64 bits":  decodeHole(1, ^uint64(0)),
		"a moved record of no block":             decodeMoved(Moved{From: from}),
		"a moved record of more blocks than it":  decodeMoved(Moved{From: from, Mask: 7}),
		"a moved record of a hole":               decodeMoved(Moved{Mask: 3}),
		"a moved record of another size":         decodeMoved(Moved{From: MakeEntry(1, 4096, 64, 1, 0), Mask: 1}),
		"a moved record of a part":               decodeMoved(Moved{From: from.WithIndex(1), Mask: 3}),
		"a chunk in no slot":                     decodeHeader(ChunkHeader{Slot: MaxSlots, Seq: 1}),
		"a chunk without a number":               decodeHeader(ChunkHeader{}),
		"a leaf without blocks":                  decodeLeaf(),
		"a leaf with a part of a run":            decodeLeaf(whole[:len(whole)-1]...),
		"a leaf with a block more":               decodeLeaf(append([]byte{0}, whole...)...),
		"a leaf with something behind it":        decodeLeaf(append(append([]byte{}, whole...), 0)...),
		"a row of a chunk that is too long":      decodeChunk(Chunk{Seq: 1, End: MaxChunkSize + RecordAlign}),
		"a row of a chunk with more than it has": decodeChunk(Chunk{Seq: 1, End: 4096, Live: 4097}),
		"a row of a chunk without a number":      decodeChunk(Chunk{End: 4096}),
		"a row of a chunk that ends in a record": decodeChunk(Chunk{Seq: 1, End: 4097}),
		"a row of a chunk in no slot":            decodeChunk(Chunk{Slot: MaxSlots, Seq: 1, End: 4096}),
	} {
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
