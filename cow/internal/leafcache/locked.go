package leafcache

import "github.com/vdisk/vdisk/format"

// Locked is a leaf with all that the cache has of it: the leaf itself and its pre-images. Its shard is locked, so
// nobody else sees or changes any of it until Unlock. Until then the caller must not call a method of the Cache, but
// for Unwritten, which needs no shard.
//
// What a method returns is memory of the shard. It may have moved after the next call of MakeWritable, Reopen or
// AddPreimage, even if that returned an error.
//
// A Locked has four words, so that Lock returns it in registers. With a word more, the compiler would copy it through
// memory, and a change of a leaf that is in memory would take half as long again (BenchmarkMap).
type Locked struct {
	s  *shard
	k  Key
	lf *Leaf // nil: the leaf is not in memory
}

// Lock locks a leaf, whether it is in memory or not. The caller must call Unlock.
func (c *Cache) Lock(k Key) Locked {
	s := c.shard(k.Branch.ID, k.Index)
	s.lookups.Add(1)
	s.mu.Lock()
	lf, _ := s.find(k)
	if lf != nil {
		lf.touch()
	}
	return Locked{s, k, lf}
}

// LockLoaded locks a leaf, and sees to it that the leaf is in memory: it loads it if need be. After an error nothing is
// locked.
func (c *Cache) LockLoaded(k Key) (Locked, error) {
	for {
		if err := c.Ensure(k); err != nil {
			return Locked{}, err
		}
		l := c.Lock(k)
		if l.lf != nil {
			return l, nil
		}
		l.Unlock()
	}
}

// Unlock unlocks the leaf's shard.
func (l *Locked) Unlock() { l.s.mu.Unlock() }

// Leaf returns the leaf, or nil if it is not in memory.
func (l *Locked) Leaf() *Leaf { return l.lf }

// IsWritable reports whether MakeWritable has nothing to do. The caller holds the store's lock.
func (l *Locked) IsWritable(epoch uint32) bool {
	return l.lf.dirtyGen() == l.s.c.gen && l.lf.epoch == epoch
}

// MakeWritable makes a head leaf that is in memory ready to be changed in epoch, the branch's present one, and in the
// present generation, and returns its content. The caller notes there what it changes. If the leaf's state in an
// earlier epoch or generation is still to be written, a pre-image stays behind. If there is no room, MakeWritable fails
// with ErrFull, and nothing has changed. The caller holds the store's lock.
func (l *Locked) MakeWritable(epoch uint32) (*Content, error) {
	o := l.lf.open()
	switch {
	case o != nil && o.gen == l.s.c.gen && o.epoch == epoch:
		return &o.content, nil
	case o != nil && o.gen != 0:
		again := o.gen == l.s.c.gen // otherwise the pre-image is written in place of the leaf
		left := l.s.pushPreimage(l.k)
		if l.lf, _ = l.s.find(l.k); !left {
			return nil, ErrFull
		}
		if again {
			l.s.c.unwritten++
		}
		o = l.lf.open()
	default:
		if o = l.open(); o == nil {
			return nil, ErrFull
		}
	}
	if o.gen != l.s.c.gen {
		o.content.forgetPuts() // the table has this state, or gets it first
	}
	if o.epoch != epoch {
		o.epoch, o.content.Changed, o.content.other = epoch, [4]uint64{}, true
	}
	l.markDirty()
	return &o.content, nil
}

// Reopen makes a head leaf that is in memory one that the present generation writes, as its branch's version of epoch,
// and returns its content. Unlike MakeWritable, it leaves no pre-image, and keeps the changed bits. If there is no
// room, it fails with ErrFull. The caller holds the store's lock, and no generation is being written.
func (l *Locked) Reopen(epoch uint32) (*format.Leaf, error) {
	o := l.open()
	if o == nil {
		return nil, ErrFull
	}
	o.epoch, o.content.other = epoch, true
	l.markDirty()
	return &o.content.Leaf, nil
}

// open makes the leaf an open one. It returns nil if there is no room.
func (l *Locked) open() *openLeaf {
	o := l.s.open(l.k)
	l.lf, _ = l.s.find(l.k)
	return o
}

// markDirty makes the present generation write the leaf, which is open.
func (l *Locked) markDirty() {
	if c := l.s.c; l.lf.dirtyGen() != c.gen {
		l.s.setGen(l.s.handle(l.lf), c.gen)
		c.dirty = append(c.dirty, l.k)
		c.unwritten++
		l.k.Branch.unwritten.Add(1)
	}
}

// Preimage returns the newest version of the leaf with an epoch in [from, to] that is in memory as a pre-image, or nil
// if there is none. The caller may change it, if it holds the store's lock and no generation is being written.
func (l *Locked) Preimage(from, to uint32) *format.Leaf {
	if o := l.s.preimage(l.k.Branch.ID, l.k.Index, from, to); o != nil {
		o.content.other = true // the caller may change it
		return &o.content.Leaf
	}
	return nil
}

// AddPreimage makes the present generation write content as the leaf's version of epoch. It returns the content in the
// cache, which the caller may change like that of Preimage. If there is no room, it fails with ErrFull. The caller
// holds the store's lock.
func (l *Locked) AddPreimage(epoch uint32, content *format.Leaf) (*format.Leaf, error) {
	o := l.s.addPreimage(l.k, epoch, l.s.c.gen, content)
	l.lf, _ = l.s.find(l.k)
	if o == nil {
		return nil, ErrFull
	}
	l.s.c.unwritten++
	return &o.content.Leaf, nil
}
