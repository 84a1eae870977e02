package cow

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

// head stands for a branch's newest state in a leafKey.
const head = ^uint32(0)

// leafKey names a cached leaf: the head's, which changes, or a point's, which does not.
type leafKey struct {
	b           *branch
	index, asOf uint32
}

// leaf is a merged leaf in memory. Entries, Changed, epoch and gen change
// under Store.mu and the shard's lock together; either is enough to read them.
type leaf struct {
	key leafKey
	format.Leaf
	epoch uint32 // of the version that this is; 0: the branch has none of its own
	gen   uint64 // generation of the checkpoint that has to write it; 0: it is as in the table

	used atomic.Bool // since the clock hand passed
}

// touch marks the leaf used; readers share its cache line, so it is written
// only when it changes.
func (lf *leaf) touch() {
	if !lf.used.Load() {
		lf.used.Store(true)
	}
}

const shardCount = 64

// leafCache keeps merged leaves up to a number, by second chance; dirty ones stay.
type leafCache struct {
	perShard int
	load     func(leafKey, *leaf) error
	shards   [shardCount]shard
}

type shard struct {
	mu      sync.RWMutex
	leaves  map[leafKey]*leaf
	clock   []*leaf
	hand    int
	loading map[leafKey]*loading
}

// loading is one load that others wait for: a second loader could otherwise
// put back a leaf that was changed, written and evicted since it read it.
type loading struct {
	done chan struct{}
	err  error
}

func newLeafCache(bytes int64, load func(leafKey, *leaf) error) *leafCache {
	const leafBytes = 8*format.LeafBlocks + 160
	c := &leafCache{perShard: max(16, int(bytes/leafBytes/shardCount)), load: load}
	for i := range c.shards {
		c.shards[i].leaves = make(map[leafKey]*leaf)
		c.shards[i].loading = make(map[leafKey]*loading)
	}
	return c
}

func (c *leafCache) shard(k leafKey) *shard {
	h := (uint64(k.b.ID)<<32 | uint64(k.index)) ^ uint64(k.asOf)<<17
	return &c.shards[h*0x9e3779b97f4a7c15>>58]
}

// ensure loads a leaf if it is not there. It may be evicted again at once;
// callers look it up under a lock and come back if it was.
func (c *leafCache) ensure(k leafKey) error {
	s := c.shard(k)
	s.mu.RLock()
	_, ok := s.leaves[k]
	s.mu.RUnlock()
	if ok {
		return nil
	}
	s.mu.Lock()
	if _, ok := s.leaves[k]; ok {
		s.mu.Unlock()
		return nil
	}
	if l := s.loading[k]; l != nil {
		s.mu.Unlock()
		<-l.done
		return l.err
	}
	l := &loading{done: make(chan struct{})}
	s.loading[k] = l
	s.mu.Unlock()

	lf := &leaf{key: k}
	lf.used.Store(true)
	l.err = c.load(k, lf)

	s.mu.Lock()
	delete(s.loading, k)
	if l.err == nil {
		s.insert(lf, c.perShard)
	}
	s.mu.Unlock()
	close(l.done)
	return l.err
}

// insert adds a leaf and evicts a clean one if the shard is full of them.
func (s *shard) insert(lf *leaf, limit int) {
	s.leaves[lf.key] = lf
	if len(s.clock) < limit {
		s.clock = append(s.clock, lf)
		return
	}
	for range 2 * len(s.clock) {
		s.hand = (s.hand + 1) % len(s.clock)
		old := s.clock[s.hand]
		switch {
		case old.gen != 0:
		case old.used.Load():
			old.used.Store(false)
		default:
			delete(s.leaves, old.key)
			s.clock[s.hand] = lf
			return
		}
	}
	s.clock = append(s.clock, lf) // all are dirty; the checkpointer has been told
}

// view runs fn on a leaf under the shard's read lock, loading it first if needed.
func (c *leafCache) view(k leafKey, fn func(*leaf)) error {
	s := c.shard(k)
	for {
		s.mu.RLock()
		if lf := s.leaves[k]; lf != nil {
			lf.touch()
			fn(lf)
			s.mu.RUnlock()
			return nil
		}
		s.mu.RUnlock()
		if err := c.ensure(k); err != nil {
			return err
		}
	}
}

// lock returns a cached leaf with its shard locked for change, or nil, with
// nothing locked, when it is not in the cache.
func (c *leafCache) lock(k leafKey) (*leaf, *shard) {
	s := c.shard(k)
	s.mu.Lock()
	lf := s.leaves[k]
	if lf == nil {
		s.mu.Unlock()
		return nil, nil
	}
	lf.touch()
	return lf, s
}

// indexes lists, in order, the cached head leaves in [from, to) of a branch and
// its origins.
func (c *leafCache) indexes(b *branch, from, to uint32) (out []uint32) {
	if to-from <= shardCount { // fewer look-ups than shards
		for ; from < to; from++ {
			for o := b; o != nil; o = o.origin {
				if c.has(leafKey{o, from, head}) {
					out = append(out, from)
					break
				}
			}
		}
		return out
	}
	chain := map[*branch]bool{}
	for ; b != nil; b = b.origin {
		chain[b] = true
	}
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		for k := range s.leaves {
			if k.asOf == head && k.index >= from && k.index < to && chain[k.b] {
				out = append(out, k.index)
			}
		}
		s.mu.RUnlock()
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (c *leafCache) has(k leafKey) bool {
	s := c.shard(k)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.leaves[k] != nil
}

// forget drops the leaves of a key for which fn says so. They must be clean, or
// never be needed again.
func (c *leafCache) forget(fn func(leafKey) bool) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		kept := s.clock[:0]
		for _, lf := range s.clock {
			if fn(lf.key) {
				delete(s.leaves, lf.key)
			} else {
				kept = append(kept, lf)
			}
		}
		clear(s.clock[len(kept):])
		s.clock, s.hand = kept, 0
		s.mu.Unlock()
	}
}

// peek copies a cached head leaf if it holds a version of its branch at or
// before asOf, and returns the version's epoch, or 0.
func (c *leafCache) peek(k leafKey, asOf uint32, l *format.Leaf) uint32 {
	s := c.shard(k)
	s.mu.RLock()
	defer s.mu.RUnlock()
	lf := s.leaves[k]
	if lf == nil || lf.epoch > asOf || lf.epoch == 0 {
		return 0
	}
	*l = lf.Leaf
	return lf.epoch
}
