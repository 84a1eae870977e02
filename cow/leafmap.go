package cow

import (
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// loadLeaf fills l with the leaf of k's branch as of k.AsOf, merged with everything older. That is the branch's own
// newest version, or, if it has none, what its origin had. loadLeaf returns the epoch of the branch's own version,
// or 0.
func (s *Store) loadLeaf(k leafcache.Key, l *format.Leaf) (epoch uint32, err error) {
	b, epoch, err := s.newest(k, l)
	switch {
	case err != nil:
		s.metLeaf(k.Index, err)
		return 0, err
	case b == nil:
		*l = format.Leaf{}
	case b == k.Branch:
		return epoch, nil
	default:
		l.Changed = [4]uint64{} // changed there, not here
	}
	return 0, nil
}

// newest reads the newest version at or before k into l: one of k.Branch, or else one of its origins. It returns the
// branch that has the version, and the version's epoch. It looks in memory before it looks in the table, because a
// version leaves memory only after the table has it.
func (s *Store) newest(k leafcache.Key, l *format.Leaf) (of *leafcache.Branch, epoch uint32, err error) {
	inMemory, epoch := s.cache.Newest(k, l)
	err = s.meta.View(func(tx *metadata.Tx) error {
		asOf := k.AsOf
		for b := k.Branch; b != nil; b, asOf = b.Origin.Load(), b.OriginEpoch {
			v := metadata.Version{Branch: b.ID, Leaf: k.Index, Epoch: asOf}
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

// version reads the newest version that the branch itself has, at or before asOf, into l. It returns the version's
// epoch, or 0 if there is none. The head's leaf in memory counts only if withHead is set.
func (s *Store) version(b *branch, index, asOf uint32, withHead bool, l *format.Leaf) (epoch uint32, err error) {
	epoch = s.cache.Version(&b.leaves, index, 1, asOf, withHead, l)
	err = s.meta.View(func(tx *metadata.Tx) error {
		return s.newer(tx, metadata.Version{Branch: b.ID, Leaf: index, Epoch: asOf}, &epoch, l)
	})
	s.metLeaf(index, err)
	return epoch, err
}

// newer looks for v in the table. If what the table has is newer than epoch, the epoch of the version that memory had,
// newer replaces both epoch and l.
func (s *Store) newer(tx *metadata.Tx, v metadata.Version, epoch *uint32, l *format.Leaf) error {
	t := s.unpacked.Get().(*format.Leaf)
	defer s.unpacked.Put(t)
	inTable, err := tx.Leaf(v, t)
	if err == nil && inTable > *epoch {
		*epoch, *l = inTable, *t
	}
	return err
}

// change maps block i of a writable leaf to e, and updates the live bytes. The caller holds mu and the leaf's lock.
func (s *Store) change(l *leafcache.Content, i int, e format.Entry) {
	s.account(mapBlock(l, i, e), -1)
	s.account(e, +1)
}

// mapBlock maps block i to e, and returns the entry that becomes dead, or a hole if none does.
func mapBlock(l *leafcache.Content, i int, e format.Entry) (dead format.Entry) {
	if l.IsChanged(i) {
		dead = l.Entries[i]
	} else {
		l.SetChanged(i)
	}
	l.Entries[i] = e
	l.Put(i)
	return dead
}

// account adds a block's share of its record to the live bytes of its chunk, or subtracts it if sign is negative. The
// caller holds mu.
func (s *Store) account(e format.Entry, sign int) {
	if e.IsHole() {
		return
	}
	if sign < 0 {
		s.cleaner.exhausted = false // the space of a dead block can be reclaimed
	}
	c := s.slots.get(e.Slot())
	if c == nil {
		return // a damaged table named a chunk that is not there; Check and reads report it
	}
	if c.moved > 0 && s.dieMoved(c, e) {
		return // a new entry never refers to a cleaned chunk
	}
	if sign < 0 {
		c.die(e.Share())
	} else {
		c.live += e.Share()
	}
	s.markRow(c)
}

// markRow notes that the accounting of a chunk has changed. The caller holds mu.
func (s *Store) markRow(c *chunk) {
	s.slots.recount(c)
	if !c.rowDirty {
		c.rowDirty = true
		s.changes.rows = append(s.changes.rows, c)
	}
}

// applyData maps the blocks of a data record at (slot, off) in a writable leaf.
func (s *Store) applyData(l *leafcache.Content, h *format.RecordHeader, slot, off uint32) {
	first := int(h.Block % format.LeafBlocks)
	e := format.MakeEntry(slot, off, h.Size(), h.Blocks, 0)
	for i := range h.Blocks {
		s.change(l, first+i, e.WithIndex(i))
	}
}

// applyHole unmaps n blocks of a writable leaf.
func (s *Store) applyHole(l *leafcache.Content, first, n int) {
	for i := first; i < first+n; i++ {
		s.change(l, i, 0)
	}
}

// nextLeaf returns the first leaf at or after index that the branch or one of its origins has in the table, or limit if
// there is none before it. The cache may have earlier ones.
func (s *Store) nextLeaf(b *branch, index, limit uint32) (uint32, error) {
	err := s.meta.View(func(tx *metadata.Tx) error {
		for b := &b.leaves; b != nil; b = b.Origin.Load() {
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

// leaves calls fn, in order, for each leaf in [from, to) of the branch that may map anything.
func (s *Store) leaves(b *branch, from, to uint32, fn func(index uint32) error) error {
	// Memory is looked at before the table, because a leaf leaves memory only after the table has it.
	inMemory := s.cache.InMemory(&b.leaves, from, to)
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
