package crashfs

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// Choice says which of the operations that are not durable survive a power loss. The operations are counted in the
// order in which they were made, over all files and the directory: writes, truncations (reserving a new file's space
// counts as one), creations and removals.
type Choice struct {
	// Prefix is the number of operations that survive, counted from the first.
	Prefix int
	// Seed, if not 0, makes each operation after the prefix survive or be lost at random. If it is 0, all of them are
	// lost.
	Seed uint64
	// Torn makes each write that survives because of Seed lose sectors at random.
	Torn bool
}

// String returns the choice as a Go expression, for the message of a test.
func (c Choice) String() string {
	return fmt.Sprintf("crashfs.Choice{Prefix: %d, Seed: %#x, Torn: %t}", c.Prefix, c.Seed, c.Torn)
}

// Everything is the Choice that loses nothing.
var Everything = Choice{Prefix: int(^uint(0) >> 1)}

// pendingOp is an operation that is not durable: one of a file if node is set, and otherwise one of the directory.
type pendingOp struct {
	seq  uint64
	node *inode
	op   *op
	dir  *dirOp
}

// pending returns the operations that are not durable, in order. The caller holds the lock.
func (f *FS) pending() []pendingOp {
	nodes := map[*inode]bool{}
	for _, n := range f.durable {
		nodes[n] = true
	}
	var ops []pendingOp
	for i := range f.dirOps {
		d := &f.dirOps[i]
		ops = append(ops, pendingOp{seq: d.seq, dir: d})
		if d.node != nil {
			nodes[d.node] = true
		}
	}
	for n := range nodes {
		for i := range n.pending {
			ops = append(ops, pendingOp{seq: n.pending[i].seq, node: n, op: &n.pending[i]})
		}
	}
	slices.SortFunc(ops, func(a, b pendingOp) int { return cmp.Compare(a.seq, b.seq) })
	return ops
}

// Unsynced returns the number of operations that are not durable.
func (f *FS) Unsynced() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.pending())
}

// Choices returns choices for a power loss now: every prefix, k random subsets, and k subsets with torn writes. The
// same seed gives the same choices.
func (f *FS) Choices(seed uint64, k int) []Choice {
	n := f.Unsynced()
	var cs []Choice
	for i := range n + 1 {
		cs = append(cs, Choice{Prefix: i})
	}
	if n == 0 {
		return cs
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range 2 * k {
		prefix := 0 // for half of them anything may be lost, for the others only what follows a random prefix
		if i%4 >= 2 {
			prefix = rng.IntN(n)
		}
		cs = append(cs, Choice{Prefix: prefix, Seed: rng.Uint64() | 1, Torn: i%2 == 1})
	}
	return cs
}

// Crash returns an FS as it would be if power was lost now: everything durable, and those other operations that survive
// by choice. The FS is independent of f, which does not change. It has f's capacity, but neither its hook nor its
// faults.
func (f *FS) Crash(choice Choice) *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	image := New()
	image.capacity, image.taken = f.capacity, f.taken
	names := maps.Clone(f.durable)
	contents := map[*inode]*content{}
	rng := rand.New(rand.NewPCG(choice.Seed, 1))
	coin := func() bool { return rng.Uint64()&1 != 0 }
	for i, p := range f.pending() {
		whole := i < choice.Prefix
		if !whole && (choice.Seed == 0 || !coin()) {
			continue
		}
		if p.dir != nil {
			p.dir.apply(names)
			continue
		}
		c := contents[p.node]
		if c == nil {
			c = p.node.durable.thaw()
			contents[p.node] = c
		}
		if whole || !choice.Torn {
			p.op.apply(c)
		} else {
			p.op.applyTorn(c, coin)
		}
	}
	image.adopt(names, func(n *inode) *inode {
		c := contents[n]
		if c == nil {
			c = n.durable
		}
		return newInode(c, max(n.reserved, c.size))
	})
	image.durable = maps.Clone(image.names)
	return image
}

// Clone returns an independent FS in the same state, including what is not durable: it is what another process finds
// after this one was killed.
func (f *FS) Clone() *FS {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := New()
	c.capacity, c.taken, c.seq = f.capacity, f.taken, f.seq
	copies := map[*inode]*inode{}
	once := func(n *inode) *inode {
		if n != nil && copies[n] == nil {
			copies[n] = n.clone()
		}
		return copies[n]
	}
	c.adopt(f.names, once)
	for name, n := range f.durable {
		c.durable[name] = once(n)
	}
	for _, d := range f.dirOps {
		d.node = once(d.node)
		c.dirOps = append(c.dirOps, d)
	}
	return c
}

// adopt fills a new FS that nobody else uses yet.
func (f *FS) adopt(names map[string]*inode, inode func(*inode) *inode) {
	for name, n := range names {
		n = inode(n)
		f.names[name] = n
		f.used += n.reserved
	}
}
