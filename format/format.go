package format

import (
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	// StoreVersion is the version of a store as a whole, which its file "format" holds. A program refuses a store of a
	// higher version. Version 2 added moved records, and the rows of forwarded chunks and records. Version 3 leaves out
	// the zeros at the end of a compressed unit. Version 4 added the GUID and the holds of snapshots, and the
	// properties of volumes and what they are receiving. Version 5 added colons and plus signs in the names of snapshots.
	StoreVersion = 5
	// layoutVersion is the version of chunk headers, summaries, durable marks and leaves.
	layoutVersion = 1

	// BlockSize is the size of a block in bytes. A block is the unit of redirection.
	BlockSize = 4096
	// UnitBlocks is the largest number of blocks that are compressed together.
	UnitBlocks = 16
	// UnitSize is the size in bytes of a unit of that many blocks.
	UnitSize = UnitBlocks * BlockSize
	// LeafBlocks is the number of blocks that one leaf maps.
	LeafBlocks = 256
	// MaxBlocks is the largest number of blocks of a volume. Keys of the leaves bucket have 32 bits for the leaf's
	// number.
	MaxBlocks = LeafBlocks << 32

	// ChunkHeaderSize is the size of a chunk header in bytes, and the offset of the first record.
	ChunkHeaderSize = 4096
	// MaxChunkSize is the largest size of a chunk in bytes: the reach of the 22 bits of an entry's offset.
	MaxChunkSize = RecordAlign << entryOffsetBits
	// MaxSlots is the number of slots: the reach of the 24 bits of an entry's slot.
	MaxSlots = 1 << entrySlotBits

	// RecordHeaderSize is the size of a record header in bytes.
	RecordHeaderSize = 32
	// RecordAlign is the alignment in bytes of the offset and the size of every record.
	RecordAlign = 16
	// MaxPayload is the largest payload in bytes: the reach of the 20 bits of a record's payload length. Only an event
	// can be that long. The payload of a data record has at most UnitSize bytes.
	MaxPayload = 1<<20 - 1
	// MaxDataRecord is the size in bytes of the largest data or moved record.
	MaxDataRecord = (RecordHeaderSize + MovedSize + UnitSize + UnitBlocks*RecordAlign - 1) /
		(UnitBlocks * RecordAlign) * (UnitBlocks * RecordAlign)
)

var (
	// ErrCorrupt is matched by the error for bytes that do not verify or have an invalid value.
	ErrCorrupt = errors.New("corrupt")
	// ErrVersion is matched by the error for a format that is newer than this package.
	ErrVersion = errors.New("unsupported format version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C (Castagnoli) of p.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// MoreChecksum returns the checksum of what sum is the checksum of, followed by p. That of nothing is 0.
func MoreChecksum(sum uint32, p []byte) uint32 { return crc32.Update(sum, castagnoli, p) }

// saltedChecksum returns the CRC-32C of a chunk sequence number, an offset and p. It folds in the salt by table:
// hash/crc32 would move a local array that is passed as a slice to the heap.
func saltedChecksum(chunkSeq uint64, offset uint32, p []byte) uint32 {
	crc := ^uint32(0)
	for range 8 {
		crc = castagnoli[byte(crc)^byte(chunkSeq)] ^ crc>>8
		chunkSeq >>= 8
	}
	for range 4 {
		crc = castagnoli[byte(crc)^byte(offset)] ^ crc>>8
		offset >>= 8
	}
	return crc32.Update(^crc, castagnoli, p)
}

func corrupt(what, format string, args ...any) error {
	return fmt.Errorf("%s: %w: %s", what, ErrCorrupt, fmt.Sprintf(format, args...))
}

// checkVersion distinguishes damage (ErrCorrupt) from a format of a later program (ErrVersion).
func checkVersion(what string, version, newest int) error {
	switch {
	case version > newest:
		return fmt.Errorf("%s: %w: it has version %d, this program knows up to %d", what, ErrVersion, version, newest)
	case version < 1:
		return corrupt(what, "version %d", version)
	}
	return nil
}

// IsZero reports whether every byte of p is zero. It is true of an empty p.
func IsZero(p []byte) bool {
	// p is all zeros if it begins with a zero and equals itself shifted by one byte. This is one vectorised comparison,
	// and most data fails at its first byte.
	return len(p) == 0 || p[0] == 0 && string(p[1:]) == string(p[:len(p)-1])
}
