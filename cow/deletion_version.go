package cow

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// reapVersion gives up one version v. What changed in it and again in its successor w is
// dead; what did not change in w becomes w's. Without a successor, v stays as the version of
// the next point, or becomes the present epoch's of a head that is written to (which otherwise
// would take v for a kept point's), or dies whole where nothing follows.
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

// exact reads the version v, which is in the table and perhaps, changed since, in memory.
func (s *Store) exact(v metadata.Version, l *format.Leaf) error {
	b := s.catalog.branches[v.Branch]
	if s.inMemory(b, v, l) {
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

func (s *Store) inMemory(b *branch, v metadata.Version, l *format.Leaf) bool {
	sh := s.cache.shard(v.Branch, v.Leaf)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	// Of a head that was reaped somebody may have brought a leaf in again, too late; it is not kept up.
	if lf, _ := sh.find(leafKey{b, v.Leaf, head}); lf != nil && lf.epoch == v.Epoch && !b.reaped {
		lf.copyTo(l)
		return true
	}
	m := sh.image(v.Branch, v.Leaf, v.Epoch, v.Epoch)
	if m != nil {
		*l = m.Leaf
	}
	return m != nil
}

// successor runs fn on the version of v's leaf in (j.to, j.next], wherever it is, and has it
// written with this generation. moved is false if there is none and v has to stay.
func (s *Store) successor(j deletion, v metadata.Version, fn func(*format.Leaf)) (moved bool, err error) {
	if !j.b.reaped {
		// The cached leaf is the truth of a head: brought in first, it cannot be
		// loaded by somebody else from what the table has now.
		k := leafKey{j.b, v.Leaf, head}
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

// reopen makes a cached head leaf one that this generation writes, in the epoch that it has.
func (s *Store) reopen(k leafKey, sh *shard) (*openLeaf, error) {
	if sh.open(k) == nil {
		return nil, errFull
	}
	lf, h := sh.find(k)
	s.markDirty(k, sh, h)
	return lf.open(), nil
}

// successorImage is successor for a version that is not a head's present one. The shard is locked.
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
	j.b.unwritten.Add(1)
	fn(&m.Leaf)
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
