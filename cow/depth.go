package cow

import (
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/format"
)

// Depths calls fn for the runs of a range, in order and without gaps, until fn returns false. depth is 0 for holes, 1 for
// data that was written to the volume itself, 2 for data that a clone has from its origin, and so on.
//
// Depths loads each leaf of the range once for each level down to the oldest data in it.
func (d *Device) Depths(off, length int64, fn func(off, length int64, depth int) bool) error {
	if err := d.checkRange(off, length); err != nil {
		return fmt.Errorf("depths of %s: %w", d.ref, err)
	}
	if length == 0 {
		return nil
	}
	run := extentRun[int]{fn: fn, start: off, end: off + length}
	var blocks leafDepths
	err := d.s.leaves(d.b, uint32(off/leafSize), uint32((off+length-1)/leafSize)+1, func(index uint32) error {
		if err := d.depths(index, &blocks); err != nil {
			return err
		}
		for i, depth := range blocks.depth {
			if !run.to(int64(index)*leafSize+int64(i)*format.BlockSize, depth) {
				return errStop
			}
		}
		if !run.to((int64(index)+1)*leafSize, 0) {
			return errStop
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("depths of %s: %w", d.ref, err)
	}
	if run.start < run.end {
		fn(run.start, run.end-run.start, run.kind)
	}
	return nil
}

// leafDepths has the depth of each block of a leaf, and room for the leaves that it comes from.
type leafDepths struct {
	depth      [format.LeafBlocks]int
	own, older format.Leaf
}

// depths finds the depths of a leaf's blocks. A block is as old as the oldest point of the device's line from which on
// all have the same entry for it: a point keeps its records, so no slot that it names gets another meaning.
func (d *Device) depths(index uint32, blocks *leafDepths) error {
	if err := d.leaf(index, &blocks.own); err != nil {
		return err
	}
	mapped := false
	for i, e := range blocks.own.Entries {
		blocks.depth[i] = 0
		if !e.IsHole() {
			blocks.depth[i], mapped = 1, true
		}
	}
	p := d.s.originOf(point{d.b, d.asOf})
	for depth := 1; mapped && p.b != nil; depth, p = depth+1, d.s.originOf(p) {
		if _, err := d.s.loadLeaf(p.b.leaf(index, p.epoch), &blocks.older); err != nil {
			return err
		}
		mapped = false
		for i, e := range blocks.older.Entries {
			if blocks.depth[i] == depth && e == blocks.own.Entries[i] {
				blocks.depth[i], mapped = depth+1, true
			}
		}
	}
	return nil
}
