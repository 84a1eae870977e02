package leafcache

import (
	"cmp"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// A pre-image is a version of a leaf that is on its way to the table and is not the head's present state. It is either
// a copy of a dirty leaf, as it was before a writer went on in a new epoch or generation, or a version that the reaper
// read from the table to change it. It is an openLeaf with statePreimage, in the shard of its head's leaf. Its asOf and
// epoch are the version's epoch, and a checkpoint of generation gen or later writes it. Until that checkpoint has
// committed, others find the version in the pre-image.

// leafPlace identifies a leaf by its branch and its index.
type leafPlace struct {
	branch *Branch
	index  uint32
}

// pushPreimage leaves a copy of a dirty head leaf behind as a pre-image. It returns false if there is no room. Leaves
// of the shard may move.
func (s *shard) pushPreimage(k Key) bool {
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return false
	}
	_, h := s.find(k)
	copy(s.mem[to-1:], s.mem[h-1:int(h)-1+openWords])
	s.putPreimage(k.Branch, to)
	return true
}

// addPreimage makes a pre-image of a version of k's leaf. It returns nil if there is no room. Leaves of the shard may
// move.
func (s *shard) addPreimage(k Key, epoch uint32, gen uint64, l *format.Leaf) *openLeaf {
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return nil
	}
	o := (*openLeaf)(s.at(to).pointer())
	o.branch, o.index, o.epoch, o.gen, o.content = k.Branch.ID, k.Index, epoch, gen, Content{Leaf: *l, other: true}
	s.putPreimage(k.Branch, to)
	return o
}

func (s *shard) putPreimage(b *Branch, h handle) {
	lf := s.at(h)
	lf.asOf = lf.epoch
	s.put(h, uint32(openWords)|stateOpen|statePreimage)
	s.segment(h).dirty++
	s.notePreimage(b, lf)
}

// notePreimage notes that a leaf has become a pre-image of b.
func (s *shard) notePreimage(b *Branch, lf *Leaf) {
	s.preimaged = append(s.preimaged, leafPlace{b, lf.index})
	b.unwritten.Add(1)
}

// eachPreimage calls fn, which may remove the pre-image, for each pre-image. It walks the places in s.preimaged instead
// of all dirty leaves, since few of those are pre-images.
func (s *shard) eachPreimage(fn func(*Branch, handle, *openLeaf)) {
	if s.buckets == nil {
		return
	}
	slices.SortFunc(s.preimaged, func(a, b leafPlace) int {
		return cmp.Or(cmp.Compare(a.branch.ID, b.branch.ID), cmp.Compare(a.index, b.index))
	})
	s.preimaged = slices.DeleteFunc(slices.Compact(s.preimaged), func(p leafPlace) bool {
		none := true
		for h := *s.bucket(p.branch.ID, p.index); h != 0; {
			lf := s.at(h)
			this := h
			h = lf.next
			if lf.branch == p.branch.ID && lf.index == p.index && lf.is(statePreimage) {
				none = false
				fn(p.branch, this, lf.open())
			}
		}
		return none
	})
}

// preimage returns the pre-image of a leaf with the highest epoch in [from, to], and among those with that epoch the
// latest one. It returns nil if there is none.
func (s *shard) preimage(branch, index, from, to uint32) (best *openLeaf) {
	if s.buckets == nil {
		return nil
	}
	for h := *s.bucket(branch, index); h != 0; {
		lf := s.at(h)
		if lf.branch == branch && lf.index == index && lf.is(statePreimage) && lf.epoch >= from && lf.epoch <= to {
			if o := lf.open(); best == nil || o.epoch > best.epoch || o.epoch == best.epoch && o.gen > best.gen {
				best = o
			}
		}
		h = lf.next
	}
	return best
}

// dropPreimages removes the pre-images of one version of a leaf.
func (s *shard) dropPreimages(b *Branch, index, epoch uint32) {
	for o := s.preimage(b.ID, index, epoch, epoch); o != nil; o = s.preimage(b.ID, index, epoch, epoch) {
		s.remove(s.handle(&o.Leaf))
		b.unwritten.Add(-1)
	}
}

// dropWritten removes the pre-images that a checkpoint of generation gen has written.
func (s *shard) dropWritten(gen uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eachPreimage(func(b *Branch, h handle, o *openLeaf) {
		if o.gen <= gen {
			s.remove(h)
			b.unwritten.Add(-1)
		}
	})
}
