package cow

import (
	"sync"

	"github.com/vdisk/vdisk/format"
)

// unitCache keeps units that were read in part, verified and decompressed, since their other blocks are often read
// next. It is as small as that use is short: what is read again and again is in the page cache, and above the disk.
//
// A unit is known by its place: a chunk's sequence number and an offset. What is there never changes, and neither does
// the number come again in the life of a store. So nothing has to be taken out: not when a block is overwritten or
// moved (the map names another place then), and not when the chunk goes and its slot is used again.
type unitCache struct{ shards [unitShards]unitShard }

const (
	// 128 units: 2 MiB of those that writes make, at most 8 MiB.
	unitShardBits = 3
	unitShards    = 1 << unitShardBits
	unitsPerShard = 16
)

type unitShard struct {
	mu    sync.Mutex
	keys  [unitsPerShard]unitKey
	units [unitsPerShard][]byte
	next  int // to be replaced: the oldest
}

// unitKey is where a unit is, and what else verify compares with the map: what is found is what would pass it.
type unitKey struct {
	chunk uint64       // sequence number; 0: none
	e     format.Entry // of the unit's first block
	first uint64       // the block at which the unit begins
}

func (r *planned) key() unitKey { return unitKey{r.c.seq, r.e.WithIndex(0), r.first} }

func (c *unitCache) shard(k unitKey) *unitShard {
	return &c.shards[(k.chunk<<22^uint64(k.e.Offset()))*0x9e3779b97f4a7c15>>(64-unitShardBits)]
}

// get copies the pieces of a record; false: its unit is not there.
func (c *unitCache) get(k unitKey, pieces []piece, first int) bool {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.keys {
		if s.keys[i] == k {
			copyPieces(s.units[i], pieces, first)
			return true
		}
	}
	return false
}

// put takes a unit in, and returns the memory of the one that goes for it.
func (c *unitCache) put(k unitKey, unit []byte) (spare []byte) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.next
	s.next = (i + 1) % unitsPerShard
	spare = s.units[i]
	s.keys[i], s.units[i] = k, unit
	return spare
}
