package cow

import (
	"sync"

	"github.com/vdisk/vdisk/format"
)

// unitCache keeps units that were read in part, verified and decompressed, since their other blocks are often read
// next. The cache is small, because a unit is useful only for a short time: data that is read again and again is in the
// page cache, and in the caches above the disk.
//
// A unit's key is its place: a chunk's sequence number and an offset. The content of a place never changes, and a
// sequence number is never reused in the life of a store. So no unit has to be removed: not when a block is overwritten
// or moved, since the map then names another place, and not when the chunk is removed and its slot is reused.
type unitCache struct{ shards [unitShards]unitShard }

const (
	// The cache has 128 units: 2 MiB if all are of the size that writes make, and at most 8 MiB.
	unitShardBits = 3
	unitShards    = 1 << unitShardBits
	unitsPerShard = 16
)

type unitShard struct {
	mu    sync.Mutex
	keys  [unitsPerShard]unitKey
	units [unitsPerShard][]byte
	next  int // the oldest unit, which is replaced next

	hits, misses uint64
}

// unitKey is a unit's place, together with whatever else verify compares with the map. So a unit that is found in the
// cache would pass verify.
type unitKey struct {
	chunk uint64       // sequence number; 0: none
	e     format.Entry // of the unit's first block
	first uint64       // the block at which the unit begins
}

func (r *planned) key() unitKey { return unitKey{r.c.Seq, r.e.WithIndex(0), r.first} }

func (c *unitCache) shard(k unitKey) *unitShard {
	return &c.shards[(k.chunk<<22^uint64(k.e.Offset()))*0x9e3779b97f4a7c15>>(64-unitShardBits)]
}

// get copies the pieces of a record from its unit. It returns false if the unit is not in the cache.
func (c *unitCache) get(k unitKey, pieces []piece, first int) bool {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.keys {
		if s.keys[i] == k {
			copyPieces(s.units[i], pieces, first)
			s.hits++
			return true
		}
	}
	return false
}

// put adds a unit that get did not find, and returns the memory of the unit that it replaces.
func (c *unitCache) put(k unitKey, unit []byte) (spare []byte) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.misses++
	i := s.next
	s.next = (i + 1) % unitsPerShard
	spare = s.units[i]
	s.keys[i], s.units[i] = k, unit
	return spare
}

// lookups returns how often get found a unit, and how often one had to be made anew.
func (c *unitCache) lookups() (hits, misses uint64) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		hits, misses = hits+s.hits, misses+s.misses
		s.mu.Unlock()
	}
	return hits, misses
}
