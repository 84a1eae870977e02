package format

import (
	"cmp"
	"fmt"
	"slices"
)

// Forward says where the cleaner has put a record whose entries name another place.
type Forward struct {
	// Offset is the offset of the record in the chunk that the entries name.
	Offset uint32
	// Mask has a bit for each block of the unit that is alive, the lowest for the first block. It is never 0.
	Mask uint16
	// To is the entry of the first block of the unit, where the record is now.
	To Entry
}

const (
	forwardSize = 14
	// ForwardRegion is the number of bytes of a chunk that one row of forwards covers.
	ForwardRegion = 1 << 16
)

// AppendForwards appends the encoding of the forwards of one region to dst and returns the extended slice. fs has one
// or more forwards, in the order of their offsets.
func AppendForwards(dst []byte, fs []Forward) []byte {
	at := len(dst)
	dst = append(dst, 0, 0, 0, 0)
	for _, f := range fs {
		dst = le.AppendUint32(dst, f.Offset)
		dst = le.AppendUint16(dst, f.Mask)
		dst = le.AppendUint64(dst, uint64(f.To))
	}
	le.PutUint32(dst[at:], Checksum(dst[at+4:]))
	return dst
}

// DecodeForwards decodes the forwards of a region, which are all of src. The region is its number in the chunk: offset
// / ForwardRegion. The forwards are in the order of their offsets. The error matches ErrCorrupt.
func DecodeForwards(region uint16, src []byte) ([]Forward, error) {
	what := fmt.Sprintf("forwards of region %d", region)
	if len(src) < 4+forwardSize || (len(src)-4)%forwardSize != 0 {
		return nil, corrupt(what, "%d bytes", len(src))
	}
	if got, want := Checksum(src[4:]), le.Uint32(src); got != want {
		return nil, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	fs := make([]Forward, 0, (len(src)-4)/forwardSize)
	for src = src[4:]; len(src) > 0; src = src[forwardSize:] {
		f := Forward{Offset: le.Uint32(src), Mask: le.Uint16(src[4:]), To: Entry(le.Uint64(src[6:]))}
		switch {
		case f.Offset/ForwardRegion != uint32(region), f.Offset%RecordAlign != 0, len(fs) > 0 && f.Offset <= fs[len(fs)-1].Offset:
			return nil, corrupt(what, "offset %d", f.Offset)
		case f.To.IsHole(), !f.To.Valid(), f.To.Index() != 0, f.Mask == 0, f.Mask>>f.To.Blocks() != 0 && f.To.Blocks() < UnitBlocks:
			return nil, corrupt(what, "blocks %#x of %v", f.Mask, f.To)
		}
		fs = append(fs, f)
	}
	return fs, nil
}

// SearchForwards finds the forward of the record at offset among those of a region, which are in the order of their
// offsets. found is false if there is none; i is then where it would be.
func SearchForwards(fs []Forward, offset uint32) (i int, found bool) {
	return slices.BinarySearchFunc(fs, offset, func(f Forward, offset uint32) int { return cmp.Compare(f.Offset, offset) })
}

// Forwarded is the row of a chunk from which blocks were moved. The blocks are alive and lie in other chunks, and
// entries still name them by this chunk.
type Forwarded struct {
	Slot   uint32 // the slot of the chunk, which is the row's key
	Seq    uint64 // the sequence number of the chunk
	Blocks uint32 // the number of live blocks that were moved
}

// ForwardedRowSize is the size in bytes of an encoded Forwarded.
const ForwardedRowSize = 16

// Encode returns the encoding of the row, without its slot.
func (r *Forwarded) Encode() [ForwardedRowSize]byte {
	var b [ForwardedRowSize]byte
	le.PutUint64(b[4:], r.Seq)
	le.PutUint32(b[12:], r.Blocks)
	le.PutUint32(b[:], Checksum(b[4:]))
	return b
}

// DecodeForwarded decodes the row of the chunk in slot, which is all of src. The error matches ErrCorrupt.
func DecodeForwarded(slot uint32, src []byte) (Forwarded, error) {
	what := fmt.Sprintf("row of forwarded slot %08x", slot)
	if len(src) != ForwardedRowSize {
		return Forwarded{}, corrupt(what, "%d bytes, want %d", len(src), ForwardedRowSize)
	}
	if got, want := Checksum(src[4:]), le.Uint32(src); got != want {
		return Forwarded{}, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	r := Forwarded{Slot: slot, Seq: le.Uint64(src[4:]), Blocks: le.Uint32(src[12:])}
	if r.Slot >= MaxSlots || r.Seq == 0 || r.Blocks == 0 {
		return Forwarded{}, corrupt(what, "%+v", r)
	}
	return r, nil
}
