package cow

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/vdisk/vdisk/format"
)

// audit checks that a shard's accounting matches its content.
func (s *shard) audit(t *rapid.T) {
	for i := range s.segs {
		live, dirty := uint32(0), uint32(0)
		s.each(uint32(i), func(h handle, lf *leaf) {
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

// TestCacheAgainstModel changes, cleans and reads leaves in a cache of a few segments. The cache must never
// grow, never lose a dirty leaf, and never hold a wrong one.
func TestCacheAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := &cachedBranch{ID: 3}
		table := map[uint32]format.Leaf{} // as the checkpoints have written it
		c, err := newLeafCache(MinCacheBytes, func(k leafKey, l *format.Leaf) (uint32, error) {
			*l = table[k.Index]
			return 1, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.close()
		c.squeeze(rapid.IntRange(3, 9).Draw(t, "segments"))
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		s := &Store{cache: c, gen: 1}
		now := map[uint32]format.Leaf{}
		for range 300 {
			k := leafKey{b, rng.Uint32N(12), head}
			switch rng.IntN(8) {
			case 0: // a checkpoint
				for _, k := range s.dirty {
					sh := c.shard(b.ID, k.Index)
					_, h := sh.find(k)
					if h == 0 {
						t.Fatalf("dirty leaf %d is gone", k.Index)
					}
					table[k.Index] = sh.at(h).open().Leaf
					sh.setGen(h, 0)
					sh.pack(h)
				}
				s.dirty, s.gen = nil, s.gen+1
				for i := range c.shards {
					c.shards[i].dropWritten(s.gen, func(uint32) {})
				}
			case 1, 2, 3:
				if c.ensure(k) != nil {
					continue // full of dirty leaves
				}
				lf, sh := c.lock(k)
				if lf == nil {
					t.Fatal("evicted by nobody")
				}
				if o, err := s.makeWritable(k, sh, 1); err == nil {
					l := now[k.Index]
					var made format.Leaf
					testLeaf(rng, []int{0, 1, 16}[rng.IntN(3)], &made)
					from := rng.IntN(16) * 16
					for i := from; i < min(from+1+rng.IntN(256), 256); i++ {
						s.change(o, i, made.Entries[i])
						l.Entries[i] = made.Entries[i]
						l.SetChanged(i)
					}
					now[k.Index] = l
				}
				sh.mu.Unlock()
			default:
				var got format.Leaf
				if err := c.view(k, func(lf *leaf) { lf.copyTo(&got) }); err != nil {
					t.Fatal(err)
				}
				if got != now[k.Index] {
					t.Fatalf("leaf %d is not what it was", k.Index)
				}
			}
			for i := range c.shards {
				c.shards[i].audit(t)
			}
		}
	})
}

// TestWritersWaitForCheckpoints makes many times more leaves dirty than the smallest cache holds, from
// several goroutines.
func TestWritersWaitForCheckpoints(t *testing.T) {
	s, _ := newStore(t, Options{CacheBytes: MinCacheBytes})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 40, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	var wg sync.WaitGroup
	var longest [4]time.Duration
	for w := range longest {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 0))
			p := randomBytes(4096, uint64(w))
			for range 300 {
				start := time.Now()
				if _, err := d.WriteAt(p, rng.Int64N(1<<28)*4096); err != nil {
					t.Error(err)
					return
				}
				longest[w] = max(longest[w], time.Since(start))
			}
		})
	}
	wg.Wait()
	t.Logf("the longest writes took %v", longest)
	if got := s.committed.Load(); got < 1200/uint64(2*s.dirtyLimit) {
		t.Errorf("%d checkpoints for 1200 leaves, and %d of them fit", got, s.dirtyLimit)
	}
	must(t, d.Close())
	must(t, s.Close())
}

// TestReplayOfMoreThanFits opens a store whose log changes more leaves than the cache holds. When Open
// returns, the cache has its proper size again. A power cut before or after the commit that this takes loses
// nothing: the next Open, whose cache is also too small, finds all leaves.
func TestReplayOfMoreThanFits(t *testing.T) {
	dir := setup(t, 1<<30, format.Raw)
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s := open(t, dir, o)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	const leaves = 800
	for i := range int64(leaves) {
		_, err := d.WriteAt(randomBytes(4096, uint64(i)), i<<20)
		must(t, err)
		if i%100 == 50 {
			must(t, s.Snapshot(Ref{"v", string(rune('a' + i/100))}))
		}
	}
	must(t, d.Flush())
	killStore(s)

	o.CacheBytes = MinCacheBytes
	verify := func(s *Store) {
		for i := range s.cache.shards {
			if sh := &s.cache.shards[i]; len(sh.mapped) != sh.words {
				t.Errorf("after Open the cache has %d words and not %d", len(sh.mapped), sh.words)
			}
		}
		d, err := s.OpenDevice(Ref{Volume: "v"}, true)
		must(t, err)
		got := make([]byte, 4096)
		for i := range int64(leaves) {
			_, err := d.ReadAt(got, i<<20)
			must(t, err)
			if !bytes.Equal(got, randomBytes(4096, uint64(i))) {
				t.Fatalf("block of leaf %d is lost", i)
			}
		}
		must(t, d.Close())
		mustEnd(t, s)
	}
	cut := o
	var left []string // copies of the store after a power cut
	cut.onCommit = func(bool) error {
		if len(left) < 2 {
			left = append(left, filepath.Join(t.TempDir(), "left"))
			must(t, os.CopyFS(left[len(left)-1], os.DirFS(dir)))
		}
		return nil
	}
	s = open(t, dir, cut)
	if len(left) != 2 {
		t.Fatalf("Open was at %d places around a commit", len(left))
	}
	verify(s)
	for i, dir := range left {
		s := open(t, dir, o)
		if replayed := s.Recovery().Records > 0; replayed != (i == 0) {
			t.Errorf("after a cut at place %d of a commit: %+v", i, s.Recovery())
		}
		verify(s)
	}
}
