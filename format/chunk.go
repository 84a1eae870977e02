package format

import "encoding/binary"

var le = binary.LittleEndian

const (
	chunkMagic     = "VDISKCHK"
	chunkHeaderEnd = 68 // what the header uses; the rest is zero
)

// ChunkHeader is the head of a chunk file: which chunk of which store it is.
type ChunkHeader struct {
	// Slot is the chunk's place in the directory. It is reused.
	Slot uint32
	// Seq is the chunk sequence number, which is never reused.
	Seq uint64
	// UUID is the store's.
	UUID [16]byte
	// Durable is a sequence number: every record before it was durable when the header was
	// written. 0 says nothing.
	Durable uint64
	// Checkpoint is a sequence number: when the header was written, a table as of that record had been committed. 0
	// says nothing.
	Checkpoint uint64
}

// Encode writes the header to dst, which has at least ChunkHeaderSize bytes.
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

// DecodeChunkHeader reads the header at the front of src. The padding is not
// looked at: damage to it costs nothing.
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
	if Checksum(src[:64]) == le.Uint32(src[64:]) { // else nothing is said: older programs take this for padding
		h.Checkpoint = le.Uint64(src[56:])
	}
	if h.Slot >= MaxSlots || h.Seq == 0 {
		return h, corrupt(what, "slot %d, chunk sequence %d", h.Slot, h.Seq)
	}
	return h, nil
}
