package metadata

import (
	"bytes"
	"encoding/binary"

	"github.com/vdisk/vdisk/format"
)

// Region names a part of a chunk, format.ForwardRegion bytes long, from which records have been moved.
type Region struct {
	Slot   uint32 // the slot of the chunk
	Number uint16 // the number of the region in the chunk: offset / format.ForwardRegion
}

// RegionOf returns the region of the record that e names.
func RegionOf(e format.Entry) Region {
	return Region{Slot: e.Slot(), Number: uint16(e.Offset() / format.ForwardRegion)}
}

func (r Region) key() (k [6]byte) {
	binary.BigEndian.PutUint32(k[0:], r.Slot)
	binary.BigEndian.PutUint16(k[4:], r.Number)
	return k
}

// Forwards returns where the moved records of a region are, in the order of their offsets. It returns nil if the region
// has none.
func (t *Tx) Forwards(r Region) ([]format.Forward, error) {
	b := t.tx.Bucket(bucketForwards)
	if b == nil {
		return nil, nil // an older program's table, which has not been adopted yet
	}
	k := r.key()
	v := b.Get(k[:])
	if v == nil {
		return nil, nil
	}
	fs, err := format.DecodeForwards(r.Number, v)
	if err != nil {
		return nil, t.damaged(err, "moved records of chunk %08x", r.Slot)
	}
	return fs, nil
}

// PutForwards stores the forwards of a region, one or more. value is their encoding (format.AppendForwards).
func (t *Tx) PutForwards(r Region, value []byte) error {
	k := r.key()
	return t.set(bucketForwards, k[:], value)
}

// DropForwards removes the forwards of a region. It is no error if there are none.
func (t *Tx) DropForwards(r Region) error {
	k := r.key()
	return t.drop(bucketForwards, k[:])
}

// EachRegion calls fn for every region that has forwards, in the order of slot and number. If a region is damaged, fn
// gets the damage as bad. EachRegion stops at the first error that fn returns, and returns it.
func (t *Tx) EachRegion(fn func(r Region, fs []format.Forward, bad error) error) error {
	b := t.tx.Bucket(bucketForwards)
	if b == nil {
		return nil // as in Forwards
	}
	return b.ForEach(func(k, v []byte) error { return t.eachRegion(k, v, fn) })
}

func (t *Tx) eachRegion(k, v []byte, fn func(r Region, fs []format.Forward, bad error) error) error {
	if len(k) != 6 {
		return fn(Region{}, nil, t.damaged(format.ErrCorrupt, "forwards key %x", k))
	}
	r := Region{binary.BigEndian.Uint32(k), binary.BigEndian.Uint16(k[4:])}
	fs, err := format.DecodeForwards(r.Number, v)
	return fn(r, fs, err)
}

// RegionsOf is EachRegion for the regions of one slot.
func (t *Tx) RegionsOf(slot uint32, fn func(r Region, fs []format.Forward, bad error) error) error {
	b := t.tx.Bucket(bucketForwards)
	if b == nil {
		return nil // as in Forwards
	}
	first, c := id(slot), b.Cursor()
	for k, v := c.Seek(first); bytes.HasPrefix(k, first); k, v = c.Next() {
		if err := t.eachRegion(k, v, fn); err != nil {
			return err
		}
	}
	return nil
}

// PutForwarded stores the row of a chunk from which blocks have been moved.
func (t *Tx) PutForwarded(r *format.Forwarded) error {
	v := r.Encode()
	return t.set(bucketForwarded, id(r.Slot), v[:])
}

// DropForwarded removes the row of a slot. It is no error if there is none.
func (t *Tx) DropForwarded(slot uint32) error { return t.drop(bucketForwarded, id(slot)) }

func (t *Tx) forwarded(out *[]format.Forwarded) error {
	b := t.tx.Bucket(bucketForwarded)
	if b == nil {
		return nil // as in Forwards
	}
	return b.ForEach(func(k, v []byte) error {
		if len(k) != 4 {
			return t.damaged(format.ErrCorrupt, "forwarded row %x", k)
		}
		r, err := format.DecodeForwarded(binary.BigEndian.Uint32(k), v)
		if err != nil {
			return t.damaged(err, "forwarded row %x", k)
		}
		*out = append(*out, r)
		return nil
	})
}
