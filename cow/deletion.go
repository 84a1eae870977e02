package cow

import (
	"errors"
	"math"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

const (
	// defaultReapBatch bounds the leaves that one batch looks at, since it runs under Store.mu.
	defaultReapBatch = 32
	// defaultReapTime bounds the time for which a checkpoint starts further batches. More batches share the fixed cost
	// of a checkpoint, and reclaiming deleted data is the cheapest way to get room.
	defaultReapTime = 50 * time.Millisecond
)

// A deletion reclaims a half-open interval of epochs of a branch, (from, to], whose last state has no name any more.
// next is the end of the following interval, whose state takes over the blocks that it still needs. If next is 0, there
// is no following interval.
type deletion struct {
	b        *branch
	from, to uint32
	next     uint32
	snap     *snapshot // the point's row; nil: the deletion is of the head of a branch without a volume
}

// reapable reports whether there is a deletion to work on. The caller holds mu.
func (s *Store) reapable() bool {
	_, ok := s.nextDeletion()
	return ok
}

// awaitsReaper reports whether there is a deletion to work on, or will be one after the next checkpoint. The caller
// holds mu.
func (s *Store) awaitsReaper() bool {
	_, ok := s.nextDeletionAsOf(math.MaxUint64)
	return ok
}

// nextDeletion returns a deletion whose versions are all in the table, because a checkpoint has committed since the
// name went. A deletion that was begun comes first. Otherwise the reaper would look at its leaves again, and with many
// leaves it would never end. The caller holds mu, and either holds checkpoints.mu or knows that no checkpoint runs.
func (s *Store) nextDeletion() (deletion, bool) {
	return s.nextDeletionAsOf(s.checkpoints.committed.Load())
}

// nextDeletionAsOf is nextDeletion, as if committed were the last generation committed.
func (s *Store) nextDeletionAsOf(committed uint64) (deletion, bool) {
	for id, cursor := range s.checkpoints.reapCursor {
		b := s.catalog.branches[id]
		if b == nil {
			continue
		}
		if i, found := b.search(cursor.to); found && b.points[i].isReapable(committed) {
			return b.points[i].deletion(), true
		} else if !found && b.isReapable(committed) {
			return b.deletion(), true
		}
	}
	for sn := range s.catalog.waiting {
		if sn.isReapable(committed) {
			return sn.deletion(), true
		}
	}
	for b := range s.catalog.orphaned {
		if b.isReapable(committed) {
			return b.deletion(), true
		}
	}
	return deletion{}, false
}

// isReapable reports whether the point is unnamed and no longer needed, and the table has all that the reaper looks at.
// The caller holds mu.
func (sn *snapshot) isReapable(committed uint64) bool {
	b := sn.branch
	if b.damaged || b.reaping && !b.reaped {
		return false // the cache still has the head's versions, and one would be taken for a successor
	}
	return sn.Volume == 0 && sn.dropped <= committed && len(b.forks[sn.Epoch]) == 0
}

// isReapable reports whether the branch's head was given up and is not reaped yet. The caller holds mu.
func (b *branch) isReapable(committed uint64) bool {
	return b.volume == nil && !b.reaped && b.orphaned <= committed && !b.damaged
}

func (b *branch) deletion() deletion {
	j := deletion{b: b, to: b.Epoch}
	j.from, _ = b.neighbours(b.Epoch)
	return j
}

func (sn *snapshot) deletion() deletion {
	j := deletion{b: sn.branch, to: sn.Epoch, snap: sn}
	j.from, j.next = sn.branch.neighbours(sn.Epoch)
	return j
}

// neighbours returns the epochs of the branch's points before and after an epoch. before is 0 if there is none. After
// the last point, after is the head's epoch, or 0 if the head is reaped.
func (b *branch) neighbours(epoch uint32) (before, after uint32) {
	i, found := b.search(epoch)
	if i > 0 {
		before = b.points[i-1].Epoch
	}
	if found {
		i++
	}
	switch {
	case i < len(b.points):
		after = b.points[i].Epoch
	case !b.reaped && b.Epoch > epoch:
		after = b.Epoch
	}
	return before, after
}

// prepareReaping loads the leaves and versions that the next batch looks at. It loads them without mu; the batch, which
// holds mu, would make everybody wait for the disk. It ignores errors, since the batch meets them again. The caller
// holds checkpoints.mu.
func (s *Store) prepareReaping() {
	s.mu.Lock()
	j, ok := s.nextDeletion()
	var cursor reapCursor
	var err error
	if ok {
		cursor, err = s.cursorOf(j)
	}
	reaped := ok && j.b.reaped
	s.mu.Unlock()
	if !ok || err != nil {
		return
	}
	var leaves []uint32
	_ = s.meta.View(func(tx *metadata.Tx) error {
		return tx.Changes(cursor.next, cursor.last, func(v metadata.Version) bool {
			leaves = append(leaves, v.Leaf)
			return len(leaves) < s.opts.reapBatch
		})
	})
	var l format.Leaf
	for _, index := range leaves {
		if j.next != 0 && !reaped {
			_ = s.cache.Ensure(j.b.leaf(index, head))
		}
		_ = s.meta.View(func(tx *metadata.Tx) error {
			_, err := tx.Leaf(metadata.Version{Branch: j.b.ID, Leaf: index, Epoch: j.to}, &l)
			return err
		})
	}
}

// cursorOf returns how far the reaper has come with a deletion. It begins the deletion if that has not been done. The
// caller holds mu.
func (s *Store) cursorOf(j deletion) (cursor reapCursor, err error) {
	cursor, ok := s.checkpoints.reapCursor[j.b.ID]
	if !ok || cursor.to != j.to {
		if cursor, err = s.beginDeletion(j); err == nil {
			s.checkpoints.reapCursor[j.b.ID] = cursor
		}
	}
	return cursor, err
}

// reapForCheckpoint does the reaper's work of one checkpoint, as part of the generation that the checkpoint then takes.
// Others may write between two batches; their changes are part of the same generation. The caller holds checkpoints.mu.
func (s *Store) reapForCheckpoint() {
	start := time.Now()
	for more := true; more; {
		s.prepareReaping()
		s.mu.Lock()
		more = s.reap() && s.tableShort(0, wal.ForEvents) <= 0 && s.cache.Unwritten() < s.dirtyLimit/2 && time.Since(start) < s.opts.reapTime
		s.mu.Unlock()
	}
}

// reap does one batch of work, and reports whether this checkpoint can do another. The caller holds mu and
// checkpoints.mu. So the table will be what memory is now, and decisions by the state in memory hold for the table too.
func (s *Store) reap() (more bool) {
	if s.checkpoints.lastAborted {
		return false // there was no room for the last batch
	}
	for left := s.opts.reapBatch; left > 0; {
		j, ok := s.nextDeletion()
		if !ok {
			return false
		}
		j.b.reaping = j.b.reaping || j.snap == nil
		done, n, err := s.deleteBatch(j, left)
		if errors.Is(err, errFull) {
			wal.Poke(s.checkpoints.work) // this checkpoint makes room
			return false
		}
		if err != nil {
			// The space of a damaged branch cannot be reclaimed; the reaper goes on with other branches.
			s.log.Error("space of deleted data stays in use; run check", "branch", j.b.ID, "err", err)
			j.b.damaged = true
			continue
		}
		left -= n + 1
		if done {
			s.finishDeletion(j)
		}
	}
	wal.Poke(s.checkpoints.work)
	return true
}

// deleteBatch works on up to limit leaves of a deletion, from where the last batch stopped. It reports whether the
// deletion is done, and how many leaves it worked on. The caller holds mu and checkpoints.mu.
func (s *Store) deleteBatch(j deletion, limit int) (done bool, n int, err error) {
	cursor, err := s.cursorOf(j)
	if err != nil {
		return false, 0, err
	}
	var found []metadata.Version
	done = true
	err = s.meta.View(func(tx *metadata.Tx) error {
		return tx.Changes(cursor.next, cursor.last, func(v metadata.Version) bool {
			if _, gone := s.changes.dropping[v]; gone {
				return true
			}
			if len(found) == limit {
				cursor.next, done = v, false
				return false
			}
			found = append(found, v)
			return true
		})
	})
	if err != nil {
		return false, 0, err
	}
	for _, v := range found {
		err := s.reapLeaf(j, v)
		if errors.Is(err, errFull) {
			cursor.next = v
			s.checkpoints.reapCursor[j.b.ID] = cursor
		}
		if err != nil {
			return false, 0, err
		}
	}
	if done {
		delete(s.checkpoints.reapCursor, j.b.ID)
	} else {
		s.checkpoints.reapCursor[j.b.ID] = cursor
	}
	return done, len(found), nil
}

// reapCursor is how far the reaper has come with a deletion. It goes over either the versions that are deleted or their
// successors.
type reapCursor struct {
	to   uint32           // the deletion's to
	next metadata.Version // the next version to look at
	last uint32           // the last epoch to look at
}

// reapCount bounds how many versions are counted to find the smaller of two sets.
const reapCount = 16 << 10

// beginDeletion returns a cursor that goes over the versions of the point, or, if they are fewer, over the versions
// that changed after it up to the next point. The latter is enough, because a version without a successor stays as it
// is, unless it becomes a head's. So deleting the oldest snapshot need not look at everything that was written before
// it.
func (s *Store) beginDeletion(j deletion) (c reapCursor, err error) {
	c = reapCursor{to: j.to, next: metadata.Version{Branch: j.b.ID, Epoch: j.from + 1}, last: j.to}
	i, isPoint := j.b.search(j.next)
	if !isPoint || j.b.points[i].made > s.checkpoints.committed.Load() { // otherwise the table has all successors
		return c, nil
	}
	after := reapCursor{to: j.to, next: metadata.Version{Branch: j.b.ID, Epoch: j.to + 1}, last: j.next}
	err = s.meta.View(func(tx *metadata.Tx) error {
		count := func(c reapCursor, most int) (n int, err error) {
			err = tx.Changes(c.next, c.last, func(metadata.Version) bool { n++; return n < most })
			return n, err
		}
		for most := 256; ; most *= 4 { // takes time in proportion to the smaller set
			has, err := count(c, most)
			if err != nil {
				return err
			}
			changed, err := count(after, most)
			if err != nil || has < changed {
				return err
			}
			if changed < most || most >= reapCount {
				c = after
				return nil
			}
		}
	})
	return c, err
}

// reapLeaf reclaims one leaf's version in a deletion. v is that version, or its successor.
func (s *Store) reapLeaf(j deletion, v metadata.Version) error {
	if v.Epoch > j.to {
		var old format.Leaf
		var err error
		v.Epoch = j.to
		if v, err = s.inTable(v, j.from, &old); err != nil || v.Epoch == 0 {
			return err
		}
	}
	return s.reapVersion(j, v)
}

// dropVersion removes a version from memory now, and from the table with this generation.
func (s *Store) dropVersion(b *branch, v metadata.Version) {
	s.changes.dropping[v] = struct{}{}
	s.cache.DropVersion(&b.leaves, v.Leaf, v.Epoch)
}

// finishDeletion removes the row of the point or head that the deletion was about.
func (s *Store) finishDeletion(j deletion) {
	s.changes.catalog, s.cleaner.pinnedStale = true, true
	if j.snap != nil {
		s.catalog.forget(j.snap)
	} else {
		j.b.reaped = true
		delete(s.catalog.orphaned, j.b)
		s.cache.Forget(&j.b.leaves, false)
	}
	if j.b.reaped && len(j.b.points) == 0 {
		s.catalog.forgetBranch(j.b)
		s.cache.Forget(&j.b.leaves, true)
	}
}
