package cow

import (
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// generation is what one checkpoint makes durable: the state as of one place in the log.
type generation struct {
	gen        uint64
	at         format.Checkpoint
	appended   uint64
	leaves     []*leaf
	encoded    []encodedLeaf
	arena      []byte
	volumes    []format.Volume
	snapshots  []format.Snapshot
	branches   []format.Branch
	chunks     []format.Chunk
	dropped    struct{ volumes, snapshots, branches []uint32 }
	dropLeaves []metadata.Version
	regions    []frozenRegion
	forwarded  []format.Forwarded
	back       []uint32 // slots of which no block is elsewhere any more
	dead       []*chunk // rows to be removed, and after the commit the files
	rowsOf     []*chunk
}

type encodedLeaf struct {
	metadata.Version
	from, to int // in arena
}

// Checkpoint makes the table durable as of now, so that a restart replays nothing that was
// written before.
func (s *Store) Checkpoint() error {
	s.mu.Lock()
	err := s.usable()
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.checkpoint()
}

// checkpoint is DESIGN.md, section 8.
func (s *Store) checkpoint() error {
	s.ckptMu.Lock()
	defer s.ckptMu.Unlock()
	return s.checkpointLocked()
}

func (s *Store) checkpointLocked() error {
	g := s.freeze()
	// Data before metadata: what the leaves point to is durable before they are.
	if err := s.wal.sync(); err != nil {
		return s.thaw(g, fmt.Errorf("checkpoint: %w", err))
	}
	s.encode(g)
	s.opts.OnCommit(false)
	if err := s.meta.Update(g.write); err != nil {
		err = fmt.Errorf("checkpoint: commit the table: %w", noSpace(err))
		if !errors.Is(err, ErrNoSpace) && !errors.Is(err, syscall.EFBIG) {
			// A sync failed, perhaps that of the meta page: another commit could overwrite
			// pages that the one on the disk refers to.
			err = s.wal.fail(err)
		}
		return s.thaw(g, err)
	}
	s.opts.OnCommit(true)
	s.settle(g)
	return s.removeDead(g.dead)
}

// freeze notes the log's end and takes everything that changed up to it, under the lock: what writers do from
// here on belongs to the next generation. The reaper's batch is part of this one.
func (s *Store) freeze() *generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &generation{gen: s.gen}
	s.reap()
	chunkSeq, off := s.wal.position()
	g.at = format.Checkpoint{Seq: s.wal.nextSeq, ChunkSeq: chunkSeq, Offset: off, NextID: s.tables.nextID, NextChunkSeq: s.wal.nextChunk}
	g.appended = s.wal.appended
	g.leaves, s.dirty = s.dirty, nil
	for v := range s.dropping {
		g.dropLeaves = append(g.dropLeaves, v)
	}
	g.takeTables(&s.tables)
	for _, c := range s.wal.sealed {
		s.markRow(c) // it may be dead already, and nothing changes in it any more
	}
	s.wal.sealed = nil
	s.takeChunks(g)
	g.regions = s.freezeRegions()
	s.admin = false
	s.gen++
	s.behind.Store(false)
	return g
}

func (g *generation) takeTables(t *tables) {
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

// takeChunks takes the accounting of the chunks that changed. A full chunk that lies before the
// replay position and has no live byte is dead: its row goes now, its file after the commit.
func (s *Store) takeChunks(g *generation) {
	for _, c := range s.dirtyRows {
		c.rowDirty = false
		if s.slots.get(c.slot) != c {
			continue // removed meanwhile
		}
		switch {
		case c.moved > 0:
			c.hasMoved = true
			g.forwarded = append(g.forwarded, format.Forwarded{Slot: c.slot, Seq: c.seq, Blocks: c.moved})
		case c.hasMoved:
			c.hasMoved = false
			g.back = append(g.back, c.slot)
		}
		if c.dead || c.gone && c.moved > 0 {
			g.rowsOf = append(g.rowsOf, c)
			continue
		}
		if c.live == 0 && c.sealed && c.seq < g.at.ChunkSeq {
			c.dead = true
			g.dead = append(g.dead, c)
			continue
		}
		g.chunks = append(g.chunks, c.row())
		g.rowsOf = append(g.rowsOf, c)
	}
	s.dirtyRows = nil
}

// encode makes the values of the generation's leaves. A leaf that a writer has met since is not
// as it was; the writer left an image of it.
func (s *Store) encode(g *generation) {
	add := func(v metadata.Version, l *format.Leaf) {
		from := len(g.arena)
		g.arena = format.AppendLeaf(g.arena, l)
		g.encoded = append(g.encoded, encodedLeaf{v, from, len(g.arena)})
	}
	var live []encodedLeaf
	for _, lf := range g.leaves {
		sh := s.cache.shard(lf.key)
		sh.mu.RLock()
		if lf.gen == g.gen {
			add(metadata.Version{Branch: lf.key.b.ID, Leaf: lf.key.index, Epoch: lf.epoch}, &lf.Leaf)
		}
		sh.mu.RUnlock()
	}
	live, g.encoded = g.encoded, nil
	// Every leaf has been encoded or has its image by now. After a commit that
	// failed there may be an image and a younger leaf of one version: the leaf comes last.
	for _, m := range s.pending.upTo(g.gen) {
		add(m.Version, &m.Leaf)
	}
	g.encoded = append(g.encoded, live...)
	slices.SortStableFunc(g.encoded, func(a, b encodedLeaf) int { return compareVersions(a.Version, b.Version) })
}

// compareVersions is the order of the table's keys: ascending inserts are bbolt's cheapest.
func compareVersions(a, b metadata.Version) int {
	for _, d := range [3]int64{int64(a.Branch) - int64(b.Branch), int64(a.Leaf) - int64(b.Leaf), int64(b.Epoch) - int64(a.Epoch)} {
		if d != 0 {
			return int(d>>62) | 1
		}
	}
	return 0
}

// write is the transaction. Dropped leaves go first: none of them is written in the same generation.
func (g *generation) write(tx *metadata.Tx) error {
	for _, v := range g.dropLeaves {
		if err := tx.DropLeaf(v); err != nil {
			return err
		}
	}
	for _, e := range g.encoded {
		if err := tx.PutLeaf(e.Version, g.arena[e.from:e.to:e.to]); err != nil {
			return err
		}
	}
	return errors.Join(
		each(g.volumes, tx.PutVolume), each(g.snapshots, tx.PutSnapshot), each(g.branches, tx.PutBranch),
		each(g.chunks, tx.PutChunk),
		eachID(g.dropped.volumes, tx.DropVolume), eachID(g.dropped.snapshots, tx.DropSnapshot), eachID(g.dropped.branches, tx.DropBranch),
		each(g.dead, func(c **chunk) error { return tx.DropChunk((*c).slot) }),
		each(g.forwarded, tx.PutForwarded), eachID(g.back, tx.DropForwarded), g.writeRegions(tx),
		tx.PutCheckpoint(&g.at))
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

// settle forgets what is in the table now. Images go before leaves become clean,
// and with that evictable: a reader that misses one finds the other.
func (s *Store) settle(g *generation) {
	s.pending.drop(func(m *image) bool { return m.gen <= g.gen })
	for _, lf := range g.leaves {
		sh := s.cache.shard(lf.key)
		s.mu.Lock()
		sh.mu.Lock()
		if lf.gen == g.gen {
			lf.gen = 0
		}
		sh.mu.Unlock()
		s.mu.Unlock()
	}
	s.settleRegions(g)
	s.mu.Lock()
	for _, v := range g.dropLeaves {
		delete(s.dropping, v)
	}
	s.cleanable, s.helpless = g.at.ChunkSeq, false
	s.mu.Unlock()
	s.committed.Store(g.gen)
	s.ckptAt.Store(g.appended)
}

// thaw puts a generation that was not committed back, to be part of the next.
func (s *Store) thaw(g *generation, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, lf := range g.leaves {
		sh := s.cache.shard(lf.key)
		sh.mu.Lock()
		if lf.gen == g.gen {
			s.markDirty(lf)
		}
		sh.mu.Unlock()
	}
	mark := func(set map[uint32]struct{}, ids []uint32) {
		for _, n := range ids {
			set[n] = struct{}{}
		}
	}
	t := &s.tables
	mark(t.dirtyVolumes, append(idsOf(g.volumes, func(v format.Volume) uint32 { return v.ID }), g.dropped.volumes...))
	mark(t.dirtySnapshots, append(idsOf(g.snapshots, func(v format.Snapshot) uint32 { return v.ID }), g.dropped.snapshots...))
	mark(t.dirtyBranches, append(idsOf(g.branches, func(v format.Branch) uint32 { return v.ID }), g.dropped.branches...))
	for _, c := range g.dead {
		c.dead = false
		s.markRow(c)
	}
	for _, c := range g.rowsOf {
		s.markRow(c)
	}
	for _, slot := range g.back { // in rowsOf or dead, too
		s.slots.get(slot).hasMoved = true
	}
	s.thawRegions(g)
	s.admin = true
	return err
}

func idsOf[T any](rows []T, id func(T) uint32) (ids []uint32) {
	for _, r := range rows {
		ids = append(ids, id(r))
	}
	return ids
}

// removeDead removes the files of chunks whose rows are gone, unless somebody
// who reads an older state of the table still needs them; then a later checkpoint does. ckptMu is held.
func (s *Store) removeDead(dead []*chunk) error {
	s.zombies = append(s.zombies, dead...)
	if s.pins > 0 {
		return nil
	}
	var errs []error
	kept := s.zombies[:0]
	for _, c := range s.zombies {
		if err := s.removeFile(c); err != nil {
			errs = append(errs, fmt.Errorf("remove chunk %s: %w", c.name(), err))
			kept = append(kept, c) // its slot stays taken
			continue
		}
		s.mu.Lock()
		if c.hasMoved {
			stub := s.goneChunk(c.slot, c.seq, c.moved)
			s.slots.put(stub)
			s.markRow(stub) // moved blocks may have died since
		} else {
			s.slots.remove(c.slot)
		}
		s.mu.Unlock()
		c.release()
	}
	s.zombies = kept
	return errors.Join(errs...)
}

func (s *Store) removeFile(c *chunk) error {
	if c.gone {
		return nil
	}
	return s.fs.Remove(c.name())
}

// goneChunk stands for a chunk whose file has been removed, while blocks that were moved from it live.
func (s *Store) goneChunk(slot uint32, seq uint64, moved uint32) *chunk {
	c := newChunk(slot, seq, s.fs)
	c.gone, c.sealed, c.moved, c.hasMoved = true, true, moved, true
	return c
}
