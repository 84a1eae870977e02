package cow

import "github.com/vdisk/vdisk/format"

// Depths calls fn for the runs of a range, in order and without gaps, until fn returns false. depth is 0 for holes, 1 for
// data that was written to the volume itself, 2 for data that a clone has from its origin, and so on.
//
// Depths loads each leaf of the range once for each level down to the oldest data in it.
func (d *Device) Depths(off, length int64, fn func(off, length int64, depth int) bool) error {
	var own, older format.Leaf
	err := extentRuns(d, off, length, 0, fn, func(index uint32, depths *[format.LeafBlocks]int) error {
		return d.depths(index, depths, &own, &older)
	})
	return wrapIf(err, "depths of %s", d.ref)
}

// depths finds the depths of a leaf's blocks. It uses own and older as memory. A block is as old as the oldest point of
// the device's line from which on all have the same entry for it: a point keeps its records, so no slot that it names
// gets another meaning.
func (d *Device) depths(index uint32, depths *[format.LeafBlocks]int, own, older *format.Leaf) error {
	if err := d.leaf(index, own); err != nil {
		return err
	}
	mapped := false
	for i, e := range own.Entries {
		depths[i] = 0
		if !e.IsHole() {
			depths[i], mapped = 1, true
		}
	}
	p := d.s.originOf(point{d.b, d.asOf})
	for depth := 1; mapped && p.b != nil; depth, p = depth+1, d.s.originOf(p) {
		if _, err := d.s.loadLeaf(p.b.leaf(index, p.epoch), older); err != nil {
			return err
		}
		mapped = false
		for i, e := range older.Entries {
			if depths[i] == depth && e == own.Entries[i] {
				depths[i], mapped = depth+1, true
			}
		}
	}
	return nil
}
