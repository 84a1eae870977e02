package cow

import (
	"fmt"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// loadLeaf fills lf with the leaf of k.b as of k.asOf, merged with everything
// older: the newest version of the branch itself, or else what its origin had.
func (s *Store) loadLeaf(k leafKey, lf *leaf) error {
	asOf := k.asOf
	for b := k.b; b != nil; b, asOf = b.origin, b.originEpoch {
		epoch, err := s.version(b, k.index, asOf, k, &lf.Leaf)
		if err != nil {
			return fmt.Errorf("branch %d leaf %d: %w", b.ID, k.index, err)
		}
		if epoch == 0 {
			continue
		}
		if b == k.b {
			lf.epoch = epoch
		} else {
			lf.Changed = [4]uint64{} // changed there, not here
		}
		return nil
	}
	lf.Leaf = format.Leaf{}
	return nil
}

// version reads the newest version of the branch's own at or before asOf into
// l and returns its epoch, or 0. Memory is looked at first, then the table: a version
// leaves memory only after the table has it.
func (s *Store) version(b *branch, index, asOf uint32, loading leafKey, l *format.Leaf) (uint32, error) {
	if hk := (leafKey{b, index, head}); hk != loading {
		if epoch := s.cache.peek(hk, asOf, l); epoch != 0 {
			return epoch, nil
		}
	}
	inMemory := s.pending.newest(b.ID, index, 1, asOf, func(m *image) { *l = m.Leaf })
	var t format.Leaf
	var inTable uint32
	err := s.meta.View(func(tx *metadata.Tx) (err error) {
		inTable, err = tx.Leaf(metadata.Version{Branch: b.ID, Leaf: index, Epoch: asOf}, &t)
		return err
	})
	if err != nil {
		return 0, err
	}
	if inTable > inMemory {
		*l = t
		return inTable, nil
	}
	return inMemory, nil
}

// own makes a cached head leaf ready to be changed in the branch's present
// epoch and the present generation. If an earlier epoch's or generation's
// state of it is still to be written, a copy stays behind. mu and the shard's lock are held.
func (s *Store) own(lf *leaf) {
	epoch := lf.key.b.Epoch
	if lf.gen != 0 && (lf.epoch != epoch || lf.gen != s.gen) {
		s.pending.push(&image{
			Version: metadata.Version{Branch: lf.key.b.ID, Leaf: lf.key.index, Epoch: lf.epoch},
			gen:     lf.gen, Leaf: lf.Leaf,
		})
	}
	if lf.epoch != epoch {
		lf.epoch, lf.Changed = epoch, [4]uint64{}
	}
	s.markDirty(lf)
}

func (s *Store) markDirty(lf *leaf) {
	if lf.gen != s.gen {
		lf.gen = s.gen
		s.dirty = append(s.dirty, lf)
	}
}

// change maps block i of an owned leaf to e, and keeps the live bytes. mu and
// the shard's lock are held.
func (s *Store) change(lf *leaf, i int, e format.Entry) {
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
	c := s.slots.get(e.Slot())
	if c == nil {
		return // a damaged table named a chunk that is not there; Check and reads say so
	}
	if c.moved > 0 && s.dieMoved(c, e) {
		return // a new entry names no chunk that was cleaned
	}
	c.live += uint32(sign) * e.Share()
	s.markRow(c)
}

func (s *Store) markRow(c *chunk) {
	if !c.rowDirty {
		c.rowDirty = true
		s.dirtyRows = append(s.dirtyRows, c)
	}
}

// applyData maps the blocks of a data record at (c, off), block first of the leaf on.
func (s *Store) applyData(lf *leaf, h *format.RecordHeader, c *chunk, off uint32) {
	s.own(lf)
	first := int(h.Block % format.LeafBlocks)
	e := format.MakeEntry(c.slot, off, h.Size(), h.Blocks, 0)
	for i := range h.Blocks {
		s.change(lf, first+i, e.WithIndex(i))
	}
}

// applyHole unmaps n blocks of a leaf.
func (s *Store) applyHole(lf *leaf, first, n int) {
	s.own(lf)
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
