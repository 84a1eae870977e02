package cow

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// loadLeaf fills lf with the leaf of k.b as of k.asOf, merged with everything
// older: the newest version of the branch itself, or else what its origin had.
func (s *Store) loadLeaf(k leafKey, lf *openLeaf) error {
	b, epoch, err := s.newest(k, &lf.Leaf)
	switch {
	case err != nil:
		return err
	case b == nil:
		lf.Leaf = format.Leaf{}
	case b == k.b:
		lf.epoch = epoch
	default:
		lf.Changed = [4]uint64{} // changed there, not here
	}
	return nil
}

// newest reads the newest version at or before k, of k.b or else its origins, into l, and says whose
// and of what epoch it is. Memory is looked at before the table: a version leaves memory only after the table has it.
func (s *Store) newest(k leafKey, l *format.Leaf) (of *branch, epoch uint32, err error) {
	var inMemory *branch
	asOf := k.asOf
	for b := k.b; b != nil; b, asOf = b.origin, b.originEpoch {
		if b.unwritten.Load() == 0 {
			continue
		}
		if epoch = s.cache.newest(b, k.index, asOf, b != k.b || k.asOf != head, l); epoch != 0 {
			inMemory = b
			break
		}
	}
	err = s.meta.View(func(tx *metadata.Tx) error {
		asOf := k.asOf
		for b := k.b; b != nil; b, asOf = b.origin, b.originEpoch {
			v := metadata.Version{Branch: b.ID, Leaf: k.index, Epoch: asOf}
			if b == inMemory {
				of = b
				return s.newer(tx, v, &epoch, l)
			}
			inTable, err := tx.Leaf(v, l)
			if err != nil || inTable != 0 {
				of, epoch = b, inTable
				return err
			}
		}
		return nil
	})
	return of, epoch, err
}

// version reads the newest version of the branch's own at or before asOf into l and returns its epoch, or 0. What the
// head has in memory counts only with withHead.
func (s *Store) version(b *branch, index, asOf uint32, withHead bool, l *format.Leaf) (epoch uint32, err error) {
	epoch = s.cache.newest(b, index, asOf, withHead, l)
	err = s.meta.View(func(tx *metadata.Tx) error {
		return s.newer(tx, metadata.Version{Branch: b.ID, Leaf: index, Epoch: asOf}, &epoch, l)
	})
	return epoch, err
}

// newer replaces the version of an epoch that memory had, in l, by one that the table has if that is newer.
func (s *Store) newer(tx *metadata.Tx, v metadata.Version, epoch *uint32, l *format.Leaf) error {
	t := s.unpacked.Get().(*format.Leaf)
	defer s.unpacked.Put(t)
	inTable, err := tx.Leaf(v, t)
	if err == nil && inTable > *epoch {
		*epoch, *l = inTable, *t
	}
	return err
}

// own makes a cached head leaf ready to be changed in the branch's present
// epoch and the present generation. If an earlier epoch's or generation's
// state of it is still to be written, a copy stays behind. mu and the shard's lock are held. If there is no
// room it fails with errFull, and nothing has changed; in any case leaves of the shard may have moved.
func (s *Store) makeWritable(k leafKey, sh *shard) (*openLeaf, error) {
	epoch := k.b.Epoch
	lf, _ := sh.find(k)
	o := lf.open()
	switch {
	case o != nil && o.gen == s.gen && o.epoch == epoch:
		return o, nil
	case o != nil && o.gen != 0:
		again := o.gen == s.gen // else the image takes the leaf's place in writing
		if !sh.pushImage(k) {
			return nil, errFull
		}
		k.b.unwritten.Add(1)
		if again {
			s.unwritten++
		}
	default:
		if sh.open(k) == nil {
			return nil, errFull
		}
	}
	lf, h := sh.find(k)
	o = lf.open()
	if o.epoch != epoch {
		o.epoch, o.Changed = epoch, [4]uint64{}
	}
	s.markDirty(k, sh, h)
	return o, nil
}

// owned reports whether own has nothing to do.
func (s *Store) isWritable(b *branch, lf *leaf) bool {
	return lf.dirtyGen() == s.gen && lf.epoch == b.Epoch
}

// markDirty has an open leaf written by the next checkpoint. mu and the shard's lock are held.
func (s *Store) markDirty(k leafKey, sh *shard, h handle) {
	if sh.at(h).dirtyGen() != s.gen {
		sh.setGen(h, s.gen)
		s.dirty = append(s.dirty, k)
		s.unwritten++
		k.b.unwritten.Add(1)
	}
}

// change maps block i of an owned leaf to e, and keeps the live bytes. mu and
// the shard's lock are held.
func (s *Store) change(lf *openLeaf, i int, e format.Entry) {
	s.account(put(&lf.Leaf, i, e), -1)
	s.account(e, +1)
}

// put maps block i to e, and returns the entry that is dead by it: a hole if none is.
func put(l *format.Leaf, i int, e format.Entry) (dead format.Entry) {
	if l.IsChanged(i) {
		dead = l.Entries[i]
	} else {
		l.SetChanged(i)
	}
	l.Entries[i] = e
	return dead
}

// account adds or takes a block's share of its record. mu is held.
func (s *Store) account(e format.Entry, sign int) {
	if e.IsHole() {
		return
	}
	if sign < 0 {
		s.cleanerExhausted = false // what dies can be given back
	}
	c := s.slots.get(e.Slot())
	if c == nil {
		return // a damaged table named a chunk that is not there; Check and reads say so
	}
	if c.moved > 0 && s.dieMoved(c, e) {
		return // a new entry names no chunk that was cleaned
	}
	if sign < 0 {
		c.die(e.Share())
	} else {
		c.live += e.Share()
	}
	s.markRow(c)
}

// markRow notes that the accounting of a chunk has changed. mu is held.
func (s *Store) markRow(c *chunk) {
	s.slots.recount(c)
	if !c.rowDirty {
		c.rowDirty = true
		s.dirtyRows = append(s.dirtyRows, c)
	}
}

// applyData maps the blocks of a data record at (c, off), in a leaf that is owned.
func (s *Store) applyData(lf *openLeaf, h *format.RecordHeader, c *chunk, off uint32) {
	first := int(h.Block % format.LeafBlocks)
	e := format.MakeEntry(c.slot, off, h.Size(), h.Blocks, 0)
	for i := range h.Blocks {
		s.change(lf, first+i, e.WithIndex(i))
	}
}

// applyHole unmaps n blocks of a leaf that is owned.
func (s *Store) applyHole(lf *openLeaf, first, n int) {
	for i := first; i < first+n; i++ {
		s.change(lf, i, 0)
	}
}

// nextLeaf is the first leaf at or after index that the branch or one of its
// origins has in the table, or limit. The cache may have earlier ones.
func (s *Store) nextLeaf(b *branch, index, limit uint32) (uint32, error) {
	err := s.meta.View(func(tx *metadata.Tx) error {
		for ; b != nil; b = b.origin {
			n, ok, err := tx.NextLeaf(b.ID, index)
			if err != nil {
				return err
			}
			if ok {
				limit = min(limit, n)
			}
		}
		return nil
	})
	return limit, err
}

// leaves calls fn for each leaf in [from, to) of the branch that may map
// anything, in order.
func (s *Store) leaves(b *branch, from, to uint32, fn func(index uint32) error) error {
	// Memory is looked at before the table: a leaf leaves memory only when the table has it.
	inMemory := s.cache.indexes(b, from, to)
	for from < to {
		next, err := s.nextLeaf(b, from, to)
		if err != nil {
			return err
		}
		for len(inMemory) > 0 && inMemory[0] <= next {
			if inMemory[0] < next {
				if err := fn(inMemory[0]); err != nil {
					return err
				}
			}
			inMemory = inMemory[1:]
		}
		if next == to {
			return nil
		}
		if err := fn(next); err != nil {
			return err
		}
		from = next + 1
	}
	return nil
}
