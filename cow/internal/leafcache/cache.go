package leafcache

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/format"
)

// ErrFull is returned if the cache is full of leaves that a checkpoint still has to write.
var ErrFull = errors.New("the cache is full of changes")

const (
	maxShards = 64
	// minShard is the least memory of a shard: 32 segments.
	minShard = 1 << 20
	// MinBytes is the least memory that a cache gets: New raises smaller values to it.
	MinBytes = 1 << 20
	// MaxBytes is the most memory that a cache should get. At first the cache takes only address space, but its
	// bookkeeping grows with its size and takes memory at once.
	MaxBytes = 1 << 40

	// checkpointCopy is the memory that a checkpoint takes for each leaf that it writes: the leaf's encoding (1.9 KB)
	// and the page of the table that holds it (4 KiB).
	checkpointCopy = 6 << 10
	// bucketShare is the ratio of a shard's memory to the memory of its buckets: one 4-byte handle for each 96 bytes.
	// The smallest leaves take 32 bytes.
	bucketShare = 96 / 4
)

// Cache keeps merged leaves and pre-images in memory of a fixed size: see the package comment.
type Cache struct {
	load   func(Key, *format.Leaf) (epoch uint32, err error)
	shards []shard
	shift  uint // the shift that makes a hash the shard's number

	scratch sync.Pool // *loaded

	// What the next checkpoint writes. The store's lock guards it.
	gen       uint64 // the present generation, from 1: that of leaves that become dirty now
	dirty     []Key  // leaves of the present generation
	unwritten int    // leaves and pre-images of the present generation
}

type shard struct {
	c  *Cache // never changes
	mu lockorder.RWMutex[lockorder.Shard]
	arena
	buckets   []uint32    // handles, each the first of a list
	preimaged []leafPlace // where pre-images are; eachPreimage removes places that have none any more
	loading   map[Key]*loading
	lookups   atomic.Uint64 // of leaves that a read or a write needs
	loads     uint64        // of leaves that were not in memory
	mapped    []uint64      // all of the shard's memory
	words     int           // intended len(mapped); larger while replaying a larger cache's log
}

// MostDirty returns how many leaves one checkpoint may write, given the bytes of the cache. A quarter of those bytes is
// kept for the checkpoint's copies.
func MostDirty(bytes int64) int { return int(max(bytes, MinBytes) / 4 / checkpointCopy) }

// New returns an empty cache. bytes is the memory for it and for what a checkpoint copies of it. load fills in a leaf,
// merged with everything older, and returns the epoch of the branch's own version, or 0 if the branch has none. It is
// called without any lock of the cache.
func New(bytes int64, load func(Key, *format.Leaf) (epoch uint32, err error)) (*Cache, error) {
	bytes = max(bytes, MinBytes) / 4 * 3 // the rest is for checkpoints, see MostDirty
	n := 1
	for n < maxShards && bytes/int64(2*n) >= minShard {
		n *= 2
	}
	c := &Cache{load: load, shards: make([]shard, n), gen: 1}
	c.scratch.New = func() any { return new(loaded) }
	for c.shift = 64; n > 1; n /= 2 {
		c.shift--
	}
	words := int(bytes / 8 / int64(len(c.shards)))
	for i := range c.shards {
		c.shards[i].c = c
		if err := c.shards[i].init(words); err != nil {
			return nil, errors.Join(err, c.Close())
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
	s.loading = make(map[Key]*loading)
	s.reset(segmentWords, len(s.mem)/segmentWords)
	return nil
}

// divide splits the shard's memory into the buckets and the arena.
func (s *shard) divide() {
	buckets := s.words / bucketShare
	s.buckets = unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(s.mapped))), 2*buckets)
	s.mem = s.mapped[buckets:]
}

// Grow doubles the memory of a leaf's shard, beyond the cache's limit. The next checkpoint after which the shard has
// nothing dirty gives it back.
func (c *Cache) Grow(k Key) error {
	s := c.shard(k.Branch.ID, k.Index)
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

// Grown reports whether a shard has more memory than intended.
func (c *Cache) Grown() bool {
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

// shrink gives back the extra memory of the shards that have grown and have nothing dirty. Their leaves are forgotten.
func (c *Cache) shrink() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		if len(s.mapped) > s.words && !s.hasDirty() {
			if m, err := allocate(s.words); err == nil && deallocate(s.mapped) == nil {
				s.mapped = m
				s.divide()
				s.reset(s.segWords, len(s.mem)/int(s.segWords))
			}
		}
		s.mu.Unlock()
	}
}

// hasDirty reports whether a checkpoint has to write anything of the shard.
func (s *shard) hasDirty() bool {
	return slices.ContainsFunc(s.segs, func(g segment) bool { return g.dirty > 0 })
}

// Restrict makes each shard forget its leaves. It leaves the shard memory for so many open leaves, one of them for a
// leaf that moves, or, with 0, all of its memory. A shard that has something dirty stays as it is. Tests use it: leaves
// are then evicted and loaded again all the time, and writers wait for checkpoints.
func (c *Cache) Restrict(leaves int) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		if !s.hasDirty() {
			clear(s.buckets)
			if leaves > 0 {
				s.reset(uint32(openWords)+40, leaves)
			} else {
				s.reset(segmentWords, len(s.mem)/segmentWords)
			}
		}
		s.mu.Unlock()
	}
}

// Used returns how many bytes the leaves in memory take. That includes their part of the buckets, and of the segment
// that is kept free, which is 1 of 48.
func (c *Cache) Used() int64 {
	words := uint64(0)
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		for _, g := range s.segs {
			words += uint64(g.live)
		}
		s.mu.RUnlock()
	}
	return int64(float64(8*words) * (1 + 1/(8*float64(bucketShare)/2) + 1.0/48))
}

// Close frees the memory. Later look-ups find nothing.
func (c *Cache) Close() error {
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

// hash returns the hash of a leaf's branch and index. So all leaves and pre-images with the same branch and index are
// in one bucket.
func hash(branch, index uint32) uint64 {
	return (uint64(branch)<<32 | uint64(index)) * 0x9e3779b97f4a7c15
}

func (c *Cache) shard(branch, index uint32) *shard {
	return &c.shards[hash(branch, index)>>c.shift] // a shift by 64 gives 0
}

// bucket returns the first handle of the bucket of (branch, index). It uses bits of the hash that did not choose the
// shard.
func (s *shard) bucket(branch, index uint32) *handle {
	return &s.buckets[(hash(branch, index)>>16&(1<<32-1))*uint64(len(s.buckets))>>32]
}

// find returns a leaf that is not a pre-image, and its handle. It returns nil if the leaf is not in memory.
func (s *shard) find(k Key) (*Leaf, handle) {
	if s.buckets == nil {
		return nil, 0
	}
	for h := *s.bucket(k.Branch.ID, k.Index); h != 0; {
		lf := s.at(h)
		if lf.index == k.Index && lf.branch == k.Branch.ID && lf.asOf == k.AsOf && !lf.is(statePreimage) {
			return lf, h
		}
		h = lf.next
	}
	return nil, 0
}

// link returns the place that refers to the leaf at h: its bucket, or the leaf before it in the bucket.
func (s *shard) link(h handle) *handle {
	lf := s.at(h)
	p := s.bucket(lf.branch, lf.index)
	for *p != h {
		p = &s.at(*p).next
	}
	return p
}

// unlink takes the leaf at h out of its bucket.
func (s *shard) unlink(h handle) { *s.link(h) = s.at(h).next }

// put adds the leaf at h, in memory that was allocated for it, to its bucket.
func (s *shard) put(h handle, state uint32) {
	lf := s.at(h)
	p := s.bucket(lf.branch, lf.index)
	lf.next, *p = *p, h
	lf.state.Store(state)
}

// remove takes the leaf at h out of memory.
func (s *shard) remove(h handle) {
	s.setGen(h, 0)
	s.unlink(h)
	s.drop(h)
}

// setGen sets the generation of the checkpoint that has to write a leaf; 0 makes the leaf clean. gen may be other than
// 0 only for an open leaf.
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

// open makes a leaf that is in memory an open one, which can be changed. It returns nil if there is no room. Other
// leaves of the shard may move.
func (s *shard) open(k Key) *openLeaf {
	lf, _ := s.find(k)
	if o := lf.open(); o != nil {
		return o
	}
	was := Leaf{branch: lf.branch, index: lf.index, asOf: lf.asOf, epoch: lf.epoch}
	var l format.Leaf
	lf.CopyTo(&l)
	to := s.alloc(uint32(openWords))
	if to == 0 {
		return nil
	}
	if lf, h := s.find(k); lf != nil { // alloc may have moved or evicted it
		s.remove(h)
	}
	o := (*openLeaf)(s.at(to).pointer())
	o.branch, o.index, o.asOf, o.epoch = was.branch, was.index, was.asOf, was.epoch
	o.gen, o.content = 0, Content{Leaf: l}
	s.put(to, uint32(openWords)|stateOpen|stateUsed)
	return o
}

// pack makes a clean leaf small again, in place.
func (s *shard) pack(h handle) {
	o := s.at(h).open()
	if o == nil || o.gen != 0 {
		return
	}
	var buf [format.MaxPacked]uint64
	p := format.AppendPacked(buf[:0], &o.content.Leaf)
	words := headerWords + len(p)
	rest := openWords - words
	if rest < headerWords {
		return // no room for the header that the rest needs too
	}
	state := o.state.Load()
	copy(s.mem[int(h)-1+headerWords:], p)
	s.at(h).state.Store(state&stateUsed | uint32(words))
	gone := h + uint32(words)
	s.at(gone).state.Store(uint32(rest))
	s.drop(gone)
}
