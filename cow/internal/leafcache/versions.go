package leafcache

import (
	"slices"

	"github.com/vdisk/vdisk/format"
)

// Newest copies the newest version at or before k that is in memory, and maybe not in the table, to l: one of k's
// branch, or else one of its origins. It returns the branch that has the version, and the version's epoch, or nil if
// there is none. If k names the leaf of a head, that leaf itself does not count: the caller is about to load it.
func (c *Cache) Newest(k Key, l *format.Leaf) (of *Branch, epoch uint32) {
	asOf := k.AsOf
	for b := k.Branch; b != nil; b, asOf = b.Origin.Load(), b.OriginEpoch {
		if b.unwritten.Load() == 0 {
			continue
		}
		if epoch = c.Version(b, k.Index, 1, asOf, b != k.Branch || k.AsOf != Head, l); epoch != 0 {
			return b, epoch
		}
	}
	return nil, 0
}

// Version copies the newest version of a branch's leaf with an epoch in [from, to] that is in memory to l. It returns
// the version's epoch, or 0 if there is none. The head's leaf counts only if withHead is set.
func (c *Cache) Version(b *Branch, index, from, to uint32, withHead bool, l *format.Leaf) uint32 {
	s := c.shard(b.ID, index)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if withHead {
		if lf, _ := s.find(Key{b, index, Head}); lf != nil && lf.epoch >= from && lf.epoch <= to {
			lf.CopyTo(l)
			return lf.epoch
		}
	}
	if o := s.preimage(b.ID, index, from, to); o != nil {
		*l = o.content.Leaf
		return o.epoch
	}
	return 0
}

// DropVersion removes a version of a branch from memory, so that no checkpoint writes it. The caller holds the store's
// lock, and no generation is being written.
func (c *Cache) DropVersion(b *Branch, index, epoch uint32) {
	s := c.shard(b.ID, index)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropPreimages(b, index, epoch)
	if lf, h := s.find(Key{b, index, Head}); lf != nil && lf.epoch == epoch {
		s.setGen(h, 0) // the version of a head that is gone must not be written again
	}
}

// Forget drops the cached leaves of a branch: those of its head, and with points also those of its points. A dirty leaf
// of the head is a version that a point needs, so it becomes a pre-image. The caller holds the store's lock.
func (c *Cache) Forget(b *Branch, points bool) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for j := range s.segs {
			s.each(uint32(j), func(h handle, lf *Leaf) {
				switch {
				case lf.branch != b.ID || lf.asOf != Head && !points || lf.is(statePreimage):
				case lf.dirtyGen() != 0:
					lf.asOf = lf.epoch
					lf.state.Or(statePreimage)
					s.notePreimage(b, lf)
				default:
					s.remove(h)
				}
			})
		}
		s.mu.Unlock()
	}
}

// InMemory returns, in order, the indexes in [from, to) of the leaves that are in memory, and maybe not in the table,
// for b and its origins.
func (c *Cache) InMemory(b *Branch, from, to uint32) (out []uint32) {
	var chain []*Branch
	for ; b != nil; b = b.Origin.Load() {
		if b.unwritten.Load() > 0 {
			chain = append(chain, b)
		}
	}
	if len(chain) == 0 {
		return nil
	}
	if to-from <= 64 { // look-ups are cheaper than going through all dirty leaves
		for ; from < to; from++ {
			if slices.ContainsFunc(chain, func(b *Branch) bool { return c.has(Key{b, from, Head}) }) {
				out = append(out, from)
			}
		}
		return out
	}
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		s.eachDirty(func(_ handle, o *openLeaf) {
			if o.index >= from && o.index < to && slices.ContainsFunc(chain, func(b *Branch) bool { return b.ID == o.branch }) {
				out = append(out, o.index)
			}
		})
		s.mu.RUnlock()
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (c *Cache) has(k Key) bool {
	s := c.shard(k.Branch.ID, k.Index)
	s.mu.RLock()
	defer s.mu.RUnlock()
	lf, _ := s.find(k)
	return lf != nil
}

// eachDirty calls fn for every leaf and pre-image that a checkpoint has to write.
func (s *shard) eachDirty(fn func(handle, *openLeaf)) {
	for i := range s.segs {
		if s.segs[i].dirty == 0 {
			continue
		}
		s.each(uint32(i), func(h handle, lf *Leaf) {
			if lf.dirtyGen() != 0 {
				fn(h, lf.open())
			}
		})
	}
}
