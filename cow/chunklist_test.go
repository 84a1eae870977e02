package cow

import (
	"bytes"
	"errors"
	"maps"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestEachChunk compares the chunks with the sums that the store keeps over them, and expects each kind at its time.
func TestEachChunk(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	look := func(want map[ChunkKind]int) {
		t.Helper()
		kinds, in := map[ChunkKind]int{}, s.Info()
		var n int
		var records, live int64
		next := uint32(0)
		must(t, s.EachChunk(func(c ChunkInfo) {
			if c.Slot < next || c.Seq == 0 || c.LiveBytes > c.RecordBytes || c.RecordBytes > c.FileBytes {
				t.Errorf("%+v, after slot %d", c, next)
			}
			next = c.Slot + 1
			kinds[c.Kind]++
			n, records, live = n+1, records+c.RecordBytes, live+c.LiveBytes
		}))
		if n != in.Chunks || records != in.ChunkBytes || live != in.LiveBytes {
			t.Errorf("%d chunks with %d bytes, %d of them live; the store has %d, %d, %d", n, records, live, in.Chunks, in.ChunkBytes, in.LiveBytes)
		}
		delete(kinds, ChunkOpen) // one, or also the next
		if !maps.Equal(kinds, want) {
			t.Errorf("%v, not %v", kinds, want)
		}
	}
	page := bytes.Repeat([]byte("x"), 1<<20)
	write := func(off int64) {
		t.Helper()
		_, err := d.WriteAt(page, off)
		must(t, err)
	}
	look(map[ChunkKind]int{})
	for i := range int64(4) {
		write(i << 20)
	}
	must(t, d.Flush())
	look(map[ChunkKind]int{ChunkFull: 4})
	for range 2 {
		write(0)
	}
	look(map[ChunkKind]int{ChunkFull: 5, ChunkDead: 1})
	var first *chunk
	s.slots.each(func(c *chunk) {
		if first == nil && s.kindOf(c) == ChunkFull {
			first = c
		}
	})
	s.setCleaning(first)
	look(map[ChunkKind]int{ChunkFull: 4, ChunkDead: 1, ChunkCleaning: 1})
	s.setCleaning(nil)
	damage := func(is bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		first.damaged = is
	}
	damage(true)
	look(map[ChunkKind]int{ChunkFull: 4, ChunkDead: 1, ChunkDamaged: 1})
	damage(false)
	must(t, errors.Join(d.Close(), s.Close()))
	if err := s.EachChunk(func(ChunkInfo) {}); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}
