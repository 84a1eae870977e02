package cow

import (
	"errors"
	"math"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

const (
	// defaultReapBatch bounds the leaves that one batch looks at, since it runs under Store.mu.
	defaultReapBatch = 32
	// defaultReapTime is for how long a checkpoint goes on with batches: what it costs beside is shared by more of
	// them, and what was deleted is the cheapest room that there is.
	defaultReapTime = 50 * time.Millisecond
)

// A deletion is a half-open interval of epochs of a branch, (from, to], whose last state nobody
// can name any more. next is the end of the interval after it, whose state takes over what it
// still needs; 0: there is none.
type deletion struct {
	b        *branch
	from, to uint32
	next     uint32
	snap     *snapshot // the point's row; nil: the head of a branch without a volume
}

// reapable reports whether there is a deletion to make. mu is held.
func (s *Store) reapable() bool {
	_, ok := s.nextDeletion()
	return ok
}

// awaitsReaper reports whether there is a deletion to make, or will be one with the next checkpoint. mu is held.
func (s *Store) awaitsReaper() bool {
	_, ok := s.nextDeletionAsOf(math.MaxUint64)
	return ok
}

// nextDeletion finds a deletion whose versions are all in the table: a checkpoint has been committed since the name went. One
// that was begun comes first: what it has looked at would be looked at again, and with many leaves there would be no
// end to it. mu is held, and ckptMu or nobody checkpoints.
func (s *Store) nextDeletion() (deletion, bool) { return s.nextDeletionAsOf(s.committed.Load()) }

// nextDeletionAsOf is nextDeletion if the generation committed has been committed.
func (s *Store) nextDeletionAsOf(committed uint64) (deletion, bool) {
	for id, cursor := range s.reapCursor {
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

// isReapable reports whether nobody needs a point that has lost its name, and the table has what the reaper looks at. mu
// is held.
func (sn *snapshot) isReapable(committed uint64) bool {
	b := sn.branch
	if b.damaged || b.reaping && !b.reaped {
		return false // the cache still has what is gone: it would be taken for a successor
	}
	return sn.Volume == 0 && sn.dropped <= committed && b.forks[sn.Epoch] == 0
}

// isReapable reports whether the head of a branch was given up, and is not reaped. mu is held.
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

// neighbours are the points of a branch before and after an epoch: 0 if there is none before;
// after the last point the head, if it is not reaped, else 0.
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

// prepareReaping brings in what the next batch looks at: mu is not held, which in the batch would keep everybody
// waiting for the disk. What goes wrong here the batch meets again. ckptMu is held.
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
			_ = s.cache.ensure(leafKey{j.b, index, head})
		}
		_ = s.meta.View(func(tx *metadata.Tx) error {
			_, err := tx.Leaf(metadata.Version{Branch: j.b.ID, Leaf: index, Epoch: j.to}, &l)
			return err
		})
	}
}

// cursorOf is how far the reaper has come with a deletion, which is begun if it was not. mu is held.
func (s *Store) cursorOf(j deletion) (cursor reapCursor, err error) {
	cursor, ok := s.reapCursor[j.b.ID]
	if !ok || cursor.to != j.to {
		if cursor, err = s.beginDeletion(j); err == nil {
			s.reapCursor[j.b.ID] = cursor
		}
	}
	return cursor, err
}

// reapForCheckpoint does what one checkpoint does of the reaper's work, as part of the generation that is about to be
// frozen. Others may write between two batches: what they change is of the same generation. ckptMu is held.
func (s *Store) reapForCheckpoint() {
	start := time.Now()
	for more := true; more; {
		s.prepareReaping()
		s.mu.Lock()
		more = s.reap() && s.tableShort(0, forEvents) <= 0 && s.unwritten < s.dirtyLimit/2 && time.Since(start) < s.opts.reapTime
		s.mu.Unlock()
	}
}

// reap does one batch of work, and reports whether this checkpoint can do another. mu and ckptMu are held: memory is
// what the table will be, so that what is decided here holds there too.
func (s *Store) reap() (more bool) {
	if s.lastAborted {
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
			poke(s.ckptWork) // this checkpoint makes room
			return false
		}
		if err != nil {
			// What a damaged version holds cannot be given back; everything else goes on.
			s.log.Error("space of deleted data stays in use; run check", "branch", j.b.ID, "err", err)
			j.b.damaged = true
			continue
		}
		left -= n + 1
		if done {
			s.finishDeletion(j)
		}
	}
	poke(s.ckptWork)
	return true
}

// deleteBatch looks at up to limit leaves of a deletion, going on where the last batch stopped.
func (s *Store) deleteBatch(j deletion, limit int) (done bool, n int, err error) {
	cursor, err := s.cursorOf(j)
	if err != nil {
		return false, 0, err
	}
	var found []metadata.Version
	done = true
	err = s.meta.View(func(tx *metadata.Tx) error {
		return tx.Changes(cursor.next, cursor.last, func(v metadata.Version) bool {
			if _, gone := s.dropping[v]; gone {
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
			s.reapCursor[j.b.ID] = cursor
		}
		if err != nil {
			return false, 0, err
		}
	}
	if done {
		delete(s.reapCursor, j.b.ID)
	} else {
		s.reapCursor[j.b.ID] = cursor
	}
	return done, len(found), nil
}

// reapCursor is how far the reaper has come with a deletion: with the versions that it gives up, or with their
// successors.
type reapCursor struct {
	to   uint32           // the deletion's
	next metadata.Version // to look at
	last uint32           // epoch to look at
}

// reapCount bounds the versions that are counted to find out of which there are fewer.
const reapCount = 16 << 10

// beginDeletion begins with what a point has, or with what changed after it until the next point, if that is less: a
// version without a successor stays as it is, unless it becomes a head's. So the oldest snapshot goes without a look
// at all that was written before it.
func (s *Store) beginDeletion(j deletion) (c reapCursor, err error) {
	c = reapCursor{to: j.to, next: metadata.Version{Branch: j.b.ID, Epoch: j.from + 1}, last: j.to}
	i, isPoint := j.b.search(j.next)
	if !isPoint || j.b.points[i].made > s.committed.Load() { // else the table has all the successors there are
		return c, nil
	}
	after := reapCursor{to: j.to, next: metadata.Version{Branch: j.b.ID, Epoch: j.to + 1}, last: j.next}
	err = s.meta.View(func(tx *metadata.Tx) error {
		count := func(c reapCursor, most int) (n int, err error) {
			err = tx.Changes(c.next, c.last, func(metadata.Version) bool { n++; return n < most })
			return n, err
		}
		for most := 256; ; most *= 4 { // it takes as long as there are of the fewer
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

// reapLeaf gives up the version that a deletion is to give up of a leaf: v, or the one whose successor v is.
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
	s.dropping[v] = struct{}{}
	sh := s.cache.shard(v.Branch, v.Leaf)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	b.unwritten.Add(-sh.dropImages(v))
	if lf, h := sh.find(leafKey{b, v.Leaf, head}); lf != nil && lf.epoch == v.Epoch {
		sh.setGen(h, 0) // of a head that nobody has: not to be written again
	}
}

// finishDeletion removes the row that the deletion was about.
func (s *Store) finishDeletion(j deletion) {
	s.catalogDirty, s.pinnedStale = true, true
	if j.snap != nil {
		s.catalog.forget(j.snap)
	} else {
		j.b.reaped = true
		delete(s.catalog.orphaned, j.b)
		s.cache.forget(j.b, false)
	}
	if j.b.reaped && len(j.b.points) == 0 {
		s.catalog.forgetBranch(j.b)
		s.cache.forget(j.b, true)
	}
}
