package cow

import (
	"slices"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// BenchmarkForwards notes the forwards of a region that is full of the smallest records. An operation is one forward.
func BenchmarkForwards(b *testing.B) {
	s, _ := newStore(b, Options{})
	b.Cleanup(func() { s.Close() })
	const records = format.ForwardRegion / 48
	var r *region
	for i := 0; b.Loop(); i++ {
		n := i % records
		s.mu.Lock()
		s.forwards.mu.Lock()
		if n == 0 {
			r = &region{Region: metadata.Region{Slot: 1}}
			r.gen = s.changes.gen // no checkpoint has to write it
		}
		s.putForward(r, n, true, format.Forward{Offset: uint32(n) * 48, Mask: 1, To: format.MakeEntry(2, 4096, 48, 1, 0)})
		s.forwards.mu.Unlock()
		s.mu.Unlock()
	}
}

// TestTakenRegion changes forwards that a checkpoint has taken: the checkpoint must write what there was.
func TestTakenRegion(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	r := &region{Region: metadata.Region{Slot: 1}}
	put := func(i int, insert bool, mask uint16) {
		s.forwards.mu.Lock()
		defer s.forwards.mu.Unlock()
		s.putForward(r, i, insert, format.Forward{Offset: uint32(i) * 48, Mask: mask, To: format.MakeEntry(2, 4096, 48, 2, 0)})
	}
	s.mu.Lock()
	for i := range 3 {
		put(i, true, 3)
	}
	for _, change := range []func(){
		func() { put(1, false, 1) },
		func() { put(1, false, 0) },
		func() { put(0, true, 1) },
		func() { put(0, false, 0); put(0, false, 2) },
	} {
		s.changes.regions = []*region{r}
		taken := s.beginRegions()
		want := slices.Clone(taken[0].list)
		change()
		if !slices.Equal(taken[0].list, want) || slices.Equal(r.list, want) {
			t.Errorf("the checkpoint has %v, and the region was %v", taken[0].list, want)
		}
	}
	s.changes.regions = nil
	s.mu.Unlock()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
