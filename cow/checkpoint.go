package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// errFull is matched by errors that say that a checkpoint has to come first: the cache, or the table, is full.
var errFull = leafcache.ErrFull

// checkpoints is the state of the checkpoints. mu lets one run at a time; it is taken before Store.mu.
type checkpoints struct {
	mu     lockorder.Mutex[lockorder.Checkpoints]
	values values // of the running checkpoint
	// lastAborted: the last checkpoint has failed, so memory may hold changes by the reaper that are in neither the
	// table nor the log.
	lastAborted bool
	// untrimmed are chunks of the replayed log that have more allocated than they hold. The excess is given back once
	// they are behind the replay position.
	untrimmed      []*chunk
	pendingRemoval []*chunk              // dead chunks that are not removed yet
	reapCursor     map[uint32]reapCursor // by branch; changes need Store.mu, too

	// Guarded by Store.mu.
	writing        int    // dirty leaves and pre-images of the generation that the running checkpoint writes
	writingRegions int    // regions of forwards in that generation
	pendingFree    int64  // bytes of the chunks that the running checkpoint removes
	failures       uint64 // number of checkpoints that failed
	failure        error  // error of the last one that failed

	timing wal.Timing   // of those that committed
	last   atomic.Int64 // when the last one did, in Unix nanoseconds; 0: none has

	committed atomic.Uint64 // generation of the last committed checkpoint
	at        atomic.Uint64 // bytes that were appended to the log when it began
	work      chan struct{} // a value means that a checkpoint is due
}

// Checkpoint makes the table durable as of now, so that a restart replays nothing that was written before.
func (s *Store) Checkpoint() error {
	if err := s.beginTask(); err != nil {
		return err
	}
	defer s.tasks.Done()
	if err := s.live(); err != nil {
		return err
	}
	return s.checkpoint()
}

// checkpoint makes a checkpoint, in the steps of docs/engine.md, Checkpoint.
func (s *Store) checkpoint() error {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	return s.checkpointLocked()
}

func (s *Store) checkpointLocked() error {
	start := time.Now()
	s.reapForCheckpoint()
	g := s.beginGeneration()
	// Data before metadata: the records that leaves refer to become durable before the leaves do.
	if err := s.wal.Sync(); err != nil {
		return s.abortGeneration(g, fmt.Errorf("checkpoint: %w", err))
	}
	s.keepUnproven(g)
	s.encode(g)
	if err := s.commit(g); err != nil {
		return s.abortGeneration(g, err)
	}
	s.checkpoints.timing.Since(start)
	s.checkpoints.last.Store(time.Now().UnixNano())
	err := s.opts.onCommit(true)
	s.finishGeneration(g)
	s.trimEnds()
	err = errors.Join(err, s.removeDead(g.dead))
	s.mu.Lock()
	if s.checkpoints.pendingFree > 0 {
		s.wal.RoomMade() // writers that wait for room need not wait for the cleaner too
	}
	s.checkpoints.pendingFree = 0
	s.mu.Unlock()
	return err
}

// commit writes a generation to the table. If there was no room for it, it can be tried again. Any other failure is
// final, whatever its errno: a sync may have failed, perhaps that of the meta page, and then another commit could
// overwrite pages that the table on the disk refers to.
func (s *Store) commit(g *generation) error {
	err := s.opts.onCommit(false)
	tried := err == nil
	if tried {
		// The pages that the commit takes were counted before, and there is room for them. If the file system does not
		// keep to that, the reserve helps.
		err = s.meta.Update(g.write)
		for errors.Is(err, metadata.ErrUnwritten) && s.reserve.Give(wal.ReserveStep) {
			err = s.meta.Update(g.write)
		}
	}
	if err == nil {
		return nil
	}
	full := errors.Is(err, metadata.ErrUnwritten) || !tried && errors.Is(err, ErrNoSpace)
	err = fmt.Errorf("checkpoint: commit the table: %w", fault.NoSpace(err))
	if !full {
		return s.wal.Fail(err)
	}
	_, perr := s.wal.Pool.Empty() // this frees room for the next attempt
	return errors.Join(err, perr)
}

// trimEnds gives back the space that is allocated behind the records of chunks in which the log ended without a Close.
// A committed checkpoint lets it do so: no replay begins in such a chunk any more, since the log went on in a new one
// when the store was opened. The caller holds checkpoints.mu.
func (s *Store) trimEnds() {
	for _, c := range s.checkpoints.untrimmed {
		s.mu.Lock()
		here := s.slots.get(c.Slot) == c && !c.dead
		s.mu.Unlock()
		if !here {
			continue
		}
		if err := c.Truncate(c.End); err != nil {
			s.log.Warn("the space behind a chunk's records stays allocated", "chunk", c.Name(), "err", err)
			continue
		}
		s.mu.Lock()
		c.Size = c.End
		s.slots.recount(c)
		s.mu.Unlock()
	}
	s.checkpoints.untrimmed = nil
}

// beginGeneration notes the log's end and takes everything that changed up to it, in one critical section of mu. What
// writers change from here on belongs to the next generation. The reaper's batches are part of this one.
func (s *Store) beginGeneration() *generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &generation{gen: s.changes.gen}
	chunkSeq, off := s.wal.Position()
	g.at = format.Checkpoint{Seq: s.wal.NextSeq(), ChunkSeq: chunkSeq, Offset: off, NextID: uint32(min(s.catalog.nextID, math.MaxUint32)), NextChunkSeq: s.wal.NextChunk()}
	g.appended = s.wal.Appended()
	g.leaves = s.cache.Begin()
	s.checkpoints.writing = g.leaves.Len()
	for v := range s.changes.dropping {
		g.dropLeaves = append(g.dropLeaves, v)
	}
	g.takeTables(&s.catalog)
	for _, c := range s.wal.TakeSealed() {
		s.markRow(s.slots.get(c.Slot)) // it may be dead already, and nothing marks it later
	}
	s.takeChunks(g)
	g.regions = s.beginRegions()
	s.checkpoints.writingRegions = len(g.regions)
	s.changes.catalog = false
	if s.cold.noted {
		mark := s.cold.mark
		g.cold, s.cold.noted = &mark, false
	}
	for _, c := range s.changes.counts {
		c.begin()
	}
	s.changes.counts = nil
	s.changes.gen++
	s.changes.taken.Broadcast()
	return g
}

// takeChunks takes the accounting of the chunks that have changed. A full chunk that lies before the replay position
// and has no live bytes is dead. Its row is removed in this commit, and its file after it, unless keepUnproven keeps
// them. The caller holds mu.
func (s *Store) takeChunks(g *generation) {
	for _, c := range s.changes.rows {
		c.rowDirty = false
		if s.slots.get(c.Slot) != c {
			continue // removed meanwhile
		}
		switch {
		case c.moved > 0:
			c.hasMoved = true
			g.forwarded = append(g.forwarded, format.Forwarded{Slot: c.Slot, Seq: c.Seq, Blocks: c.moved})
		case c.hasMoved:
			c.hasMoved = false
			g.back = append(g.back, c.Slot)
		}
		if c.dead || c.gone && c.moved > 0 {
			g.rowsOf = append(g.rowsOf, c)
			continue
		}
		c.kept = c.kept && c.moved > 0
		if c.live == 0 && c.Sealed && c.Seq < g.at.ChunkSeq && !c.kept {
			c.dead = true
			s.slots.recount(c)
			s.checkpoints.pendingFree += int64(c.Size)
			g.dead = append(g.dead, c)
			continue
		}
		g.chunks = append(g.chunks, c.row())
		g.rowsOf = append(g.rowsOf, c)
	}
	s.changes.rows = nil
}

// encode encodes the leaves of the generation.
func (s *Store) encode(g *generation) {
	s.checkpoints.values.reset()
	g.leaves.Each(func(v metadata.Version, gen uint64, c *leafcache.Content) {
		value, puts := s.checkpoints.values.encode(c)
		g.encoded = append(g.encoded, encodedLeaf{v, gen, value, puts})
	})
	// After a failed commit there may be several states of one version. The latest comes last.
	slices.SortFunc(g.encoded, func(a, b encodedLeaf) int {
		if c := compareVersions(a.Version, b.Version); c != 0 {
			return c
		}
		return cmp.Compare(a.gen, b.gen)
	})
}

// finishGeneration forgets what the table now has.
func (s *Store) finishGeneration(g *generation) {
	g.leaves.Finish()
	s.finishRegions(g)
	s.mu.Lock()
	for _, v := range g.dropLeaves {
		delete(s.changes.dropping, v)
	}
	s.checkpoints.writing, s.checkpoints.writingRegions = 0, 0
	s.slots.cleanable, s.cleaner.exhausted = g.at.ChunkSeq, false
	s.wal.Committed(g.at.Seq)
	for _, c := range g.rowsOf { // among others, the chunks that became full since the last checkpoint
		s.slots.recount(c)
	}
	s.mu.Unlock()
	s.checkpoints.lastAborted = false
	s.checkpoints.committed.Store(g.gen)
	s.checkpoints.at.Store(g.appended)
}

// abortGeneration makes a generation that was not committed part of the next one. It returns err.
func (s *Store) abortGeneration(g *generation, err error) error {
	s.checkpoints.lastAborted = true
	s.mu.Lock()
	defer s.mu.Unlock()
	g.leaves.Abort()
	s.checkpoints.writing, s.checkpoints.writingRegions, s.checkpoints.pendingFree = 0, 0, 0
	s.checkpoints.failures, s.checkpoints.failure = s.checkpoints.failures+1, err
	s.changes.taken.Broadcast()
	mark := func(set map[uint32]struct{}, ids []uint32) {
		for _, n := range ids {
			set[n] = struct{}{}
		}
	}
	t := &s.catalog
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
	for _, slot := range g.back { // their chunks are in rowsOf or dead too
		s.slots.get(slot).hasMoved = true
	}
	s.abortRegions(g)
	s.cold.noted = s.cold.noted || g.cold != nil
	s.changes.catalog = true
	return err
}

// removeDead removes the files of chunks whose rows are gone, or gives them to the pool. A later checkpoint tries again
// to remove those that could not be removed. The caller holds checkpoints.mu.
func (s *Store) removeDead(dead []*chunk) error {
	s.checkpoints.pendingRemoval = append(s.checkpoints.pendingRemoval, dead...)
	var errs []error
	kept, low := s.checkpoints.pendingRemoval[:0], s.lowDisk()
	for _, c := range s.checkpoints.pendingRemoval {
		if !low && s.mayReuse(c) && s.wal.Pool.Keep(c.Chunk, s.wal.ChunkBytes) {
			continue
		}
		if err := s.removeFile(c); err != nil {
			errs = append(errs, fmt.Errorf("remove chunk %s: %w", c.Name(), err))
			kept = append(kept, c) // its slot stays taken
			continue
		}
		s.mu.Lock()
		if !c.gone {
			s.slots.removed += int64(c.End)
		}
		if c.hasMoved {
			stub := s.goneChunk(c.Slot, c.Seq, c.moved)
			s.slots.put(stub)
			s.markRow(stub) // moved blocks may have died since
		} else {
			s.slots.remove(c.Slot)
		}
		s.mu.Unlock()
		c.Release()
	}
	s.checkpoints.pendingRemoval = kept
	return errors.Join(errs...)
}

// mayReuse reports whether the file of a dead chunk may become another chunk: no blocks were moved from it, and the
// cleaner has met no damage in it.
func (s *Store) mayReuse(c *chunk) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !c.gone && !c.hasMoved && !c.damaged
}

// removeFile removes the file of a dead chunk. Goroutines that have a reference to the chunk can still read it: if the
// file was never opened, removeFile opens it first. The caller holds checkpoints.mu.
func (s *Store) removeFile(c *chunk) error {
	if c.gone {
		return nil
	}
	// Until the chunk's place in the slot table is taken, others can still find it here, but only through blocks that
	// were moved.
	if c.hasMoved || c.InUse() {
		if _, err := c.Handle(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err := s.fs.Remove(c.Name())
	if errors.Is(err, fs.ErrNotExist) { // Open has reported it as missing
		return nil
	}
	return err
}

// goneChunk returns a chunk that stands for one whose file has been removed, while blocks that were moved from it are
// live.
func (s *Store) goneChunk(slot uint32, seq uint64, moved uint32) *chunk {
	c := newChunk(slot, seq, s.fs)
	c.gone, c.Sealed, c.moved, c.hasMoved = true, true, moved, true
	return c
}

// afterFailure is the pause after a failed checkpoint. Without it, writers would ask for the next one at once.
const afterFailure = time.Second

// checkpointRoutine makes checkpoints when one is due, until quit is closed.
func (s *Store) checkpointRoutine() {
	if s.opts.checkpointInterval < 0 {
		<-s.quit
		return
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last := time.Now()
	for {
		due := false
		select {
		case <-s.quit:
			return
		case <-s.checkpoints.work:
			due = true
		case <-tick.C:
			s.wal.CutIdle()
			s.fillReserve()
			if err := s.wal.Pool.EmptyIdle(); err != nil {
				s.log.Error("the file of a dead chunk stays", "err", err)
			}
			due = time.Since(last) >= s.opts.checkpointInterval && s.changed()
		}
		if !due {
			continue
		}
		if err := s.checkpoint(); err != nil {
			s.log.Error("checkpoint failed; the log keeps what it would have written", "err", err)
			select {
			case <-s.quit:
			case <-time.After(afterFailure):
			}
		}
		last = time.Now()
	}
}

// changed reports whether a checkpoint would write anything.
func (s *Store) changed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changedNow()
}

// changedNow is changed. The caller holds mu.
func (s *Store) changedNow() bool {
	return s.changes.catalog || s.cache.Unwritten() > 0 || len(s.changes.rows) > 0 || s.reapable()
}
