package format

import "fmt"

// The bits of an entry, from the lowest. The package comment draws them.
const (
	entryOffsetBits = 22
	entryShareBits  = 9
	entryBlocksBits = 4
	entryIndexBits  = 4
	entrySlotBits   = 24

	entryShareAt  = entryOffsetBits
	entryBlocksAt = entryShareAt + entryShareBits
	entryIndexAt  = entryBlocksAt + entryBlocksBits
	entrySlotAt   = entryIndexAt + entryIndexBits

	entrySet        = 1 << 63
	entryIndexMask  = (1<<entryIndexBits - 1) << entryIndexAt
	entryPlaceMask  = 1<<entryBlocksAt - 1 // offset and share
	entryOffsetMask = 1<<entryOffsetBits - 1
	entryShareMask  = 1<<entryShareBits - 1

	// A record is larger than its header. A block accounts for at most its own size and the headers of a moved record
	// of a single block.
	minRecord = RecordHeaderSize + RecordAlign
	maxShare  = (RecordHeaderSize + MovedSize + BlockSize) / RecordAlign
)

// Entry says where in the log the content of one block is. The zero entry is a hole: the block reads as zeros. The
// methods that return parts of an entry mean something only for an entry that is Valid and no hole.
type Entry uint64

// MakeEntry returns the entry of one block of a unit. The unit has the given number of blocks, 1 to UnitBlocks, and
// index is the place of the block in it, from 0. The record of the unit has size bytes, and begins at offset in the
// chunk in slot. If no such record is possible, MakeEntry returns an entry that is not Valid.
func MakeEntry(slot, offset uint32, size, blocks, index int) Entry {
	const bad = Entry(entrySet)
	if blocks < 1 || blocks > UnitBlocks || index < 0 || index >= blocks || slot >= MaxSlots ||
		offset%RecordAlign != 0 || offset >= MaxChunkSize ||
		size < minRecord || size > MaxDataRecord || size%(blocks*RecordAlign) != 0 {
		return bad
	}
	share := uint64(size) / RecordAlign / uint64(blocks)
	if share > maxShare {
		return bad
	}
	return Entry(entrySet | uint64(offset)/RecordAlign | share<<entryShareAt |
		uint64(blocks-1)<<entryBlocksAt | uint64(index)<<entryIndexAt | uint64(slot)<<entrySlotAt)
}

// IsHole reports whether the block reads as zeros.
func (e Entry) IsHole() bool { return e == 0 }

// Slot returns the slot of the record's chunk.
func (e Entry) Slot() uint32 { return uint32(e >> entrySlotAt & (MaxSlots - 1)) }

// Offset returns the offset in bytes of the record in its chunk.
func (e Entry) Offset() uint32 { return uint32(e&entryOffsetMask) * RecordAlign }

// Size returns the size of the record in bytes.
func (e Entry) Size() int { return int(e.Share()) * e.Blocks() }

// Blocks returns the number of blocks in the unit, 1 to UnitBlocks.
func (e Entry) Blocks() int { return int(e>>entryBlocksAt&(UnitBlocks-1)) + 1 }

// Index returns the block's place in the unit, from 0.
func (e Entry) Index() int { return int(e >> entryIndexAt & (UnitBlocks - 1)) }

// Share returns the number of bytes of the record that the block accounts for. The shares of a unit's blocks add up to
// the size of its record.
func (e Entry) Share() uint32 { return uint32(e>>entryShareAt&entryShareMask) * RecordAlign }

// SameRecord reports whether both entries name blocks of the same record.
func (e Entry) SameRecord(o Entry) bool { return (e^o)&^entryIndexMask == 0 }

// WithIndex returns the entry of the block at place i in the same unit. i must be less than e.Blocks().
func (e Entry) WithIndex(i int) Entry {
	return e&^entryIndexMask | Entry(i)<<entryIndexAt&entryIndexMask
}

// Valid reports whether the entry is a hole, or names a place where a record can be.
func (e Entry) Valid() bool {
	if e == 0 {
		return true
	}
	size := uint32(e.Size())
	return e&entrySet != 0 && e.Index() < e.Blocks() && e.Share() <= maxShare*RecordAlign &&
		size >= minRecord && size <= MaxDataRecord &&
		e.Offset() >= ChunkHeaderSize && e.Offset()+size <= MaxChunkSize
}

// String describes the entry for messages.
func (e Entry) String() string {
	if e.IsHole() {
		return "hole"
	}
	s := fmt.Sprintf("%08x+%d/%d:%d/%d", e.Slot(), e.Offset(), e.Size(), e.Index(), e.Blocks())
	if !e.Valid() {
		s = fmt.Sprintf("invalid(%#x %s)", uint64(e), s)
	}
	return s
}
