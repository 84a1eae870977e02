package cow

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// defaultReapBatch bounds the leaves that one checkpoint's batch looks at, since it
// runs under Store.mu.
const defaultReapBatch = 128

// A job is a half-open interval of epochs of a branch, (from, to], whose last state nobody
// can name any more. next is the end of the interval after it, whose state takes over what it
// still needs; 0: there is none.
type job struct {
	b        *branch
	from, to uint32
	next     uint32
	snap     *snapshot // the point's row; nil: the head of a branch without a volume
}

// reapable says whether there is a job. mu is held.
func (s *Store) reapable() bool {
	_, ok := s.nextJob()
	return ok
}

// nextJob finds a job whose versions are all in the table: a checkpoint has
// been committed since the name went. mu is held, and ckptMu or nobody checkpoints.
func (s *Store) nextJob() (job, bool) {
	committed, needed := s.committed.Load(), s.tables.origins()
	for _, sn := range s.tables.snapshots {
		if sn.branch.stuck || sn.branch.reaping && !sn.branch.reaped {
			continue // the cache still has what is gone: it would be taken for a successor
		}
		if sn.Volume == 0 && sn.dropped <= committed && !needed[point{sn.branch, sn.Epoch}] {
			j := job{b: sn.branch, to: sn.Epoch, snap: sn}
			j.from, j.next = s.tables.neighbours(sn.branch, sn.Epoch)
			return j, true
		}
	}
	for _, b := range s.tables.branches {
		if b.volume == nil && b.headless <= committed && !b.reaped && !b.stuck {
			j := job{b: b, to: b.Epoch}
			j.from, _ = s.tables.neighbours(b, b.Epoch)
			return j, true
		}
	}
	return job{}, false
}

// neighbours are the points of a branch before and after an epoch: 0 if there is none before;
// after the last point the head, if it is not reaped, else 0.
func (t *tables) neighbours(b *branch, epoch uint32) (before, after uint32) {
	if !b.reaped && b.Epoch > epoch {
		after = b.Epoch
	}
	for _, sn := range t.snapshots {
		if sn.branch != b {
			continue
		}
		if sn.Epoch < epoch {
			before = max(before, sn.Epoch)
		}
		if sn.Epoch > epoch && (after == 0 || sn.Epoch < after) {
			after = sn.Epoch
		}
	}
	return before, after
}

// reap does one batch of work as part of the generation that is being frozen. mu and ckptMu are held: memory is what the
// table will be, so that what is decided here holds there too.
func (s *Store) reap() {
	for left := s.opts.ReapBatch; left > 0; {
		j, ok := s.nextJob()
		if !ok {
			return
		}
		j.b.reaping = j.b.reaping || j.snap == nil
		done, n, err := s.reapSome(j, left)
		if err != nil {
			// What a damaged version holds cannot be given back; everything else goes on.
			s.log.Error("space of deleted data stays in use; run check", "branch", j.b.ID, "err", err)
			j.b.stuck = true
			continue
		}
		left -= n + 1
		if done {
			s.finishJob(j)
		}
	}
	poke(s.ckptWork) // there is more
}

// reapSome looks at up to limit leaves of a job, going on where the last batch stopped.
func (s *Store) reapSome(j job, limit int) (done bool, n int, err error) {
	cursor, ok := s.reapCursor[j.b.ID]
	if !ok || cursor.to != j.to {
		cursor = reapCursor{to: j.to, next: metadata.Version{Branch: j.b.ID, Epoch: j.from + 1}}
	}
	var found []metadata.Version
	done = true
	err = s.meta.View(func(tx *metadata.Tx) error {
		return tx.Changes(cursor.next, j.to, func(v metadata.Version) bool {
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
		if err := s.reapVersion(j, v); err != nil {
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

type reapCursor struct {
	to   uint32
	next metadata.Version
}

// reapVersion gives up one version v. What changed in it and again in its successor w is
// dead; what did not change in w becomes w's. Without a successor, v stays as the version of
// the next point, or becomes the present epoch's of a head that is written to (which otherwise
// would take v for a kept point's), or dies whole where nothing follows.
func (s *Store) reapVersion(j job, v metadata.Version) error {
	var old format.Leaf
	if err := s.exact(v, &old); err != nil {
		return err
	}
	if j.next == 0 {
		for i, e := range old.Entries {
			if old.IsChanged(i) {
				s.account(e, -1)
			}
		}
		s.dropVersion(j.b, v)
		return nil
	}
	moved, err := s.successor(j, v, func(w *format.Leaf) {
		for i, e := range old.Entries {
			switch {
			case !old.IsChanged(i):
			case w.IsChanged(i):
				s.account(e, -1)
			default:
				w.SetChanged(i)
			}
		}
	})
	if err == nil && moved {
		s.dropVersion(j.b, v)
	}
	return err
}

// exact reads the version v, which is in the table and perhaps, changed since, in memory.
func (s *Store) exact(v metadata.Version, l *format.Leaf) error {
	b := s.tables.branches[v.Branch]
	if epoch := s.cache.peek(leafKey{b, v.Leaf, head}, head, l); epoch == v.Epoch {
		return nil
	}
	if s.pending.newest(v.Branch, v.Leaf, v.Epoch, v.Epoch, func(m *image) { *l = m.Leaf }) != 0 {
		return nil
	}
	return s.meta.View(func(tx *metadata.Tx) error {
		epoch, err := tx.Leaf(v, l)
		if err == nil && epoch != v.Epoch {
			return corruptf("branch %d leaf %d: epoch %d is listed as changed but has no version", v.Branch, v.Leaf, v.Epoch)
		}
		return err
	})
}

// successor runs fn on the version of v's leaf in (j.to, j.next], wherever it is, and has it
// written with this generation. moved is false if there is none and v has to stay.
func (s *Store) successor(j job, v metadata.Version, fn func(*format.Leaf)) (moved bool, err error) {
	if !j.b.reaped {
		// The cached leaf is the truth of a head: brought in first, it cannot be
		// loaded by somebody else from what the table has now.
		lf, sh, err := s.headLeaf(leafKey{j.b, v.Leaf, head})
		if err != nil {
			return false, err
		}
		defer sh.mu.Unlock()
		switch {
		case lf.epoch > j.to && lf.epoch <= j.next:
			fn(&lf.Leaf)
			s.markDirty(lf)
			return true, nil
		case lf.epoch == v.Epoch && j.next == j.b.Epoch && j.b.volume != nil:
			lf.epoch = j.b.Epoch
			s.markDirty(lf)
			return true, nil
		}
	}
	if s.pending.newest(v.Branch, v.Leaf, j.to+1, j.next, func(m *image) { fn(&m.Leaf) }) != 0 {
		return true, nil
	}
	m := &image{gen: s.gen}
	if m.Version, err = s.inTable(metadata.Version{Branch: v.Branch, Leaf: v.Leaf, Epoch: j.next}, j.to, &m.Leaf); err != nil || m.Epoch == 0 {
		return false, err
	}
	fn(&m.Leaf)
	s.pending.push(m)
	return true, nil
}

// headLeaf returns a cached head leaf, its shard locked.
func (s *Store) headLeaf(k leafKey) (*leaf, *shard, error) {
	for {
		if err := s.cache.ensure(k); err != nil {
			return nil, nil, err
		}
		if lf, sh := s.cache.lock(k); lf != nil {
			return lf, sh, nil
		}
	}
}

// inTable reads the newest version of v's leaf with an epoch in (after, v.Epoch] that
// is not being dropped. Its epoch is 0 if there is none.
func (s *Store) inTable(v metadata.Version, after uint32, l *format.Leaf) (metadata.Version, error) {
	err := s.meta.View(func(tx *metadata.Tx) error {
		for {
			epoch, err := tx.Leaf(v, l)
			if err != nil {
				return err
			}
			if epoch <= after {
				v.Epoch = 0
				return nil
			}
			v.Epoch = epoch
			if _, gone := s.dropping[v]; !gone {
				return nil
			}
			v.Epoch--
		}
	})
	return v, err
}

// dropVersion removes a version from memory now, and from the table with this generation.
func (s *Store) dropVersion(b *branch, v metadata.Version) {
	s.dropping[v] = struct{}{}
	s.pending.dropVersion(v)
	if lf, sh := s.cache.lock(leafKey{b, v.Leaf, head}); lf != nil {
		if lf.epoch == v.Epoch {
			lf.gen = 0 // of a head that nobody has: not to be written again
		}
		sh.mu.Unlock()
	}
}

// finishJob removes the row that the job was about.
func (s *Store) finishJob(j job) {
	s.admin = true
	if j.snap != nil {
		delete(s.tables.snapshots, j.snap.ID)
		s.tables.dirtySnapshots[j.snap.ID] = struct{}{}
	} else {
		j.b.reaped = true
		s.cache.forget(func(k leafKey) bool { return k.b == j.b && k.asOf == head })
	}
	if j.b.reaped && !s.tables.hasPoints(j.b) {
		delete(s.tables.branches, j.b.ID)
		s.tables.dirtyBranches[j.b.ID] = struct{}{}
		s.cache.forget(func(k leafKey) bool { return k.b == j.b })
	}
}

func (t *tables) hasPoints(b *branch) bool {
	for _, sn := range t.snapshots {
		if sn.branch == b {
			return true
		}
	}
	return false
}
