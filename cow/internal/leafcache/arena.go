package leafcache

import (
	"unsafe"
)

// arena is a shard's memory, in segments. Leaves are appended to a segment one after another, and a segment is freed as
// a whole. The leaves that are still wanted move to another segment first. So leaves of any size lie without gaps, and
// no memory is bound to one size. The shard's lock guards it.
//
// One segment is always free, to take the leaves that move.
type arena struct {
	mem      []uint64
	segWords uint32
	segs     []segment
	free     []uint32 // segments
	current  uint32   // the segment that is appended to
	hand     uint32   // of the clock: the segment it looked at last
}

// segment keeps account of what one segment holds.
type segment struct {
	used  uint32 // words, from its beginning
	live  uint32 // words of used that are not gone
	dirty uint32 // number of leaves and pre-images that a checkpoint has to write
}

// handle says where a leaf is: the index of its first word in the arena, plus 1, so that 0 means none.
type handle = uint32

// segmentWords is the size of a segment. 15 open leaves, or 20 of random blocks, nearly fill one.
const segmentWords = 32 << 10 / 8

// reset makes all segments free.
func (a *arena) reset(segWords uint32, segments int) {
	a.segWords, a.segs, a.free = segWords, make([]segment, segments), nil
	for i := segments - 1; i > 0; i-- {
		a.free = append(a.free, uint32(i))
	}
	a.current, a.hand = 0, 0
}

func (a *arena) at(h handle) *Leaf { return (*Leaf)(unsafe.Pointer(&a.mem[h-1])) }

func (a *arena) handle(lf *Leaf) handle {
	return handle((uintptr(lf.pointer())-uintptr(unsafe.Pointer(&a.mem[0])))/8) + 1
}

func (a *arena) segment(h handle) *segment { return &a.segs[(h-1)/a.segWords] }

// append takes memory from the current segment, or, when that is full, from a free one, provided that more than keep
// segments are free. It returns 0 if there is none.
func (a *arena) append(words uint32, keep int) handle {
	s := &a.segs[a.current]
	if s.used+words > a.segWords {
		if len(a.free) <= keep {
			return 0
		}
		a.retire(a.current)
		last := len(a.free) - 1
		a.current, a.free = a.free[last], a.free[:last]
		s = &a.segs[a.current]
	}
	h := a.current*a.segWords + s.used + 1
	s.used += words
	s.live += words
	return h
}

// retire frees a segment if nothing in it is live.
func (a *arena) retire(i uint32) {
	if s := &a.segs[i]; s.live == 0 && s.used > 0 {
		s.used = 0
		a.free = append(a.free, i)
	}
}

// drop marks a leaf gone. The leaf must be out of its bucket already.
func (a *arena) drop(h handle) {
	lf := a.at(h)
	lf.state.Or(stateGone)
	s := a.segment(h)
	s.live -= lf.words()
	if i := (h - 1) / a.segWords; i != a.current {
		a.retire(i)
	}
}

// each calls fn for every live leaf and pre-image in a segment.
func (a *arena) each(i uint32, fn func(handle, *Leaf)) {
	from := i*a.segWords + 1
	for h, end := from, from+a.segs[i].used; h < end; {
		lf := a.at(h)
		words := lf.words()
		if !lf.is(stateGone) {
			fn(h, lf)
		}
		h += words
	}
}

// alloc returns memory for a leaf. It may move any leaf of the shard, and may evict any clean one. It returns 0 if the
// dirty leaves leave no room.
func (s *shard) alloc(words uint32) handle {
	for try := range 2*len(s.segs) + 2 {
		if h := s.append(words, 1); h != 0 {
			return h
		}
		if try%2 > 0 || !s.compact() {
			if !s.evict() {
				return 0
			}
		}
	}
	return 0
}

// compact frees the segment that has the least to move. It returns false if no segment has at least a quarter of its
// memory to give back.
func (s *shard) compact() bool {
	best, live := s.current, s.segWords/4*3
	for i := range s.segs {
		if c := &s.segs[i]; c.used > 0 && uint32(i) != s.current && c.live <= live {
			best, live = uint32(i), c.live
		}
	}
	if best == s.current {
		return false
	}
	s.vacate(best, false)
	return true
}

// evict moves the clock hand to the next segment in which enough leaves have not been used since the hand last passed,
// and frees that segment. It returns false if there is none.
func (s *shard) evict() bool {
	for step := range 2 * len(s.segs) {
		if s.hand++; s.hand >= uint32(len(s.segs)) {
			s.hand = 0
		}
		if s.hand == s.current || s.segs[s.hand].used == 0 {
			continue
		}
		enough := s.segWords / 4
		if step > len(s.segs) { // the hand has passed every segment once
			enough = s.segWords / 16
		}
		if s.evictable(s.hand) >= enough {
			s.vacate(s.hand, true)
			return true
		}
		s.each(s.hand, func(_ handle, lf *Leaf) { lf.state.And(^uint32(stateUsed)) })
	}
	return false
}

// evictable returns how many words of a segment would be freed by evicting its leaves that are clean and unused.
func (s *shard) evictable(i uint32) uint32 {
	n := s.segWords - s.segs[i].live
	s.each(i, func(_ handle, lf *Leaf) {
		if lf.dirtyGen() == 0 && !lf.is(stateUsed) {
			n += lf.words()
		}
	})
	return n
}

// vacate moves the live leaves of a segment elsewhere, and frees the segment. With evict it moves only those that are
// dirty or were used, and evicts the others. What moves fits into the rest of the current segment and one other.
func (s *shard) vacate(i uint32, evict bool) {
	c := &s.segs[i]
	s.each(i, func(h handle, lf *Leaf) {
		if evict && lf.dirtyGen() == 0 && !lf.is(stateUsed) {
			s.unlink(h)
			return
		}
		to := s.append(lf.words(), 0)
		if to == 0 {
			panic("leafcache: no free segment to move leaves to")
		}
		if evict {
			lf.state.And(^uint32(stateUsed))
		}
		copy(s.mem[to-1:], s.mem[h-1:h-1+lf.words()])
		*s.link(h) = to
		if lf.dirtyGen() != 0 {
			s.segment(to).dirty++
		}
	})
	*c = segment{}
	s.free = append(s.free, i)
}
