package audit

import (
	"fmt"
	"math/bits"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// forwardReader finds where the records that were moved are in one state of the table.
type forwardReader struct {
	all    bool                        // the rows are not known: look for forwards of any slot
	rows   map[uint32]format.Forwarded // by slot
	seen   map[uint32]int64            // by slot: moved blocks that versions own
	region metadata.Region             // region that list is of
	loaded bool                        // region and list are set
	list   []format.Forward
	bad    error // error of reading the region
}

func (f *forwardReader) index(rows []format.Forwarded) {
	f.rows, f.seen = map[uint32]format.Forwarded{}, map[uint32]int64{}
	for _, r := range rows {
		f.rows[r.Slot] = r
	}
}

// follow returns where the block is now that a version owns as e. It counts the block if it was moved.
func (f *forwardReader) follow(tx *metadata.Tx, e format.Entry) (format.Entry, error) {
	to, moved, err := f.find(tx, e)
	if moved {
		f.seen[e.Slot()]++
	}
	return to, err
}

// find returns where the block is now that an entry e names, and whether it was moved there.
func (f *forwardReader) find(tx *metadata.Tx, e format.Entry) (at format.Entry, moved bool, err error) {
	if _, ok := f.rows[e.Slot()]; !ok && !f.all {
		return e, false, nil
	}
	if k := metadata.RegionOf(e); k != f.region || !f.loaded {
		f.region, f.loaded = k, true
		f.list, f.bad = tx.Forwards(k)
	}
	if f.bad != nil {
		return e, false, f.bad
	}
	i, ok := format.SearchForwards(f.list, e.Offset())
	if !ok {
		return e, false, nil
	}
	to := f.list[i]
	switch {
	case to.To.Blocks() != e.Blocks():
		return e, false, fault.Corruptf("%v was moved to %v, which has other blocks", e, to.To)
	case to.Mask&(1<<e.Index()) == 0:
		return e, false, fault.Corruptf("%v was moved to %v, and is counted as dead there", e, to.To)
	}
	return to.To.WithIndex(e.Index()), true, nil
}

// checkForwards compares the rows of moved blocks with the forwards, and with the blocks that versions own.
func (c *Checker) checkForwards(tx *metadata.Tx) error {
	f := &c.forwards
	noted := map[uint32]int64{}
	err := tx.EachRegion(func(r metadata.Region, list []format.Forward, bad error) error {
		if bad != nil {
			c.corrupt(fmt.Sprintf("forwards of %s region %d", c.chunk(r.Slot), r.Number), "%v", bad)
		}
		for _, f := range list {
			noted[r.Slot] += int64(bits.OnesCount16(f.Mask))
		}
		return c.engine.Interrupted()
	})
	if err != nil {
		return err
	}
	for slot := range noted {
		if _, ok := f.rows[slot]; !ok {
			c.corrupt(c.chunk(slot), "blocks of it are noted as moved, but it has no row that says so")
		}
	}
	for slot, row := range f.rows {
		where := "moved blocks of " + c.chunk(slot)
		if ch, ok := c.chunks[slot]; ok && ch.Seq != row.Seq {
			c.corrupt(where, "the chunk has the sequence %d, the row %d", ch.Seq, row.Seq)
		}
		var mend *Mend
		if noted[slot] == f.seen[slot] { // otherwise it is not the count that is wrong
			right := row
			right.Blocks = uint32(noted[slot])
			mend = &Mend{Forwarded: &right}
		}
		if noted[slot] != int64(row.Blocks) {
			c.problem(Problem{Kind: KindCorrupt, Where: where, What: fmt.Sprintf("%d are kept, %d are noted", row.Blocks, noted[slot]), Mend: mend})
		}
		if seen := f.seen[slot]; seen != int64(row.Blocks) {
			c.problem(Problem{Kind: kindOf(int64(row.Blocks), seen), Where: where, What: fmt.Sprintf("%d are kept, %d are referred to", row.Blocks, seen), Mend: mend})
		}
	}
	return nil
}
