package format

import "encoding/binary"

var le = binary.LittleEndian

const (
	chunkMagic     = "VDISKCHK"
	chunkHeaderEnd = 68 // where the padding begins
)

// ChunkHeader is the header of a chunk file. It says which chunk the file is, and of what store.
type ChunkHeader struct {
	// Slot is the chunk's place in the directory, less than MaxSlots. A slot is reused after its chunk is dead.
	Slot uint32
	// Seq is the chunk sequence number, from 1. It is never used again once the chunk has a record.
	Seq uint64
	// UUID is the id of the store.
	UUID [16]byte
	// Durable is a sequence number: every record before it was durable when the header was written. 0 says nothing.
	Durable uint64
	// Checkpoint is a sequence number: when the header was written, a table as of this record had been committed. 0
	// says nothing.
	Checkpoint uint64
}

// Encode writes the header and its padding to the first ChunkHeaderSize bytes of dst. It panics if dst is shorter.
func (h *ChunkHeader) Encode(dst []byte) {
	dst = dst[:ChunkHeaderSize]
	clear(dst)
	copy(dst, chunkMagic)
	le.PutUint32(dst[8:], layoutVersion)
	le.PutUint32(dst[12:], h.Slot)
	le.PutUint64(dst[16:], h.Seq)
	copy(dst[24:], h.UUID[:])
	le.PutUint32(dst[40:], Checksum(dst[:40]))
	if h.Durable != 0 {
		le.PutUint64(dst[44:], h.Durable)
		le.PutUint32(dst[52:], Checksum(dst[:52]))
	}
	if h.Checkpoint != 0 {
		le.PutUint64(dst[56:], h.Checkpoint)
		le.PutUint32(dst[64:], Checksum(dst[:64]))
	}
}

// DecodeChunkHeader decodes the header at the front of src, which must have ChunkHeaderSize bytes or more. It does not
// look at the padding, because damage there costs nothing. It returns an error that matches ErrCorrupt or ErrVersion.
func DecodeChunkHeader(src []byte) (ChunkHeader, error) {
	const what = "chunk header"
	var h ChunkHeader
	if len(src) < ChunkHeaderSize {
		return h, corrupt(what, "%d bytes, want %d", len(src), ChunkHeaderSize)
	}
	src = src[:chunkHeaderEnd]
	if string(src[:8]) != chunkMagic {
		return h, corrupt(what, "magic %q", src[:8])
	}
	if got, want := Checksum(src[:40]), le.Uint32(src[40:]); got != want {
		return h, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	if err := checkVersion(what, int(le.Uint32(src[8:])), layoutVersion); err != nil {
		return h, err
	}
	h.Slot = le.Uint32(src[12:])
	h.Seq = le.Uint64(src[16:])
	copy(h.UUID[:], src[24:40])
	h.Durable = le.Uint64(src[44:])
	if got, want := Checksum(src[:52]), le.Uint32(src[52:]); got != want && h.Durable|uint64(want) != 0 {
		return ChunkHeader{}, corrupt(what, "second checksum %08x, want %08x", got, want)
	}
	// If this checksum does not verify, the header says nothing: older programs take it for padding.
	if Checksum(src[:64]) == le.Uint32(src[64:]) {
		h.Checkpoint = le.Uint64(src[56:])
	}
	if h.Slot >= MaxSlots || h.Seq == 0 {
		return h, corrupt(what, "slot %d, chunk sequence %d", h.Slot, h.Seq)
	}
	return h, nil
}
