package format

import "fmt"

// Forward says where the cleaner has put a unit whose entries name another place.
type Forward struct {
	// Offset is the record's in the chunk that the entries name.
	Offset uint32
	// Mask has a bit for each block of the unit that is alive.
	Mask uint16
	// To is the entry of the unit's first block where it is now.
	To Entry
}

const (
	forwardSize = 14
	// ForwardRegion is how much of a chunk one row of forwards is about.
	ForwardRegion = 1 << 16
)

// AppendForwards appends the encoding of a region's forwards, which are in the order of their offsets.
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

// DecodeForwards reads the forwards of a region.
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

// Forwarded is the row of a chunk of which blocks have been moved: they are alive and in other chunks,
// and entries name them by this one.
type Forwarded struct {
	Slot   uint32 // the row's key
	Seq    uint64 // of the chunk
	Blocks uint32
}

// ForwardedRowSize is the size of an encoded Forwarded.
const ForwardedRowSize = 16

// Encode returns the encoding of the row, without its slot.
func (r *Forwarded) Encode() [ForwardedRowSize]byte {
	var b [ForwardedRowSize]byte
	le.PutUint64(b[4:], r.Seq)
	le.PutUint32(b[12:], r.Blocks)
	le.PutUint32(b[:], Checksum(b[4:]))
	return b
}

// DecodeForwarded reads the row of the chunk that was in slot.
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
