package cow

import (
	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// reapVersion reclaims one version v. A block that changed in v, and again in v's successor w, is dead. A block that
// did not change in w becomes w's. If v has no successor, one of three things happens. v stays, as the version of the
// next point. Or, if the head that follows is being written to, v becomes the version of the head's present epoch;
// otherwise the head would take v for a kept point's version. Or, if nothing follows, all of v is dead.
func (s *Store) reapVersion(j deletion, v metadata.Version) error {
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

// exact reads the version v. The table has it, and memory may have a later state of it.
func (s *Store) exact(v metadata.Version, l *format.Leaf) error {
	b := s.catalog.branches[v.Branch]
	// Another goroutine may have loaded a leaf of a reaped head, too late. Such a leaf is not kept up to date.
	if s.cache.Version(&b.leaves, v.Leaf, v.Epoch, v.Epoch, !b.reaped, l) != 0 {
		return nil
	}
	return s.meta.View(func(tx *metadata.Tx) error {
		epoch, err := tx.Leaf(v, l)
		if err == nil && epoch != v.Epoch {
			return fault.Corruptf("branch %d leaf %d: epoch %d is listed as changed but has no version", v.Branch, v.Leaf, v.Epoch)
		}
		return err
	})
}

// successor runs fn on the version of v's leaf in (j.to, j.next], wherever it is, and makes this generation write it.
// If there is no successor, v may become the head's version of the present epoch, which is written too. moved is false
// if neither happened, so that v has to stay.
func (s *Store) successor(j deletion, v metadata.Version, fn func(*format.Leaf)) (moved bool, err error) {
	k := j.b.leaf(v.Leaf, head)
	if j.b.reaped {
		l := s.cache.Lock(k)
		defer l.Unlock()
		return s.successorBeforeHead(j, v, &l, fn)
	}
	// For a head, the cached leaf counts, not the table. It is loaded first, so that no other goroutine can load it
	// from the table's present state.
	l, err := s.cache.LockLoaded(k)
	if err != nil {
		return false, err
	}
	defer l.Unlock()
	switch epoch := l.Leaf().Epoch(); {
	case epoch > j.to && epoch <= j.next:
		w, err := l.Reopen(epoch)
		if err != nil {
			return false, err
		}
		count := j.b.count
		if j.next != j.b.Epoch {
			count = nil // the version is a point's
		}
		was := count.held(w, 0, format.LeafBlocks)
		fn(w)
		count.change(was, count.held(w, 0, format.LeafBlocks))
		return true, nil
	case epoch == v.Epoch && j.next == j.b.Epoch && j.b.volume != nil:
		w, err := l.Reopen(j.b.Epoch)
		if err != nil {
			return false, err
		}
		j.b.count.change(holding{}, holding{exclusive: j.b.count.held(w, 0, format.LeafBlocks).exclusive})
		return true, nil
	}
	return s.successorBeforeHead(j, v, &l, fn)
}

// successorBeforeHead is successor for a version that is not a head's present one. The caller holds mu.
func (s *Store) successorBeforeHead(j deletion, v metadata.Version, l *leafcache.Locked, fn func(*format.Leaf)) (moved bool, err error) {
	if w := l.Preimage(j.to+1, j.next); w != nil {
		fn(w)
		return true, nil
	}
	var content format.Leaf
	found, err := s.inTable(metadata.Version{Branch: v.Branch, Leaf: v.Leaf, Epoch: j.next}, j.to, &content)
	if err != nil || found.Epoch == 0 {
		return false, err
	}
	w, err := l.AddPreimage(found.Epoch, &content)
	if err != nil {
		return false, err
	}
	fn(w)
	return true, nil
}

// inTable reads the newest version of v's leaf with an epoch in (after, v.Epoch] that is not being dropped. The
// returned version has epoch 0 if there is none.
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
			if _, gone := s.changes.dropping[v]; !gone {
				return nil
			}
			v.Epoch--
		}
	})
	return v, err
}
