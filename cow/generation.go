package cow

import (
	"cmp"
	"errors"
	"slices"
	"sync"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// changes is what has changed since the last checkpoint began, beside the leaves, whose changes the cache lists, and
// the rows of the catalog. Store.mu guards it.
type changes struct {
	gen      uint64                        // generation of what changes now
	taken    *sync.Cond                    // signalled when gen has risen or a checkpoint has failed
	rows     []*chunk                      // chunks whose account differs from their row in the table
	regions  []*region                     // regions of forwards
	dropping map[metadata.Version]struct{} // given up by the reaper, but still in the table
	catalog  bool                          // something has changed in the catalog
	counts   []*headCount                  // begin with the next generation
}

// generation is what one checkpoint makes durable: the state as of one place in the log.
type generation struct {
	gen        uint64
	at         format.Checkpoint
	appended   uint64
	leaves     leafcache.Generation
	encoded    []encodedLeaf
	volumes    []format.Volume
	snapshots  []format.Snapshot
	branches   []format.Branch
	chunks     []format.Chunk
	dropped    struct{ volumes, snapshots, branches []uint32 }
	dropLeaves []metadata.Version
	regions    []frozenRegion
	forwarded  []format.Forwarded
	cold       *format.ColdMark
	back       []uint32 // slots from which no block is moved any more
	dead       []*chunk // the commit removes their rows, and then their files are removed
	rowsOf     []*chunk
}

type encodedLeaf struct {
	metadata.Version
	gen   uint64
	value []byte
	puts  []byte // what metadata.Tx.PutChanged wants; nil: it is not known
}

// values is the memory for a checkpoint's encoded leaves. Each checkpoint reuses it.
type values struct {
	blocks [][]byte
	used   int // number of blocks that are full, or nearly
}

const valuesBlock = 1 << 20

func (v *values) encode(c *leafcache.Content) (value, puts []byte) {
	if v.used == len(v.blocks) {
		v.blocks = append(v.blocks, make([]byte, 0, valuesBlock))
	}
	b := v.blocks[v.used]
	from := len(b)
	b = format.AppendLeaf(b, &c.Leaf)
	value = b[from:len(b):len(b)]
	if blocks, ok := c.Puts(); ok {
		from = len(b)
		b = format.AppendPuts(b, &c.Leaf, blocks)
		puts = b[from:len(b):len(b)]
	}
	v.blocks[v.used] = b
	if cap(b)-len(b) < format.MaxLeafSize+format.MaxPutsSize {
		v.used++
	}
	return value, puts
}

// reset frees the memory for reuse.
func (v *values) reset() {
	for i := range v.blocks {
		v.blocks[i] = v.blocks[i][:0]
	}
	v.used = 0
}

func (g *generation) takeTables(t *catalog) {
	for n := range t.dirtyVolumes {
		if v := t.volumes[n]; v != nil {
			g.volumes = append(g.volumes, v.Volume)
		} else {
			g.dropped.volumes = append(g.dropped.volumes, n)
		}
	}
	for n := range t.dirtySnapshots {
		if sn := t.snapshots[n]; sn != nil {
			g.snapshots = append(g.snapshots, sn.Snapshot)
		} else {
			g.dropped.snapshots = append(g.dropped.snapshots, n)
		}
	}
	for n := range t.dirtyBranches {
		if b := t.branches[n]; b != nil {
			g.branches = append(g.branches, b.Branch)
		} else {
			g.dropped.branches = append(g.dropped.branches, n)
		}
	}
	clear(t.dirtyVolumes)
	clear(t.dirtySnapshots)
	clear(t.dirtyBranches)
}

// compareVersions compares by the order of the table's keys, since bbolt inserts fastest in ascending order.
func compareVersions(a, b metadata.Version) int {
	for _, d := range [3]int64{int64(a.Branch) - int64(b.Branch), int64(a.Leaf) - int64(b.Leaf), int64(b.Epoch) - int64(a.Epoch)} {
		if d != 0 {
			return int(d>>62) | 1
		}
	}
	return 0
}

// sort sorts rows in the order of the table's keys. In any other order, the time that bbolt takes to insert very many
// rows grows with the square of their number.
func (g *generation) sort() {
	slices.SortFunc(g.dropLeaves, compareVersions)
	slices.SortFunc(g.volumes, func(a, b format.Volume) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(g.snapshots, func(a, b format.Snapshot) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(g.branches, func(a, b format.Branch) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(g.chunks, func(a, b format.Chunk) int { return cmp.Compare(a.Slot, b.Slot) })
}

// write writes the generation in a transaction. Dropped leaves go first: none of them is written in the same
// generation.
func (g *generation) write(tx *metadata.Tx) error {
	g.sort()
	for _, v := range g.dropLeaves {
		if err := tx.DropLeaf(v); err != nil {
			return err
		}
	}
	for _, e := range g.encoded {
		if err := tx.PutChanged(e.Version, e.value, e.puts); err != nil {
			return err
		}
	}
	return errors.Join(
		each(g.volumes, tx.PutVolume), each(g.snapshots, tx.PutSnapshot), each(g.branches, tx.PutBranch),
		each(g.chunks, tx.PutChunk),
		eachID(g.dropped.volumes, tx.DropVolume), eachID(g.dropped.snapshots, tx.DropSnapshot), eachID(g.dropped.branches, tx.DropBranch),
		each(g.dead, func(c **chunk) error { return tx.DropChunk((*c).Slot) }),
		each(g.forwarded, tx.PutForwarded), eachID(g.back, tx.DropForwarded), g.writeRegions(tx),
		g.writeCold(tx), tx.PutCheckpoint(&g.at))
}

func (g *generation) writeCold(tx *metadata.Tx) error {
	if g.cold == nil {
		return nil
	}
	return tx.PutCold(g.cold)
}

func each[T any](rows []T, put func(*T) error) error {
	for i := range rows {
		if err := put(&rows[i]); err != nil {
			return err
		}
	}
	return nil
}

func eachID(ids []uint32, drop func(uint32) error) error {
	return each(ids, func(n *uint32) error { return drop(*n) })
}

func idsOf[T any](rows []T, id func(T) uint32) (ids []uint32) {
	for _, r := range rows {
		ids = append(ids, id(r))
	}
	return ids
}
