package cow

import (
	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// reapVersion reclaims one version v. A block that changed in v, and again in v's successor w, is dead. A
// block that did not change in w becomes w's. If v has no successor, one of three things happens. v stays, as
// the version of the next point. Or, if the head that follows is being written to, v becomes the version of
// the head's present epoch; otherwise the head would take v for a kept point's version. Or, if nothing
// follows, all of v is dead.
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
	if s.inMemory(b, v, l) {
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

func (s *Store) inMemory(b *branch, v metadata.Version, l *format.Leaf) bool {
	sh := s.cache.shard(v.Branch, v.Leaf)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	// Another goroutine may have loaded a leaf of a reaped head, too late. Such a leaf is not kept up to
	// date.
	if lf, _ := sh.find(b.leaf(v.Leaf, head)); lf != nil && lf.epoch == v.Epoch && !b.reaped {
		lf.copyTo(l)
		return true
	}
	m := sh.image(v.Branch, v.Leaf, v.Epoch, v.Epoch)
	if m != nil {
		*l = m.Leaf
	}
	return m != nil
}

// successor runs fn on the version of v's leaf in (j.to, j.next], wherever it is, and makes this generation
// write it. If there is no successor, v may become the head's version of the present epoch, which is written
// too. moved is false if neither happened, so that v has to stay.
func (s *Store) successor(j deletion, v metadata.Version, fn func(*format.Leaf)) (moved bool, err error) {
	if !j.b.reaped {
		// For a head, the cached leaf counts, not the table. It is loaded first, so that no other goroutine
		// can load it from the table's present state.
		k := j.b.leaf(v.Leaf, head)
		lf, sh, err := s.headLeaf(k)
		if err != nil {
			return false, err
		}
		defer sh.mu.Unlock()
		switch {
		case lf.epoch > j.to && lf.epoch <= j.next:
			o, err := s.reopen(k, sh)
			if err == nil {
				fn(&o.Leaf)
			}
			return err == nil, err
		case lf.epoch == v.Epoch && j.next == j.b.Epoch && j.b.volume != nil:
			o, err := s.reopen(k, sh)
			if err == nil {
				o.epoch = j.b.Epoch
			}
			return err == nil, err
		}
		return s.successorImage(j, v, sh, fn)
	}
	sh := s.cache.shard(v.Branch, v.Leaf)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return s.successorImage(j, v, sh, fn)
}

// reopen makes a cached head leaf one that this generation writes, in the epoch that it has. The caller holds
// mu and the shard's lock.
func (s *Store) reopen(k leafKey, sh *shard) (*openLeaf, error) {
	if sh.open(k) == nil {
		return nil, errFull
	}
	lf, h := sh.find(k)
	s.markDirty(k, sh, h)
	return lf.open(), nil
}

// successorImage is successor for a version that is not a head's present one. The caller holds mu and the
// shard's lock.
func (s *Store) successorImage(j deletion, v metadata.Version, sh *shard, fn func(*format.Leaf)) (moved bool, err error) {
	if m := sh.image(v.Branch, v.Leaf, j.to+1, j.next); m != nil {
		fn(&m.Leaf)
		return true, nil
	}
	var l format.Leaf
	w, err := s.inTable(metadata.Version{Branch: v.Branch, Leaf: v.Leaf, Epoch: j.next}, j.to, &l)
	if err != nil || w.Epoch == 0 {
		return false, err
	}
	m := sh.addImage(w, s.gen, &l)
	if m == nil {
		return false, errFull
	}
	s.unwritten++
	j.b.leaves.unwritten.Add(1)
	fn(&m.Leaf)
	return true, nil
}

// headLeaf returns a cached head leaf, with its shard locked.
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

// inTable reads the newest version of v's leaf with an epoch in (after, v.Epoch] that is not being dropped.
// The returned version has epoch 0 if there is none.
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
