package cow

import (
	"errors"
	"unsafe"

	"github.com/vdisk/vdisk/format"
)

// loading is one load that others wait for: a second loader could otherwise
// put back a leaf that was changed, written and evicted since it read it.
type loading struct {
	done chan struct{}
	err  error
}

// loaded is a leaf that is on its way from the table to the cache.
type loaded struct {
	openLeaf
	packed [headerWords + format.MaxPacked]uint64
}

// ensure loads a leaf if it is not there. It may be evicted again at once; callers look it up under a
// lock and come back if it was.
func (c *leafCache) ensure(k leafKey) error {
	for {
		s := c.shard(k.b.ID, k.index)
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

// view runs fn on a leaf under the shard's read lock, or while nobody else can have it.
func (c *leafCache) view(k leafKey, fn func(*leaf)) error {
	s := c.shard(k.b.ID, k.index)
	for {
		s.mu.RLock()
		if lf, _ := s.find(k); lf != nil {
			lf.touch()
			fn(lf)
			s.mu.RUnlock()
			return nil
		}
		s.mu.RUnlock()
		// A reader does not need the room that there may not be.
		if mine, err := c.fetch(k, fn); mine && errors.Is(err, errFull) {
			return nil
		} else if mine || err != nil {
			return err
		}
	}
}

// fetch loads a leaf that was not there, runs fn on it, and then lets others see it. If somebody else was
// about it already it waits for him, and mine is false.
func (c *leafCache) fetch(k leafKey, fn func(*leaf)) (mine bool, err error) {
	s := c.shard(k.b.ID, k.index)
	s.mu.Lock()
	if s.buckets == nil {
		s.mu.Unlock()
		return true, ErrClosed
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
	s.mu.Unlock()

	ld := c.scratch.Get().(*loaded)
	defer c.scratch.Put(ld)
	ld.branch, ld.index, ld.asOf, ld.epoch, ld.gen = k.b.ID, k.index, k.asOf, 0, 0
	ld.state.Store(uint32(openWords) | stateOpen)
	l.err = c.load(k, &ld.openLeaf)
	var words []uint64
	if l.err == nil {
		if fn != nil {
			fn(&ld.leaf)
		}
		words = format.AppendPacked(ld.packed[:headerWords], &ld.Leaf)
	}
	s.mu.Lock()
	delete(s.loading, k)
	err = l.err
	if err == nil && !s.insert(ld, words) {
		err = errFull
	}
	s.mu.Unlock()
	close(l.done)
	return true, err
}

// insert puts a leaf in that was loaded: packed, if that is smaller. It returns false if there is no room.
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
