package cow

import (
	"unsafe"
)

// arena is a shard's memory: segments that leaves are appended to one after the other, and that are
// taken back whole. What is still wanted of a segment that goes moves to another, so that
// leaves of any size lie without gaps and memory never belongs to one size. The shard's lock guards it.
//
// One segment is always free, for what moves.
type arena struct {
	mem      []uint64
	segWords uint32
	segs     []segment
	free     []uint32 // segments
	current  uint32   // takes what is appended
	hand     uint32   // of the clock: the segment it looked at last
}

// segment says what a segment holds.
type segment struct {
	used  uint32 // words, from its beginning
	live  uint32 // of them, not gone
	dirty uint32 // leaves and images that a checkpoint has to write
}

// handle is where a leaf is: its word in the arena plus 1, so that 0 is none.
type handle = uint32

// segmentWords is the size of a segment: 15 open leaves, or 19 of random blocks, nearly fill one.
const segmentWords = 32 << 10 / 8

// reset makes everything free.
func (a *arena) reset(segWords uint32, segments int) {
	a.segWords, a.segs, a.free = segWords, make([]segment, segments), nil
	for i := segments - 1; i > 0; i-- {
		a.free = append(a.free, uint32(i))
	}
	a.current, a.hand = 0, 0
}

func (a *arena) at(h handle) *leaf { return (*leaf)(unsafe.Pointer(&a.mem[h-1])) }

func (a *arena) handle(lf *leaf) handle {
	return handle((uintptr(lf.pointer())-uintptr(unsafe.Pointer(&a.mem[0])))/8) + 1
}

func (a *arena) segment(h handle) *segment { return &a.segs[(h-1)/a.segWords] }

// append takes memory of the current segment, or if that is full of a free one while there are more than
// keep of them. It returns 0 if there is none.
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

// retire frees a segment that nothing lives in.
func (a *arena) retire(i uint32) {
	if s := &a.segs[i]; s.live == 0 && s.used > 0 {
		s.used = 0
		a.free = append(a.free, i)
	}
}

// drop marks a leaf gone, which is in no bucket any more.
func (a *arena) drop(h handle) {
	lf := a.at(h)
	lf.state.Or(stateGone)
	s := a.segment(h)
	s.live -= lf.words()
	if i := (h - 1) / a.segWords; i != a.current {
		a.retire(i)
	}
}

// each calls fn for what lives in a segment.
func (a *arena) each(i uint32, fn func(handle, *leaf)) {
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

// alloc returns memory for a leaf. It may evict or move any leaf of the shard but evicts no dirty one;
// it returns 0 if there is no room beside them.
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

// compact takes the segment back that has the least to move, if much of it is gone.
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

// evict takes the next segment back that the clock hand finds with enough leaves that nobody has used since it passed.
func (s *shard) evict() bool {
	for step := range 2 * len(s.segs) {
		if s.hand++; s.hand >= uint32(len(s.segs)) {
			s.hand = 0
		}
		if s.hand == s.current || s.segs[s.hand].used == 0 {
			continue
		}
		enough := s.segWords / 4
		if step > len(s.segs) { // everything has been passed by once
			enough = s.segWords / 16
		}
		if s.evictable(s.hand) >= enough {
			s.vacate(s.hand, true)
			return true
		}
		s.each(s.hand, func(_ handle, lf *leaf) { lf.state.And(^uint32(stateUsed)) })
	}
	return false
}

// evictable is how many words of a segment nobody would miss.
func (s *shard) evictable(i uint32) uint32 {
	n := s.segWords - s.segs[i].live
	s.each(i, func(_ handle, lf *leaf) {
		if lf.dirtyGen() == 0 && !lf.is(stateUsed) {
			n += lf.words()
		}
	})
	return n
}

// vacate moves what lives in a segment elsewhere, or with evict only what is dirty or was used, and
// frees the segment. What moves fits into the rest of the current segment and one other.
func (s *shard) vacate(i uint32, evict bool) {
	c := &s.segs[i]
	s.each(i, func(h handle, lf *leaf) {
		if evict && lf.dirtyGen() == 0 && !lf.is(stateUsed) {
			s.unlink(h)
			return
		}
		to := s.append(lf.words(), 0)
		if to == 0 {
			panic("cow: no free segment to move leaves to")
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
