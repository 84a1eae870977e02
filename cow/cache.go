package cow

import (
	"errors"
	"slices"
	"sync"
	"unsafe"

	"github.com/vdisk/vdisk/format"
)

// errFull says that there is no room in the cache beside leaves that a checkpoint has to write.
var errFull = errors.New("the cache is full of changes")

const (
	maxShards = 64
	// minShard is how little a shard may have: 32 segments.
	minShard = 1 << 20
	// MinCacheBytes is the least that Options.CacheBytes gives.
	MinCacheBytes = 1 << 20
	// MaxCacheBytes is the most that Options.CacheBytes can be. Only its address space is
	// taken at first, but what keeps account of it grows with it, and takes memory at once.
	MaxCacheBytes = 1 << 40

	// checkpointCopy is what a checkpoint takes for each leaf that it writes: its encoding (1.9 KB) and the page
	// that it is on in the table (4 KiB).
	checkpointCopy = 6 << 10
	// bucketShare of a shard's memory are its buckets: 4 bytes for 96 of leaves, of which the least take 48.
	bucketShare = 96 / 4
)

// leafCache keeps merged leaves, and images (preimage.go) in memory of a fixed size. Leaves that are as in the
// table are packed, and go by second chance when room is needed; dirty ones stay.
type leafCache struct {
	load   func(leafKey, *openLeaf) error
	shards []shard
	shift  uint // of a hash, to the shard's number

	scratch sync.Pool // *loaded
}

type shard struct {
	mu sync.RWMutex
	arena
	buckets []uint32    // handles
	imaged  []leafPlace // where images are; and where some were, until eachImage sees that
	loading map[leafKey]*loading
	mapped  []uint64 // all memory
	words   int      // how much it is to be; len(mapped) is more while a log is replayed that a larger cache wrote
}

// leafPlace is which leaf of which branch.
type leafPlace struct{ branch, index uint32 }

// dirtyLimit is how many leaves one checkpoint may write in a cache of so many bytes: a quarter of
// them is kept for its copies.
func dirtyLimit(bytes int64) int { return int(max(bytes, MinCacheBytes) / 4 / checkpointCopy) }

func newLeafCache(bytes int64, load func(leafKey, *openLeaf) error) (*leafCache, error) {
	bytes = max(bytes, MinCacheBytes) / 4 * 3 // the rest is for checkpoints, see dirtyLimit
	n := 1
	for n < maxShards && bytes/int64(2*n) >= minShard {
		n *= 2
	}
	c := &leafCache{load: load, shards: make([]shard, n)}
	c.scratch.New = func() any { return new(loaded) }
	for c.shift = 64; n > 1; n /= 2 {
		c.shift--
	}
	words := int(bytes / 8 / int64(len(c.shards)))
	for i := range c.shards {
		if err := c.shards[i].init(words); err != nil {
			return nil, errors.Join(err, c.close())
		}
	}
	return c, nil
}

func (s *shard) init(words int) (err error) {
	if s.mapped, err = allocate(words); err != nil {
		return err
	}
	s.words = words
	s.divide()
	s.loading = make(map[leafKey]*loading)
	s.reset(segmentWords, len(s.mem)/segmentWords)
	return nil
}

// divide gives the buckets their part of the memory.
func (s *shard) divide() {
	buckets := s.words / bucketShare
	s.buckets = unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(s.mapped))), 2*buckets)
	s.mem = s.mapped[buckets:]
}

// grow doubles the shard's memory.
func (s *shard) grow() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m, err := allocate(2 * len(s.mapped))
	if err != nil {
		return err
	}
	copy(m, s.mapped)
	if err := deallocate(s.mapped); err != nil {
		return err
	}
	s.mapped = m
	s.divide()
	for n := len(s.mem) / int(s.segWords); len(s.segs) < n; {
		s.free = append(s.free, uint32(len(s.segs)))
		s.segs = append(s.segs, segment{})
	}
	return nil
}

// grown reports whether a shard has more memory than it is to have.
func (c *leafCache) grown() bool {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		grown := len(s.mapped) > s.words
		s.mu.RUnlock()
		if grown {
			return true
		}
	}
	return false
}

// shrink takes the memory of shards that have grown back, where nothing is dirty. What else they have is forgotten.
func (c *leafCache) shrink() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		if len(s.mapped) > s.words && !slices.ContainsFunc(s.segs, func(g segment) bool { return g.dirty > 0 }) {
			if m, err := allocate(s.words); err == nil && deallocate(s.mapped) == nil {
				s.mapped = m
				s.divide()
				s.reset(s.segWords, len(s.mem)/int(s.segWords))
			}
		}
		s.mu.Unlock()
	}
}

// close gives the memory back. What comes later finds nothing.
func (c *leafCache) close() error {
	var errs []error
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		if s.mapped != nil {
			errs = append(errs, deallocate(s.mapped))
			s.arena, s.buckets, s.mapped = arena{}, nil, nil
		}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

// hash is of a leaf's place: all that is of one place is in one bucket.
func hash(branch, index uint32) uint64 {
	return (uint64(branch)<<32 | uint64(index)) * 0x9e3779b97f4a7c15
}

func (c *leafCache) shard(branch, index uint32) *shard {
	return &c.shards[hash(branch, index)>>c.shift] // a shift by 64 gives 0
}

// bucket returns the first handle of a place, with the bits of the hash that did not choose the shard.
func (s *shard) bucket(branch, index uint32) *handle {
	return &s.buckets[(hash(branch, index)>>16&(1<<32-1))*uint64(len(s.buckets))>>32]
}

// find returns a leaf that is no image, and where it is; nil if it is not in memory.
func (s *shard) find(k leafKey) (*leaf, handle) {
	if s.buckets == nil {
		return nil, 0
	}
	for h := *s.bucket(k.b.ID, k.index); h != 0; {
		lf := s.at(h)
		if lf.index == k.index && lf.branch == k.b.ID && lf.asOf == k.asOf && !lf.is(stateImage) {
			return lf, h
		}
		h = lf.next
	}
	return nil, 0
}

// link returns what refers to a leaf.
func (s *shard) link(h handle) *handle {
	lf := s.at(h)
	p := s.bucket(lf.branch, lf.index)
	for *p != h {
		p = &s.at(*p).next
	}
	return p
}

// unlink takes a leaf out of its bucket.
func (s *shard) unlink(h handle) { *s.link(h) = s.at(h).next }

// put makes the memory at h, which was allocated, a leaf of its bucket.
func (s *shard) put(h handle, state uint32) {
	lf := s.at(h)
	p := s.bucket(lf.branch, lf.index)
	lf.next, *p = *p, h
	lf.state.Store(state)
}

// remove takes a leaf out of memory.
func (s *shard) remove(h handle) {
	s.setGen(h, 0)
	s.unlink(h)
	s.drop(h)
}

// setGen says which checkpoint has to write a leaf; gen is not 0 for an open one only.
func (s *shard) setGen(h handle, gen uint64) {
	o := s.at(h).open()
	switch {
	case o == nil || (o.gen == 0) == (gen == 0):
	case gen == 0:
		s.segment(h).dirty--
	default:
		s.segment(h).dirty++
	}
	if o != nil {
		o.gen = gen
	}
}

// lock returns a cached leaf with its shard locked for change, or nil, with
// nothing locked, when it is not in the cache.
func (c *leafCache) lock(k leafKey) (*leaf, *shard) {
	s := c.shard(k.b.ID, k.index)
	s.mu.Lock()
	lf, _ := s.find(k)
	if lf == nil {
		s.mu.Unlock()
		return nil, nil
	}
	lf.touch()
	return lf, s
}

// open makes a leaf that is in memory one that can be changed, or returns nil if there is no room. Other leaves
// of the shard may move.
func (s *shard) open(k leafKey) *openLeaf {
	lf, _ := s.find(k)
	if o := lf.open(); o != nil {
		return o
	}
	was := leaf{branch: lf.branch, index: lf.index, asOf: lf.asOf, epoch: lf.epoch}
	var l format.Leaf
	lf.copyTo(&l)
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return nil
	}
	if lf, h := s.find(k); lf != nil { // it may have moved, or gone
		s.remove(h)
	}
	o := (*openLeaf)(s.at(to).pointer())
	o.branch, o.index, o.asOf, o.epoch = was.branch, was.index, was.asOf, was.epoch
	o.gen, o.Leaf = 0, l
	s.put(to, uint32(openWords)|stateOpen|stateUsed)
	return o
}

// pack makes a leaf that is as in the table small again, in its place.
func (s *shard) pack(h handle) {
	o := s.at(h).open()
	if o == nil || o.gen != 0 {
		return
	}
	var buf [format.MaxPacked]uint64
	p := format.AppendPacked(buf[:0], &o.Leaf)
	words := headerWords + len(p)
	rest := openWords - words
	if rest < headerWords {
		return // the rest is to have a header, too
	}
	state := o.state.Load()
	copy(s.mem[int(h)-1+headerWords:], p)
	s.at(h).state.Store(state&stateUsed | uint32(words))
	gone := h + uint32(words)
	s.at(gone).state.Store(uint32(rest))
	s.drop(gone)
}

// indexes lists, in order, the leaves in [from, to) of a branch and its origins that memory has and the table may not.
func (c *leafCache) indexes(b *branch, from, to uint32) (out []uint32) {
	var chain []*branch
	for ; b != nil; b = b.origin {
		if b.unwritten.Load() > 0 {
			chain = append(chain, b)
		}
	}
	if len(chain) == 0 {
		return nil
	}
	if to-from <= 64 { // look-ups are cheaper than all that is dirty
		for ; from < to; from++ {
			if slices.ContainsFunc(chain, func(b *branch) bool { return c.has(leafKey{b, from, head}) }) {
				out = append(out, from)
			}
		}
		return out
	}
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		s.eachDirty(func(_ handle, o *openLeaf) {
			if o.index >= from && o.index < to && slices.ContainsFunc(chain, func(b *branch) bool { return b.ID == o.branch }) {
				out = append(out, o.index)
			}
		})
		s.mu.RUnlock()
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (c *leafCache) has(k leafKey) bool {
	s := c.shard(k.b.ID, k.index)
	s.mu.RLock()
	defer s.mu.RUnlock()
	lf, _ := s.find(k)
	return lf != nil
}

// eachDirty calls fn for what a checkpoint has to write.
func (s *shard) eachDirty(fn func(handle, *openLeaf)) {
	for i := range s.segs {
		if s.segs[i].dirty == 0 {
			continue
		}
		s.each(uint32(i), func(h handle, lf *leaf) {
			if lf.dirtyGen() != 0 {
				fn(h, lf.open())
			}
		})
	}
}

// forget drops the leaves of a branch: of its head, or of its points too. A dirty head's leaf is a version that a point
// needs: it becomes an image.
func (c *leafCache) forget(b *branch, points bool) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		for j := range s.segs {
			s.each(uint32(j), func(h handle, lf *leaf) {
				switch {
				case lf.branch != b.ID || lf.asOf != head && !points || lf.is(stateImage):
				case lf.dirtyGen() != 0:
					lf.asOf = lf.epoch
					lf.state.Or(stateImage)
					s.imaged = append(s.imaged, leafPlace{lf.branch, lf.index})
					b.unwritten.Add(1)
				default:
					s.remove(h)
				}
			})
		}
		s.mu.Unlock()
	}
}
