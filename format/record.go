package format

import "fmt"

// Kind is the kind of a record.
type Kind uint8

// The kinds of records.
const (
	KindData  Kind = 1 // a unit of blocks
	KindHole  Kind = 2 // a range of blocks that read as zeros from this record on
	KindEvent Kind = 3 // a change of the tables of volumes, snapshots and branches
	KindMoved Kind = 4 // a unit that the cleaner copied; the entries of its blocks stay as they are
)

// String returns the kind's name: data, hole, event or moved.
func (k Kind) String() string {
	switch k {
	case KindData:
		return "data"
	case KindHole:
		return "hole"
	case KindEvent:
		return "event"
	case KindMoved:
		return "moved"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// HoleSize is the length in bytes of a hole record's payload.
const HoleSize = 8

// RecordHeader is the header of a record of the log.
type RecordHeader struct {
	// Seq is the record's sequence number, from 1.
	Seq uint64
	// Block is the number of the first block, or 0 for an event.
	Block uint64
	// Branch is the branch to which the blocks belong, or 0 for an event.
	Branch uint32
	Kind   Kind
	Codec  Codec
	// Blocks is the number of blocks in the unit of a data or moved record, and 1 for the other kinds. A unit does not
	// cross a multiple of UnitBlocks.
	Blocks int
	// PayloadLen is the length in bytes of the payload as stored.
	PayloadLen int
	// PayloadCRC is the Checksum of the payload as stored.
	PayloadCRC uint32
}

// Size returns the size in bytes of the whole record. The record is padded so that each block of the unit accounts for
// the same multiple of RecordAlign.
func (h *RecordHeader) Size() int { return recordSize(h.PayloadLen, h.Blocks) }

func recordSize(payloadLen, blocks int) int {
	align := RecordAlign * max(blocks, 1)
	n := RecordHeaderSize + payloadLen + align - 1
	return n - n%align
}

// Encode writes the header to the first RecordHeaderSize bytes of dst, for a record at offset in the chunk with
// sequence number chunkSeq. It panics if dst is shorter.
func (h *RecordHeader) Encode(dst []byte, chunkSeq uint64, offset uint32) {
	dst = dst[:RecordHeaderSize]
	le.PutUint32(dst[4:], h.PayloadCRC)
	le.PutUint64(dst[8:], h.Seq)
	le.PutUint64(dst[16:], h.Block)
	le.PutUint32(dst[24:], h.Branch)
	lengths := uint32(h.PayloadLen)&MaxPayload | uint32(h.Blocks-1)<<20
	le.PutUint32(dst[28:], uint32(h.Kind)<<4|uint32(h.Codec)&0xf|lengths<<8)
	le.PutUint32(dst, saltedChecksum(chunkSeq, offset, dst[4:]))
}

// DecodeRecordHeader decodes the header at the front of src, which was read at offset in the chunk with sequence number
// chunkSeq. It accepts a header only if it was written for that place and its fields are valid. The error matches
// ErrCorrupt.
func DecodeRecordHeader(src []byte, chunkSeq uint64, offset uint32) (RecordHeader, error) {
	if len(src) < RecordHeaderSize {
		return RecordHeader{}, corruptRecord(chunkSeq, offset, "%d bytes of header", len(src))
	}
	src = src[:RecordHeaderSize]
	if got, want := saltedChecksum(chunkSeq, offset, src[4:]), le.Uint32(src); got != want {
		return RecordHeader{}, corruptRecord(chunkSeq, offset, "header checksum %08x, want %08x", got, want)
	}
	last := le.Uint32(src[28:])
	h := RecordHeader{
		PayloadCRC: le.Uint32(src[4:]),
		Seq:        le.Uint64(src[8:]),
		Block:      le.Uint64(src[16:]),
		Branch:     le.Uint32(src[24:]),
		Kind:       Kind(last >> 4 & 0xf),
		Codec:      Codec(last & 0xf),
		PayloadLen: int(last >> 8 & MaxPayload),
		Blocks:     int(last>>28) + 1,
	}
	if what := h.invalid(); what != "" {
		return RecordHeader{}, corruptRecord(chunkSeq, offset, "%s: %+v", what, h)
	}
	if offset%RecordAlign != 0 || offset < ChunkHeaderSize || int64(offset)+int64(h.Size()) > MaxChunkSize {
		return RecordHeader{}, corruptRecord(chunkSeq, offset, "%d bytes do not lie in the chunk", h.Size())
	}
	return h, nil
}

// IsRecordHeader reports whether the header checksum at the front of src is that of a header written for this place. It
// is for callers that look for records where there are most likely none, because unlike DecodeRecordHeader it makes no
// error.
func IsRecordHeader(src []byte, chunkSeq uint64, offset uint32) bool {
	return len(src) >= RecordHeaderSize && saltedChecksum(chunkSeq, offset, src[4:RecordHeaderSize]) == le.Uint32(src)
}

// WasRecordHeader reports whether src looks like the header of the record seq that was written for this place and is
// damaged: it has that number, or would verify if it had. Chance, or a former life of the file, hardly brings either
// about.
func WasRecordHeader(src []byte, chunkSeq uint64, offset uint32, seq uint64) bool {
	if len(src) < RecordHeaderSize || seq == 0 {
		return false
	}
	if le.Uint64(src[8:]) == seq {
		return true
	}
	var p [RecordHeaderSize]byte
	copy(p[:], src)
	le.PutUint64(p[8:], seq)
	return IsRecordHeader(p[:], chunkSeq, offset)
}

func corruptRecord(chunkSeq uint64, offset uint32, format string, args ...any) error {
	return corrupt(fmt.Sprintf("record at %d of chunk %d", offset, chunkSeq), format, args...)
}

// invalid describes what is wrong with the header, or returns "".
func (h *RecordHeader) invalid() string {
	if h.Seq == 0 {
		return "no sequence number"
	}
	if h.Kind != KindData && h.Kind != KindMoved && (h.Codec != Raw || h.Blocks != 1) {
		return "a unit outside a data record"
	}
	switch h.Kind {
	case KindData:
		return h.invalidData(h.PayloadLen)
	case KindMoved:
		return h.invalidData(h.PayloadLen - MovedSize)
	case KindHole:
		if h.Branch == 0 || h.Block >= MaxBlocks || h.PayloadLen != HoleSize {
			return "invalid hole"
		}
	case KindEvent:
		if h.Branch != 0 || h.Block != 0 || h.PayloadLen == 0 {
			return "invalid event"
		}
	default:
		return "unknown kind"
	}
	return ""
}

func (h *RecordHeader) invalidData(stored int) string {
	full := h.Blocks * BlockSize
	switch {
	case h.Branch == 0 || h.Block >= MaxBlocks:
		return "block outside every volume"
	case int(h.Block%UnitBlocks)+h.Blocks > UnitBlocks:
		return "unit crosses a unit boundary"
	case h.Codec > Zstd:
		return "unknown codec"
	case h.Codec == Raw && stored != full, stored <= 0 || stored > full:
		return "invalid payload length"
	}
	return ""
}

// VerifyPayload returns nil if payload, as stored, has the length and the checksum in the header. Otherwise it returns
// an error that matches ErrCorrupt.
func (h *RecordHeader) VerifyPayload(payload []byte) error {
	if len(payload) == h.PayloadLen && Checksum(payload) == h.PayloadCRC {
		return nil
	}
	what := fmt.Sprintf("payload of record %d (%v, branch %d, block %d)", h.Seq, h.Kind, h.Branch, h.Block)
	if len(payload) != h.PayloadLen {
		return corrupt(what, "%d bytes, want %d", len(payload), h.PayloadLen)
	}
	return corrupt(what, "checksum %08x, want %08x", Checksum(payload), h.PayloadCRC)
}

// VerifyRecord checks that stored is the record that e names: of this life of the chunk, at this offset, of a unit that
// begins at block first, and with an intact payload. It returns the unit as stored, and its codec. The error matches
// ErrCorrupt.
func VerifyRecord(stored []byte, chunkSeq uint64, e Entry, first uint64) (unit []byte, codec Codec, err error) {
	h, err := DecodeRecordHeader(stored, chunkSeq, e.Offset())
	if err != nil {
		return nil, 0, err
	}
	if h.Kind != KindData && h.Kind != KindMoved || h.Blocks != e.Blocks() || h.Size() != e.Size() || h.Block != first {
		return nil, 0, fmt.Errorf("the record is of block %d (%d blocks, %d bytes), not of block %d: %w", h.Block, h.Blocks, h.Size(), first, ErrCorrupt)
	}
	unit = stored[RecordHeaderSize : RecordHeaderSize+h.PayloadLen]
	err = h.VerifyPayload(unit)
	if h.Kind == KindMoved {
		unit = unit[MovedSize:]
	}
	return unit, h.Codec, err
}

// EncodeHole writes the payload of a hole record to the first HoleSize bytes of dst. It panics if dst is shorter.
func EncodeHole(dst []byte, blocks uint64) { le.PutUint64(dst[:HoleSize], blocks) }

// DecodeHole decodes the payload of a hole record that begins at block. It returns the number of blocks, and an error
// that matches ErrCorrupt if they do not lie in a volume of MaxBlocks.
func DecodeHole(payload []byte, block uint64) (blocks uint64, err error) {
	if len(payload) != HoleSize {
		return 0, corrupt("hole", "%d bytes, want %d", len(payload), HoleSize)
	}
	blocks = le.Uint64(payload)
	if block >= MaxBlocks || blocks == 0 || blocks > MaxBlocks-block {
		return 0, corrupt("hole", "%d blocks at block %d", blocks, block)
	}
	return blocks, nil
}

// MovedSize is the number of bytes before the unit in the payload of a moved record.
const MovedSize = 16

// Moved says what a moved record is a copy of. From is the entry of the first block of the unit at the place that the
// leaves name. Mask has a bit for each block of the unit that was alive, the lowest for the first block.
type Moved struct {
	From Entry
	Mask uint16
}

// Encode writes m to the first MovedSize bytes of dst. It panics if dst is shorter.
func (m Moved) Encode(dst []byte) {
	le.PutUint64(dst, uint64(m.From))
	le.PutUint64(dst[8:MovedSize], uint64(m.Mask))
}

// DecodeMoved decodes the bytes before the unit in the payload of a moved record. h is the header of the record. The
// error matches ErrCorrupt.
func DecodeMoved(h *RecordHeader, payload []byte) (m Moved, err error) {
	if len(payload) < MovedSize {
		return m, corrupt("moved record", "%d bytes", len(payload))
	}
	m.From = Entry(le.Uint64(payload))
	mask := le.Uint64(payload[8:])
	if m.From.IsHole() || !m.From.Valid() || m.From.Index() != 0 || m.From.Blocks() != h.Blocks || mask == 0 || mask>>h.Blocks != 0 {
		return m, corrupt("moved record", "blocks %#x of %v, in a unit of %d", mask, m.From, h.Blocks)
	}
	m.Mask = uint16(mask)
	return m, nil
}
