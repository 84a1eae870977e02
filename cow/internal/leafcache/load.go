package leafcache

import (
	"errors"
	"unsafe"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
)

// loading is one load of a leaf. Others that want the leaf wait for it. A second loader could put back a leaf that was
// changed, written and evicted since that loader read it.
type loading struct {
	done chan struct{}
	err  error
}

// loaded is a leaf on its way from the table to the cache.
type loaded struct {
	openLeaf
	packed [headerWords + format.MaxPacked]uint64
}

// Ensure loads a leaf into the cache if it is not there. The leaf may be evicted again at once, so callers look it up
// under a lock, and call Ensure again if it is gone.
func (c *Cache) Ensure(k Key) error {
	for {
		s := c.shard(k.Branch.ID, k.Index)
		s.mu.RLock()
		lf, _ := s.find(k)
		s.mu.RUnlock()
		if lf != nil {
			return nil
		}
		if mine, err := c.fetch(k, nil); mine || err != nil {
			return err
		}
	}
}

// View runs fn on a leaf, either under the shard's read lock or before any other goroutine can see the leaf. fn must
// not call the cache, nor keep the leaf.
func (c *Cache) View(k Key, fn func(*Leaf)) error {
	s := c.shard(k.Branch.ID, k.Index)
	s.lookups.Add(1)
	for {
		s.mu.RLock()
		if lf, _ := s.find(k); lf != nil {
			lf.touch()
			fn(lf)
			s.mu.RUnlock()
			return nil
		}
		s.mu.RUnlock()
		// A reader needs no room in the cache: fetch has run fn by now.
		if mine, err := c.fetch(k, fn); mine && errors.Is(err, ErrFull) {
			return nil
		} else if mine || err != nil {
			return err
		}
	}
}

// fetch loads a leaf that was not in the cache, runs fn on it, and then adds it to the cache. If another goroutine is
// already loading the leaf, fetch waits for it instead, does not run fn, and returns false for mine. If the cache has
// no room for the leaf, it returns ErrFull, after fn has run.
func (c *Cache) fetch(k Key, fn func(*Leaf)) (mine bool, err error) {
	s := c.shard(k.Branch.ID, k.Index)
	s.mu.Lock()
	if s.buckets == nil {
		s.mu.Unlock()
		return true, fault.ErrClosed
	}
	if lf, _ := s.find(k); lf != nil {
		s.mu.Unlock()
		return false, nil
	}
	if l := s.loading[k]; l != nil {
		s.mu.Unlock()
		<-l.done
		return false, l.err
	}
	l := &loading{done: make(chan struct{})}
	s.loading[k] = l
	s.loads++
	s.mu.Unlock()

	ld := c.scratch.Get().(*loaded)
	defer c.scratch.Put(ld)
	ld.branch, ld.index, ld.asOf, ld.gen = k.Branch.ID, k.Index, k.AsOf, 0
	ld.state.Store(uint32(openWords) | stateOpen)
	ld.epoch, l.err = c.load(k, &ld.content.Leaf)
	var words []uint64
	if l.err == nil {
		if fn != nil {
			fn(&ld.Leaf)
		}
		words = format.AppendPacked(ld.packed[:headerWords], &ld.content.Leaf)
	}
	s.mu.Lock()
	delete(s.loading, k)
	err = l.err
	if err == nil && !s.insert(ld, words) {
		err = ErrFull
	}
	s.mu.Unlock()
	close(l.done)
	return true, err
}

// insert adds a loaded leaf to the cache, packed if that is smaller. It returns false if there is no room. The shard is
// locked.
func (s *shard) insert(ld *loaded, packed []uint64) bool {
	if s.buckets == nil {
		return false
	}
	words, state := packed, uint32(len(packed))
	if len(packed) >= openWords {
		words = unsafe.Slice((*uint64)(unsafe.Pointer(&ld.openLeaf)), openWords)
		state = uint32(openWords) | stateOpen
	}
	h := s.alloc(uint32(len(words)))
	if h == 0 {
		return false
	}
	copy(s.mem[h-1:], words)
	lf := s.at(h)
	lf.branch, lf.index, lf.asOf, lf.epoch = ld.branch, ld.index, ld.asOf, ld.epoch
	s.put(h, state|stateUsed)
	return true
}

// Lookups returns how often a read or a write needed a leaf, and how often a leaf had to be loaded from the table,
// since the cache was made.
func (c *Cache) Lookups() (all, loads uint64) {
	for i := range c.shards {
		s := &c.shards[i]
		all += s.lookups.Load()
		s.mu.RLock()
		loads += s.loads
		s.mu.RUnlock()
	}
	return all, loads
}
