package cow

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// sumsAgree compares what the slot table keeps with a count of all chunks. Nobody appends meanwhile.
func (s *Store) sumsAgree() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var want tally
	dirty := map[*chunk]bool{}
	for _, c := range s.slots.all() {
		now := s.slots.measure(c)
		want.add(&now, +1)
		dirty[c] = s.slots.mayClean(c)
		switch {
		case now != c.counted.tally:
			return fault.Corruptf("chunk %s is counted as %+v, and is %+v", c.Name(), c.counted.tally, now)
		case c.counted.cleanable != dirty[c]:
			return fault.Corruptf("chunk %s may be cleaned: %v; it is counted so: %v", c.Name(), dirty[c], c.counted.cleanable)
		}
	}
	if want != s.slots.tally {
		return fault.Corruptf("the sums are %+v, and should be %+v", s.slots.tally, want)
	}
	for i, h := range s.slots.dirt {
		for at, c := range h {
			if !dirty[c] || c.counted.at != at || c.counted.dirt != i || c.dirt() != i || at > 0 && h[(at-1)/2].Seq > c.Seq {
				return fault.Corruptf("chunk %s is misplaced among those that may be cleaned", c.Name())
			}
			delete(dirty, c)
		}
	}
	for c, may := range dirty {
		if may {
			return fault.Corruptf("chunk %s is not among those that may be cleaned", c.Name())
		}
	}
	return nil
}

// bare is a slot table without files, of n chunks of random content.
func bare(n int, r *rand.Rand) (*slotTable, []*chunk) {
	s := &slotTable{cleanable: ^uint64(0)}
	cs := make([]*chunk, n)
	for i := range cs {
		c := newChunk(uint32(i), uint64(i+1), nil)
		c.Size, c.End, c.Sealed = 64<<20, 64<<20, true
		c.live = r.Uint32N(64 << 20)
		cs[i] = c
		s.put(c)
	}
	return s, cs
}

// TestDirtiest compares the choice of what to clean with one that looks at all chunks, while they come, go and die.
func TestDirtiest(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	s, cs := bare(300, r)
	now := uint64(len(cs) + 1)
	benefit := func(c *chunk) float64 { return (1 - c.used()) * float64(now-c.Seq) / (1 + c.used()) }
	for range 5000 {
		i := r.IntN(len(cs))
		c := cs[i]
		switch r.IntN(4) {
		case 0:
			s.remove(c.Slot)
			c = newChunk(c.Slot, now, nil)
			now++
			c.Size, c.End, c.Sealed, c.live = 64<<20, 64<<20, true, 64<<20-format.ChunkHeaderSize
			cs[i] = c
			s.put(c)
		case 1:
			c.pinnedDead = r.Uint32N(1 << 20)
		case 2:
			c.damaged = r.IntN(20) == 0
		default:
			c.live -= min(c.live, r.Uint32N(8<<20))
		}
		s.recount(c)
		waste, limit := float64(r.IntN(dirtSteps))/dirtSteps, now-r.Uint64N(200)
		got, _ := s.dirtiest(waste, limit, now, math.MaxInt64)
		var best *chunk
		for _, c := range cs {
			if s.mayClean(c) && c.Seq < limit && c.dirt() >= int(waste*dirtSteps) && (best == nil || benefit(c) > benefit(best)) {
				best = c
			}
		}
		switch {
		case (got == nil) != (best == nil):
			t.Fatalf("chose %v, and not %v", got, best)
		case got != nil && (!slices.Contains(cs, got) || got.Seq >= limit || benefit(got) < benefit(best)*0.9 && benefit(got) < benefit(best)-1):
			t.Fatalf("chose a benefit of %.2f, where there is one of %.2f", benefit(got), benefit(best))
		}
	}
}

// TestFreeSlot: the first one that is free is given, across pages, and none when all are taken.
func TestFreeSlot(t *testing.T) {
	s := &slotTable{}
	const n = 3 * pageSlots
	for i := range uint32(n) {
		if slot, ok := s.freeSlot(); !ok || slot != i {
			t.Fatalf("slot %d, %v; want %d", slot, ok, i)
		}
		s.put(newChunk(i, uint64(i)+1, nil))
	}
	for _, slot := range []uint32{n - 1, pageSlots, 63, 0} {
		s.remove(slot)
		if got, ok := s.freeSlot(); !ok || got != slot {
			t.Errorf("slot %d, %v; want %d", got, ok, slot)
		}
	}
	if s.get(0) != nil || s.get(1) == nil || s.get(format.MaxSlots-1) != nil || s.get(format.MaxSlots) != nil {
		t.Error("a slot has what it should not")
	}
	s = &slotTable{}
	one := &chunk{}
	for n := range s.pages { // as if every chunk were there
		p := &slotPage{n: pageSlots}
		p.chunks[0].Store(one)
		for i := range p.taken {
			p.taken[i] = ^uint64(0)
		}
		s.pages[n].Store(p)
	}
	if slot, ok := s.freeSlot(); ok {
		t.Errorf("slot %d is free where none is", slot)
	}
}

// TestSumsFollowChunks: what the slot table keeps is right after all that can happen to chunks.
func TestSumsFollowChunks(t *testing.T) {
	s, d := halfDead(t, nil)
	must(t, errors.Join(s.sumsAgree(), s.Snapshot(Ref{"v", "a"}), s.Checkpoint(), s.sumsAgree()))
	c := s.slots.get(0)
	s.mu.Lock()
	c.live++ // and nobody says so
	s.mu.Unlock()
	if s.sumsAgree() == nil {
		t.Error("a wrong sum is not found")
	}
	s.mu.Lock()
	c.live--
	s.mu.Unlock()
	_, err := s.Clean(t.Context(), worthwhile)
	must(t, errors.Join(err, s.sumsAgree(), s.Remove(Ref{"v", "a"}, false), s.reclaimDeleted(t.Context()), s.sumsAgree()))
	mustEnd(t, s, d)
}

// BenchmarkManyChunks is what the cleaner, the writers and Info ask of a store with very many chunks, while they keep
// everybody else waiting.
func BenchmarkManyChunks(b *testing.B) {
	for _, n := range []int{16 << 10, 256 << 10, 1 << 20} {
		s, _ := newStore(b, Options{checkpointInterval: -1})
		from, cs := bare(n, rand.New(rand.NewPCG(1, 1)))
		s.slots.cleanable = from.cleanable
		for i, c := range cs {
			cs[i] = &chunk{Chunk: wal.FoundChunk(c.Slot, c.Seq, c.End, s.fs), live: c.live}
			s.slots.put(cs[i])
		}
		th := throttle{s: s}
		for _, c := range []struct {
			what string
			fn   func()
		}{
			{"urgency", func() { s.urgency() }},
			{"room", func() { th.room() }},
			{"chunkSize", func() { _, _ = s.wal.SizeFor() }},
			{"put", func() { s.slots.put(cs[5]) }},
			{"victim", func() { _, _ = s.victim(0.5, all) }},
			{"freeSlot", func() { s.slots.freeSlot() }},
			{"Info", func() { s.Info() }},
		} {
			b.Run(c.what+"/TiB="+strconv.Itoa(n/16384), func(b *testing.B) {
				for range b.N {
					c.fn()
				}
			})
		}
		for _, c := range cs {
			s.slots.remove(c.Slot)
		}
		must(b, s.Close())
	}
}
