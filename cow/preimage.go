package cow

import (
	"cmp"
	"slices"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// An image is a version of a leaf that is on its way to the table and is not the head's present state. It is
// either a copy of a dirty leaf, as it was before a writer went on in a new epoch or generation, or a version
// that the reaper changed. It is an openLeaf with stateImage, in the shard of its head's leaf. Its asOf and
// epoch are the version's epoch, and a checkpoint of generation gen or later writes it. Until that checkpoint
// has committed, others find the version in the image.

// version returns the version that a checkpoint has to write for this leaf or image.
func (o *openLeaf) version() metadata.Version {
	return metadata.Version{Branch: o.branch, Leaf: o.index, Epoch: o.epoch}
}

// pushImage leaves a copy of a dirty head leaf behind as an image. It returns false if there is no room.
// Leaves of the shard may move.
func (s *shard) pushImage(k leafKey) bool {
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return false
	}
	_, h := s.find(k)
	copy(s.mem[to-1:], s.mem[h-1:int(h)-1+openWords])
	s.putImage(to)
	return true
}

// addImage makes an image of a version that was read from the table. It returns nil if there is no room.
func (s *shard) addImage(v metadata.Version, gen uint64, l *format.Leaf) *openLeaf {
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return nil
	}
	o := (*openLeaf)(s.at(to).pointer())
	o.branch, o.index, o.epoch, o.gen, o.Leaf = v.Branch, v.Leaf, v.Epoch, gen, *l
	s.putImage(to)
	return o
}

func (s *shard) putImage(h handle) {
	lf := s.at(h)
	lf.asOf = lf.epoch
	s.put(h, uint32(openWords)|stateOpen|stateImage)
	s.segment(h).dirty++
	s.imaged = append(s.imaged, leafPlace{lf.branch, lf.index})
}

// eachImage calls fn, which may remove the image, for each image. It walks the places in s.imaged instead of
// all dirty leaves, since few of those are images.
func (s *shard) eachImage(fn func(handle, *openLeaf)) {
	if s.buckets == nil {
		return
	}
	slices.SortFunc(s.imaged, func(a, b leafPlace) int {
		return cmp.Or(cmp.Compare(a.branch, b.branch), cmp.Compare(a.index, b.index))
	})
	s.imaged = slices.DeleteFunc(slices.Compact(s.imaged), func(p leafPlace) bool {
		none := true
		for h := *s.bucket(p.branch, p.index); h != 0; {
			lf := s.at(h)
			this := h
			h = lf.next
			if lf.branch == p.branch && lf.index == p.index && lf.is(stateImage) {
				none = false
				fn(this, lf.open())
			}
		}
		return none
	})
}

// image returns the image of a leaf with the highest epoch in [from, to], and among those with that epoch the
// latest one. It returns nil if there is none.
func (s *shard) image(branch, index, from, to uint32) (best *openLeaf) {
	if s.buckets == nil {
		return nil
	}
	for h := *s.bucket(branch, index); h != 0; {
		lf := s.at(h)
		if lf.branch == branch && lf.index == index && lf.is(stateImage) && lf.epoch >= from && lf.epoch <= to {
			if o := lf.open(); best == nil || o.epoch > best.epoch || o.epoch == best.epoch && o.gen > best.gen {
				best = o
			}
		}
		h = lf.next
	}
	return best
}

// dropImages removes the images of one version, and returns how many there were.
func (s *shard) dropImages(v metadata.Version) (n int64) {
	for m := s.image(v.Branch, v.Leaf, v.Epoch, v.Epoch); m != nil; n++ {
		s.remove(s.handle(&m.leaf))
		m = s.image(v.Branch, v.Leaf, v.Epoch, v.Epoch)
	}
	return n
}

// dropWritten removes the images that a checkpoint of generation gen has written.
func (s *shard) dropWritten(gen uint64, dropped func(branch uint32)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.eachImage(func(h handle, o *openLeaf) {
		if o.gen <= gen {
			dropped(o.branch)
			s.remove(h)
		}
	})
}

// newest copies the newest version of a branch's leaf at or before asOf that is in memory to l, and returns
// its epoch, or 0 if there is none. The head's leaf counts only if withHead is set.
func (c *leafCache) newest(b *cachedBranch, index, asOf uint32, withHead bool, l *format.Leaf) uint32 {
	s := c.shard(b.ID, index)
	s.mu.RLock()
	defer s.mu.RUnlock()
	if withHead {
		if lf, _ := s.find(leafKey{b, index, head}); lf != nil && lf.epoch <= asOf && lf.epoch != 0 {
			lf.copyTo(l)
			return lf.epoch
		}
	}
	if m := s.image(b.ID, index, 1, asOf); m != nil {
		*l = m.Leaf
		return m.epoch
	}
	return 0
}
