// Package format holds the byte formats of a store: chunk headers, records,
// leaves, table rows, events and codecs. It does no I/O. docs/format.md, The store on disk,
// is the description; the files in testdata/format are examples of every
// structure.
//
// No decoder panics on any input. A decoder that rejects its input returns an
// error that matches ErrCorrupt or ErrVersion and says what is wrong with what.
// A decoder allocates at most in proportion to its input.
package format

import (
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	// StoreVersion is the version of a store as a whole.
	// Version 2 added moved records, and the rows of forwarded chunks and records.
	// Version 3 leaves zeros at the end of a compressed unit out.
	StoreVersion = 3
	// layoutVersion is that of chunk headers, summaries and leaves.
	layoutVersion = 1

	// BlockSize is the unit of redirection.
	BlockSize = 4096
	// UnitBlocks is the most blocks that are compressed together.
	UnitBlocks = 16
	// LeafBlocks is the number of blocks that one leaf maps.
	LeafBlocks = 256
	// MaxBlocks is the most blocks of a volume: a leaf's number has 32 bits in
	// the keys of the leaves bucket.
	MaxBlocks = LeafBlocks << 32

	// ChunkHeaderSize is where the records of a chunk begin.
	ChunkHeaderSize = 4096
	// MaxChunkSize is what the 22 bits of an entry's offset reach.
	MaxChunkSize = RecordAlign << entryOffsetBits
	// MaxSlots is what the 24 bits of an entry's slot reach.
	MaxSlots = 1 << entrySlotBits

	// RecordHeaderSize is the size of a record's header.
	RecordHeaderSize = 32
	// RecordAlign divides every offset and size in a chunk.
	RecordAlign = 16
	// MaxPayload is what the 20 bits of a record's payload length reach. Only
	// an event is that long: data is at most UnitBlocks * BlockSize.
	MaxPayload = 1<<20 - 1
	// MaxDataRecord is the size of the largest data record.
	MaxDataRecord = (RecordHeaderSize + MovedSize + UnitBlocks*BlockSize + UnitBlocks*RecordAlign - 1) /
		(UnitBlocks * RecordAlign) * (UnitBlocks * RecordAlign)
)

var (
	// ErrCorrupt is matched by an error about bytes that are not what they
	// should be.
	ErrCorrupt = errors.New("corrupt")
	// ErrVersion is matched by an error about a format newer than this package.
	ErrVersion = errors.New("unsupported format version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum returns the CRC-32C (Castagnoli) of p.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// saltedChecksum returns the CRC-32C of a chunk sequence number, an offset and
// p. The salt is folded in by table: a slice of a local array passed to
// hash/crc32 would move the array to the heap.
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

// checkVersion tells damage from a format of the future.
func checkVersion(what string, version, newest int) error {
	switch {
	case version > newest:
		return fmt.Errorf("%s: %w: it has version %d, this program knows up to %d", what, ErrVersion, version, newest)
	case version < 1:
		return corrupt(what, "version %d", version)
	}
	return nil
}

// IsZero reports whether every byte of p is zero.
func IsZero(p []byte) bool {
	// p is all zeros if it begins with one and equals itself shifted by one:
	// that makes it one vectorised comparison, and most data fails at once.
	return len(p) == 0 || p[0] == 0 && string(p[1:]) == string(p[:len(p)-1])
}
