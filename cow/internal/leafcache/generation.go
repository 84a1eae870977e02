package leafcache

import "github.com/vdisk/vdisk/metadata"

// Generation is what one checkpoint has to write of the cache: the leaves and pre-images that became dirty before it
// began, and those that an aborted checkpoint left. Only one generation is written at a time. It ends with Finish or
// Abort.
type Generation struct {
	c      *Cache
	gen    uint64
	leaves []Key
	count  int
}

// Begin ends the present generation, and returns it to be written. What becomes dirty from here on belongs to the next
// one. The caller holds the store's lock.
func (c *Cache) Begin() Generation {
	g := Generation{c: c, gen: c.gen, leaves: c.dirty, count: c.unwritten}
	c.gen++
	c.dirty, c.unwritten = nil, 0
	return g
}

// Unwritten returns how many leaves and pre-images the present generation has. The caller holds the store's lock.
func (c *Cache) Unwritten() int { return c.unwritten }

// Len returns how many leaves and pre-images the generation has.
func (g *Generation) Len() int { return g.count }

// Each calls fn for the versions to write, each with its shard locked. fn must not call the cache. If a writer has
// changed a leaf since the generation began, it left a pre-image of it, which is written instead. After an aborted
// checkpoint there may be several states of one version. The one with the highest gen is the latest.
func (g *Generation) Each(fn func(v metadata.Version, gen uint64, c *Content)) {
	write := func(o *openLeaf) {
		fn(metadata.Version{Branch: o.branch, Leaf: o.index, Epoch: o.epoch}, o.gen, &o.content)
	}
	for _, k := range g.leaves {
		s := g.c.shard(k.Branch.ID, k.Index)
		s.mu.RLock()
		if lf, _ := s.find(k); lf != nil && lf.dirtyGen() == g.gen {
			write(lf.open())
		}
		s.mu.RUnlock()
	}
	// By now every leaf has been written or has a pre-image.
	for i := range g.c.shards {
		s := &g.c.shards[i]
		s.mu.Lock()
		s.eachPreimage(func(_ *Branch, _ handle, o *openLeaf) {
			if o.gen <= g.gen {
				write(o)
			}
		})
		s.mu.Unlock()
	}
}

// Finish is called when the table has the generation. It removes pre-images before it makes leaves clean, and so
// evictable: a reader that misses the pre-image finds the leaf. It gives back the memory that a replay took beyond the
// cache's limit.
func (g *Generation) Finish() {
	for i := range g.c.shards {
		g.c.shards[i].dropWritten(g.gen)
	}
	for _, k := range g.leaves {
		s := g.c.shard(k.Branch.ID, k.Index)
		s.mu.Lock()
		if lf, h := s.find(k); lf != nil && lf.dirtyGen() == g.gen {
			s.setGen(h, 0)
			s.pack(h)
		}
		s.mu.Unlock()
		k.Branch.unwritten.Add(-1)
	}
	g.c.shrink()
}

// Abort makes a generation that could not be written part of the present one. The caller holds the store's lock.
func (g *Generation) Abort() {
	for _, k := range g.leaves {
		l := g.c.Lock(k)
		if l.lf != nil && l.lf.dirtyGen() == g.gen {
			l.markDirty()
			g.c.unwritten-- // g.count has it too
		}
		l.Unlock()
		k.Branch.unwritten.Add(-1)
	}
	g.c.unwritten += g.count
}
