package leafcache

import (
	"bytes"
	"cmp"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// audit checks that a shard's accounting matches its content.
func (s *shard) audit(t *rapid.T) {
	for i := range s.segs {
		live, dirty := uint32(0), uint32(0)
		s.each(uint32(i), func(h handle, lf *Leaf) {
			live += lf.words()
			if lf.dirtyGen() != 0 {
				dirty++
			}
			if *s.link(h) != h {
				t.Fatalf("leaf %d is not in its bucket", lf.index)
			}
		})
		if c := s.segs[i]; live != c.live || dirty != c.dirty {
			t.Fatalf("segment %d has %d words and %d dirty, %+v are kept", i, live, dirty, c)
		}
	}
	if len(s.free) == 0 {
		t.Fatal("no segment is free")
	}
}

// place is a version's place in the model.
type place struct{ index, epoch uint32 }

// cacheModel is a cache under test, and what it must hold.
type cacheModel struct {
	t        *rapid.T
	c        *Cache
	b        Branch
	rng      *rand.Rand
	epoch    uint32
	now      map[uint32]format.Leaf // the head
	versions map[place]format.Leaf  // of the head and of earlier epochs
	table    map[place]format.Leaf  // what checkpoints have written
	writing  *Generation            // the generation that a checkpoint is writing, or nil
	due      map[place]format.Leaf  // versions when it began
}

// load does what the store does: it looks in memory first, and then in the table.
func (m *cacheModel) load(k Key, l *format.Leaf) (uint32, error) {
	if of, epoch := m.c.Newest(k, l); of != nil {
		return epoch, nil
	}
	for epoch := m.epoch; epoch > 0; epoch-- {
		if v, ok := m.table[place{k.Index, epoch}]; ok {
			*l = v
			return epoch, nil
		}
	}
	*l = format.Leaf{}
	return 0, nil
}

// write changes some entries of a leaf, unless the cache is full of dirty leaves.
func (m *cacheModel) write(k Key) {
	l, err := m.c.LockLoaded(k)
	if errors.Is(err, ErrFull) {
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	defer l.Unlock()
	was := l.Leaf().Epoch()
	content, err := l.MakeWritable(m.epoch)
	if err != nil {
		return
	}
	want := m.now[k.Index]
	if was != m.epoch {
		want.Changed = [4]uint64{}
	}
	var made format.Leaf
	testLeaf(m.rng, []int{0, 1, 16}[m.rng.IntN(3)], &made)
	from := m.rng.IntN(16) * 16
	for i := from; i < min(from+1+m.rng.IntN(256), 256); i++ {
		content.Entries[i], want.Entries[i] = made.Entries[i], made.Entries[i]
		content.SetChanged(i)
		content.Put(i)
		want.SetChanged(i)
	}
	m.now[k.Index], m.versions[place{k.Index, m.epoch}] = want, want
}

// puts checks that a leaf knows all blocks that were put since the table's state of the version, if it says so.
func (m *cacheModel) puts(at place, c *Content) {
	was, found := m.table[at]
	blocks, ok := c.Puts()
	if !found || !ok {
		return
	}
	it := format.CopyItem{Op: format.CopyPuts, Value: format.AppendPuts(nil, &c.Leaf, blocks)}
	if got, err := it.Apply(format.AppendLeaf(nil, &was)); err != nil || !bytes.Equal(got, format.AppendLeaf(nil, &c.Leaf)) {
		m.t.Fatalf("leaf %v: the blocks %x do not make the leaf from the table's: %v", at, blocks, err)
	}
}

// checkpoint begins a checkpoint, or ends the one that was begun.
func (m *cacheModel) checkpoint() {
	if m.writing == nil {
		g := m.c.Begin()
		m.writing, m.due = &g, maps.Clone(m.versions)
		return
	}
	g := m.writing
	m.writing = nil
	if m.rng.IntN(3) == 0 {
		g.Abort()
		return
	}
	type state struct {
		place
		gen uint64
		Content
	}
	var states []state
	g.Each(func(v metadata.Version, gen uint64, c *Content) {
		states = append(states, state{place{v.Leaf, v.Epoch}, gen, *c})
	})
	if len(states) != g.Len() {
		m.t.Fatalf("%d versions were written of %d", len(states), g.Len())
	}
	slices.SortStableFunc(states, func(a, b state) int { return cmp.Compare(a.gen, b.gen) })
	for _, st := range states {
		m.puts(st.place, &st.Content)
		m.table[st.place] = st.Leaf
	}
	if !maps.Equal(m.table, m.due) {
		m.t.Fatal("the table is not what memory was when the checkpoint began")
	}
	g.Finish()
	if n := m.c.Unwritten(); int64(n) > m.b.unwritten.Load() {
		m.t.Fatalf("%d leaves are unwritten, and %d of the only branch", n, m.b.unwritten.Load())
	}
}

// TestCacheAgainstModel changes, writes and reads leaves in a cache of a few segments, while checkpoints begin, end and
// fail, and epochs end. The cache must never grow, never lose a dirty leaf, and never hold a wrong one.
func TestCacheAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &cacheModel{
			t: t, b: Branch{ID: 3}, epoch: 1, now: map[uint32]format.Leaf{},
			versions: map[place]format.Leaf{}, table: map[place]format.Leaf{},
		}
		var err error
		if m.c, err = New(MinBytes, m.load); err != nil {
			t.Fatal(err)
		}
		defer m.c.Close()
		m.c.Restrict(rapid.IntRange(3, 12).Draw(t, "leaves"))
		m.rng = rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		for range 300 {
			k := Key{&m.b, m.rng.Uint32N(12), Head}
			switch m.rng.IntN(16) {
			case 0, 1:
				m.checkpoint()
			case 2:
				m.epoch++
			case 3, 4, 5, 6, 7, 8:
				m.write(k)
			default:
				var got format.Leaf
				if err := m.c.View(k, func(lf *Leaf) { lf.CopyTo(&got) }); err != nil {
					t.Fatal(err)
				}
				if got != m.now[k.Index] {
					t.Fatalf("leaf %d is not what it was", k.Index)
				}
			}
			for i := range m.c.shards {
				m.c.shards[i].audit(t)
			}
		}
	})
}

// TestFinishDropsPreimagesFirst lets Finish wait for one shard's lock while it drops the pre-images. No leaf may be clean
// by then: a clean leaf may be evicted, and its next reader would take a pre-image for the newest state.
func TestFinishDropsPreimagesFirst(t *testing.T) {
	c, err := New(16<<20, func(Key, *format.Leaf) (uint32, error) { return 0, nil })
	if err != nil {
		t.Fatal(err)
	}
	if len(c.shards) < 2 {
		t.Fatal("the cache has one shard")
	}
	last := &c.shards[len(c.shards)-1]
	b := &Branch{ID: 1}
	k := Key{Branch: b, AsOf: Head}
	for c.shard(b.ID, k.Index) == last {
		k.Index++
	}
	dirty := func() bool {
		l := c.Lock(k)
		defer l.Unlock()
		return l.Leaf().dirtyGen() != 0
	}
	if err := c.Ensure(k); err != nil {
		t.Fatal(err)
	}
	l := c.Lock(k)
	_, err = l.MakeWritable(1)
	l.Unlock()
	if err != nil || !dirty() {
		t.Fatal("the leaf is not dirty:", err)
	}
	g := c.Begin()
	g.Each(func(metadata.Version, uint64, *Content) {})
	last.mu.Lock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Finish()
	}()
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if !dirty() {
			t.Error("a leaf is clean before all pre-images are gone")
			break
		}
	}
	last.mu.Unlock()
	<-done
	if dirty() {
		t.Error("the leaf is dirty for ever")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}
