package cow

import (
	"container/heap"
	"errors"
	"math/bits"
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

// slotTable finds chunks by slot, keeps sums over all chunks, and knows which chunk is best to clean. None of these
// operations looks at all chunks. Changes happen under Store.mu; get needs no lock.
type slotTable struct {
	pages [format.MaxSlots / pageSlots]atomic.Pointer[slotPage] // nil if there never was a chunk in it

	taken     int    // slots that have a chunk
	cleanable uint64 // chunks before this sequence number lie before the replay position, and may be cleaned
	tally
	dirt [dirtSteps + 1]ageHeap // chunks that may be cleaned, by how much of them is dead

	lives [format.MaxChunkSize/liveStep + 1]int // chunks to clean now or later, by live bytes
	top   int                                   // no element after it is set

	// removed is the bytes in dead chunks whose files were removed or reused for new ones, since the store was opened.
	removed int64
}

// liveStep is how finely chunks are told apart by their live bytes.
const liveStep = 256 << 10

// pageSlots is how many slots a page of the table has.
const pageSlots = 4096

type slotPage struct {
	chunks [pageSlots]atomic.Pointer[chunk]
	taken  [pageSlots / 64]uint64 // a bit for each slot that has a chunk
	n      int                    // number of chunks
}

// tally is the sums over chunks. All but chunks are in bytes.
type tally struct {
	files     int64 // size of the files
	owed      int64 // size of the files that the next checkpoint gives up
	chunks    int64 // full chunks, whose rows the table has or will have
	ends      int64 // size of the records and headers of these
	live      int64 // live bytes of these
	dirtyEnds int64 // of chunks that may be cleaned: cleaning can give back dirtyEnds - dirtyLive
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

// counted is what the slot table has counted for a chunk. Store.mu guards it.
type counted struct {
	tally
	cleanable bool
	lives     int // index in slotTable.lives; 0 means not counted
	dirt      int // of a cleanable chunk: index of its heap in slotTable.dirt
	at        int // and its index in that heap
}

// dirtSteps is how finely chunks are told apart by their dead data: in steps of 1/200.
const dirtSteps = 200

// get returns the chunk in a slot, or nil if there is none. It needs no lock.
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

// put puts a chunk into its slot, and takes the chunk that was there out of the table.
func (s *slotTable) put(c *chunk) {
	n, i := c.Slot/pageSlots, c.Slot%pageSlots
	p := s.pages[n].Load()
	if p == nil {
		p = &slotPage{}
		s.pages[n].Store(p)
	}
	old := p.chunks[i].Swap(c) // get finds one of the two at any time
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

// freeSlot returns the first free slot, or false if there is none.
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

// end returns a slot after the last one that may be taken.
func (s *slotTable) end() uint32 {
	for n := len(s.pages); n > 0; n-- {
		if s.pages[n-1].Load() != nil {
			return uint32(n) * pageSlots
		}
	}
	return 0
}

// each calls fn for every chunk, by slot. It takes long if there are many chunks.
func (s *slotTable) each(fn func(*chunk)) {
	for n := range s.pages {
		s.page(n, fn)
	}
}

// page calls fn for the chunks of page n.
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

// all returns all chunks, by slot.
func (s *slotTable) all() (cs []*chunk) {
	s.each(func(c *chunk) { cs = append(cs, c) })
	return cs
}

func (s *slotTable) closeAll() error {
	var errs []error
	s.each(func(c *chunk) {
		errs = append(errs, c.Close())
	})
	return errors.Join(errs...)
}

// recount brings the sums up to date with a chunk. It must be called, in the same critical section of Store.mu, after
// any change of what the sums are made of: the chunk's size, end, live, pinnedDead, sealed, damaged, dead and gone, and
// the table's cleanable.
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

// recountLives does the part of recount for lives.
func (s *slotTable) recountLives(c *chunk) {
	n := 0
	if c.inSlot && c.Sealed && !c.gone && !c.dead && !c.damaged {
		n = int((c.live + liveStep - 1) / liveStep)
	}
	if was := c.counted.lives; n != was {
		s.lives[was]--
		s.lives[n]++
		c.counted.lives, s.top = n, max(s.top, n)
	}
}

// mostLive returns the live bytes of the chunk that has the most, rounded up to a multiple of liveStep.
func (s *slotTable) mostLive() int64 {
	for s.top > 0 && s.lives[s.top] == 0 {
		s.top--
	}
	return int64(s.top) * liveStep
}

// measure returns what a chunk adds to the sums.
func (s *slotTable) measure(c *chunk) (t tally) {
	if !c.inSlot {
		return t
	}
	t.files = int64(c.Size)
	if c.gone || c.dead || !c.Sealed {
		return t
	}
	t.chunks, t.ends, t.live = 1, int64(c.End), int64(c.live)
	if c.live == 0 && !c.kept {
		t.owed = int64(c.Size)
	}
	if s.mayClean(c) {
		t.dirtyEnds, t.dirtyLive = int64(c.End-format.ChunkHeaderSize), int64(c.live)+int64(c.pinnedDead)
	}
	return t
}

// mayClean reports whether all of a chunk is in the table, and it has live data that can be moved.
func (s *slotTable) mayClean(c *chunk) bool {
	return c.Sealed && !c.gone && !c.dead && !c.damaged && c.Seq < s.cleanable && c.live > 0 && c.End > format.ChunkHeaderSize
}

// used returns the part of a chunk that cleaning does not give back.
func (c *chunk) used() float64 {
	return (float64(c.live) + float64(c.pinnedDead)) / float64(c.End-format.ChunkHeaderSize)
}

// dirt returns how much of a chunk is dead, in steps of 1/dirtSteps.
func (c *chunk) dirt() int {
	all := uint64(c.End - format.ChunkHeaderSize)
	return int((all - min(all, uint64(c.live)+uint64(c.pinnedDead))) * dirtSteps / all)
}

// dirtiest chooses a chunk to clean by benefit and cost (Rosenblum and Ousterhout, 1992, section 3.5): what cleaning it
// gives back, times its age, divided by the cost of reading all of it and writing its live data. At least the part
// waste of the chunk is dead, rounded down to a step, and its sequence number is below limit. now is the sequence
// number of the next chunk. It chooses no chunk that takes more than room bytes to copy; tooLarge reports that there
// was no other.
//
// Of the chunks that are equally dead, to a step, the oldest is the best. So only one chunk of each step is looked at.
func (s *slotTable) dirtiest(waste float64, limit, now uint64, room int64) (best *chunk, tooLarge bool) {
	var most float64
	consider := func(c *chunk) {
		switch {
		case c.Seq >= limit:
			return
		case workFor(c) > room:
			tooLarge = true
			return
		}
		used := c.used()
		if benefit := (1 - used) * float64(now-c.Seq) / (1 + used); benefit > most {
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
	// A younger chunk may have less live data, because chunks differ in size.
	for i := first; i < len(s.dirt); i++ {
		for _, c := range s.dirt[i] {
			consider(c)
		}
	}
	return best, tooLarge
}

// ageHeap is a heap of chunks, the oldest first.
type ageHeap []*chunk

func (h ageHeap) Len() int           { return len(h) }
func (h ageHeap) Less(i, j int) bool { return h[i].Seq < h[j].Seq }
func (h ageHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].counted.at, h[j].counted.at = i, j
}

// Push implements heap.Interface.
func (h *ageHeap) Push(c any) {
	c.(*chunk).counted.at = len(*h)
	*h = append(*h, c.(*chunk))
}

// Pop implements heap.Interface.
func (h *ageHeap) Pop() any {
	last := len(*h) - 1
	c := (*h)[last]
	*h = slices.Delete(*h, last, last+1)
	return c
}
