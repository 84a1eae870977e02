package cow

import "github.com/vdisk/vdisk/format"

// rescue finishes a record whose chunk is damaged. It may have been moved, though the chunk still exists, because the
// cleaner has not come to the chunk's end, or because the record was healed: then the copy is read, which is the one
// that counts as live and that a check looks at. With here it first tries the record's own place, since some other
// record of the read may be the damaged one. It reports whether the record is finished.
func (pl *ReadPlan) rescue(r *planned, here bool) bool {
	if here && pl.readAlone(r) {
		return true
	}
	if r.was.c != r.c { // it was read where it has been moved to
		return false
	}
	to, c, ok := pl.d.s.forwards.copyOf(r.e, pl.wanted(r), &pl.d.s.slots)
	if !ok {
		return false
	}
	r.c.Release()
	r.c, r.e = c, to // and was keeps the name
	return pl.readAlone(r)
}

// haveCopies reports whether some of the records have been copied.
func (pl *ReadPlan) haveCopies() bool {
	for i := range pl.records {
		if r := &pl.records[i]; r.was.c == r.c {
			if _, c, ok := pl.d.s.forwards.copyOf(r.e, pl.wanted(r), &pl.d.s.slots); ok {
				c.Release()
				return true
			}
		}
	}
	return false
}

// readAlone reads and finishes one record. The memory is made anew, as this happens only over damage.
func (pl *ReadPlan) readAlone(r *planned) bool {
	buf := make([]byte, r.e.Size())
	if pl.d.s.readRecord(r.c, r.e.Offset(), buf) != nil {
		return false
	}
	arena, at := pl.arena, r.at
	pl.arena, r.at = buf, 0
	err := pl.finish(r)
	pl.arena, r.at = arena, at
	return err == nil
}

// wanted returns a mask of the blocks of a record's unit that the read wants.
func (pl *ReadPlan) wanted(r *planned) (mask uint16) {
	for i := r.piece; i >= 0; i = pl.pieces[i].next {
		pc := &pl.pieces[i]
		for b := pc.from / format.BlockSize; b*format.BlockSize < pc.from+len(pc.dst); b++ {
			mask |= 1 << b
		}
	}
	return mask
}

// copyOf returns the copy of the record that e names, if the cleaner has made one that has the blocks of a mask, and
// its chunk with a reference taken.
func (f *forwards) copyOf(e format.Entry, mask uint16, slots *slotTable) (to format.Entry, c *chunk, ok bool) {
	forward, ok, err := f.lookup(e)
	if !ok || err != nil || forward.Mask&mask != mask {
		return 0, nil, false
	}
	to, c, err = f.follow(e, slots)
	return to, c, err == nil
}
