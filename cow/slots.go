package cow

import (
	"container/heap"
	"errors"
	"math/bits"
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

// slotTable finds chunks by slot, and knows at any time what they are together and which of them is best cleaned.
// None of that looks at all of them. Changes happen under Store.mu; get needs no lock.
type slotTable struct {
	pages [format.MaxSlots / pageSlots]atomic.Pointer[slotPage] // nil: nothing was ever there

	taken     int    // slots that have a chunk
	cleanable uint64 // chunks before this sequence number are behind the replay position, and may be cleaned
	tally
	dirt [dirtSteps + 1]ageHeap // chunks that may be cleaned, by how much of them is dead

	lives [format.MaxChunkSize/liveStep + 1]int // chunks that are or will be cleaned, by how much of them is alive
	top   int                                   // there is none behind it

	removed int64 // what dead chunks held whose files were removed or taken for new ones, over the life of the process
}

// liveStep is how finely chunks are told apart by what lives in them.
const liveStep = 256 << 10

// pageSlots is how many slots a page of the table has.
const pageSlots = 4096

type slotPage struct {
	chunks [pageSlots]atomic.Pointer[chunk]
	taken  [pageSlots / 64]uint64 // a bit for each chunk
	n      int                    // of them
}

// tally is what chunks add up to. All are bytes but chunks.
type tally struct {
	files     int64 // of the files
	owed      int64 // of files that the next checkpoint gives up
	chunks    int64 // that are full, and whose rows the table has or will have
	ends      int64 // what these hold, with their headers
	live      int64 // what lives of that
	dirtyEnds int64 // of chunks that may be cleaned: what cleaning can give back is the difference of these two
	dirtyLive int64
}

func (t *tally) add(o *tally, sign int64) {
	t.files += sign * o.files
	t.owed += sign * o.owed
	t.chunks += sign * o.chunks
	t.ends += sign * o.ends
	t.live += sign * o.live
	t.dirtyEnds += sign * o.dirtyEnds
	t.dirtyLive += sign * o.dirtyLive
}

// counted is what of a chunk is in the sums of the slot table; guarded by Store.mu.
type counted struct {
	tally
	cleanable bool
	lives     int // where it is in slotTable.lives; 0: nowhere
	dirt      int // of chunks that are cleanable: where it is
	at        int // and its place there
}

// dirtSteps is how finely chunks are told apart by what is dead in them: by a two hundredth.
const dirtSteps = 200

// get returns the chunk of a slot; nil if there is none.
func (s *slotTable) get(slot uint32) *chunk {
	if slot >= format.MaxSlots {
		return nil
	}
	p := s.pages[slot/pageSlots].Load()
	if p == nil {
		return nil
	}
	return p.chunks[slot%pageSlots].Load()
}

// put gives a chunk its slot; the chunk that had it is none of the table's any more.
func (s *slotTable) put(c *chunk) {
	n, i := c.slot/pageSlots, c.slot%pageSlots
	p := s.pages[n].Load()
	if p == nil {
		p = &slotPage{}
		s.pages[n].Store(p)
	}
	old := p.chunks[i].Swap(c) // at no time is there none
	if old == nil {
		p.taken[i/64] |= 1 << (i % 64)
		p.n++
		s.taken++
	} else {
		old.inSlot = false
		s.recount(old)
	}
	c.inSlot = true
	s.recount(c)
}

// remove makes a slot free.
func (s *slotTable) remove(slot uint32) {
	old := s.get(slot)
	if old == nil {
		return
	}
	p, i := s.pages[slot/pageSlots].Load(), slot%pageSlots
	p.chunks[i].Store(nil)
	p.taken[i/64] &^= 1 << (i % 64)
	p.n--
	s.taken--
	old.inSlot = false
	s.recount(old)
}

// freeSlot returns the first slot that is free; false: there is none.
func (s *slotTable) freeSlot() (uint32, bool) {
	for n := range uint32(len(s.pages)) {
		p := s.pages[n].Load()
		if p == nil {
			return n * pageSlots, true
		}
		if p.n == pageSlots {
			continue
		}
		for i, w := range p.taken {
			if w != ^uint64(0) {
				return n*pageSlots + uint32(64*i+bits.TrailingZeros64(^w)), true
			}
		}
	}
	return 0, false
}

// end is behind the last slot that may be taken.
func (s *slotTable) end() uint32 {
	for n := len(s.pages); n > 0; n-- {
		if s.pages[n-1].Load() != nil {
			return uint32(n) * pageSlots
		}
	}
	return 0
}

// each calls fn for the chunks, by slot. It looks at all of them, which many make long.
func (s *slotTable) each(fn func(*chunk)) {
	for n := range s.pages {
		s.page(n, fn)
	}
}

// page calls fn for the chunks of a page.
func (s *slotTable) page(n int, fn func(*chunk)) {
	p := s.pages[n].Load()
	if p == nil {
		return
	}
	for i := range p.chunks {
		if c := p.chunks[i].Load(); c != nil {
			fn(c)
		}
	}
}

// all returns the chunks, by slot.
func (s *slotTable) all() (cs []*chunk) {
	s.each(func(c *chunk) { cs = append(cs, c) })
	return cs
}

func (s *slotTable) closeAll() error {
	var errs []error
	s.each(func(c *chunk) {
		if c.file != nil {
			errs = append(errs, c.file.Close())
		}
	})
	return errors.Join(errs...)
}

// recount brings the sums up to date with a chunk. Whoever changes what they are made of calls it, in the same
// critical section of Store.mu: size, end, live, pinnedDead, sealed, damaged, dead, gone, and the table's cleanable.
func (s *slotTable) recount(c *chunk) {
	n := &c.counted
	now := s.measure(c)
	s.tally.add(&n.tally, -1)
	s.tally.add(&now, +1)
	n.tally = now
	s.recountLives(c)
	may := c.inSlot && s.mayClean(c)
	dirt := 0
	if may {
		dirt = c.dirt()
	}
	if may == n.cleanable && dirt == n.dirt {
		return
	}
	if n.cleanable {
		heap.Remove(&s.dirt[n.dirt], n.at)
	}
	n.cleanable, n.dirt = may, dirt
	if may {
		heap.Push(&s.dirt[dirt], c)
	}
}

// recountLives is recount for lives.
func (s *slotTable) recountLives(c *chunk) {
	n := 0
	if c.inSlot && c.sealed && !c.gone && !c.dead && !c.damaged {
		n = int((c.live + liveStep - 1) / liveStep)
	}
	if was := c.counted.lives; n != was {
		s.lives[was]--
		s.lives[n]++
		c.counted.lives, s.top = n, max(s.top, n)
	}
}

// mostLive is how much lives in the chunk that has most of it, to a step above.
func (s *slotTable) mostLive() int64 {
	for s.top > 0 && s.lives[s.top] == 0 {
		s.top--
	}
	return int64(s.top) * liveStep
}

// measure is what a chunk adds to the sums.
func (s *slotTable) measure(c *chunk) (t tally) {
	if !c.inSlot {
		return t
	}
	t.files = int64(c.size)
	if c.gone || c.dead || !c.sealed {
		return t
	}
	t.chunks, t.ends, t.live = 1, int64(c.end), int64(c.live)
	if c.live == 0 {
		t.owed = int64(c.size)
	}
	if s.mayClean(c) {
		t.dirtyEnds, t.dirtyLive = int64(c.end-format.ChunkHeaderSize), int64(c.live)+int64(c.pinnedDead)
	}
	return t
}

// mayClean reports whether the table has all of a chunk, and something lives in it that can be moved.
func (s *slotTable) mayClean(c *chunk) bool {
	return c.sealed && !c.gone && !c.dead && !c.damaged && c.seq < s.cleanable && c.live > 0 && c.end > format.ChunkHeaderSize
}

// used is the part of a chunk that cleaning does not give back.
func (c *chunk) used() float64 {
	return (float64(c.live) + float64(c.pinnedDead)) / float64(c.end-format.ChunkHeaderSize)
}

// dirt is how many steps of a chunk are dead.
func (c *chunk) dirt() int {
	all := uint64(c.end - format.ChunkHeaderSize)
	return int((all - min(all, uint64(c.live)+uint64(c.pinnedDead))) * dirtSteps / all)
}

// dirtiest chooses a chunk to be cleaned by benefit and cost (Rosenblum and Ousterhout, 1992, section 3.5): what it
// gives, times the age, for what it takes to read all and write what lives. At least the part waste of it is dead, to
// a step below, and its sequence number is below limit. now is the next chunk's. Of those that are equally dead, to a
// step, the oldest is the best: so one of each step is looked at. None is chosen that takes more than room to copy;
// tooLarge reports that nothing was chosen for that reason.
func (s *slotTable) dirtiest(waste float64, limit, now uint64, room int64) (best *chunk, tooLarge bool) {
	var most float64
	consider := func(c *chunk) {
		switch {
		case c.seq >= limit:
			return
		case workFor(c) > room:
			tooLarge = true
			return
		}
		used := c.used()
		if benefit := (1 - used) * float64(now-c.seq) / (1 + used); benefit > most {
			most, best = benefit, c
		}
	}
	first := int(waste * dirtSteps)
	for i := first; i < len(s.dirt); i++ {
		if len(s.dirt[i]) > 0 {
			consider(s.dirt[i][0])
		}
	}
	if best != nil || !tooLarge {
		return best, false
	}
	for i := first; i < len(s.dirt); i++ { // a younger one may have less alive: chunks differ in size
		for _, c := range s.dirt[i] {
			consider(c)
		}
	}
	return best, tooLarge
}

// ageHeap is a heap of chunks, the oldest first.
type ageHeap []*chunk

func (h ageHeap) Len() int           { return len(h) }
func (h ageHeap) Less(i, j int) bool { return h[i].seq < h[j].seq }
func (h ageHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].counted.at, h[j].counted.at = i, j
}

// Push is heap.Interface's.
func (h *ageHeap) Push(c any) {
	c.(*chunk).counted.at = len(*h)
	*h = append(*h, c.(*chunk))
}

// Pop is heap.Interface's.
func (h *ageHeap) Pop() any {
	last := len(*h) - 1
	c := (*h)[last]
	*h = slices.Delete(*h, last, last+1)
	return c
}
