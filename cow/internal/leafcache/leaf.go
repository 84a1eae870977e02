package leafcache

import (
	"sync/atomic"
	"unsafe"

	"github.com/vdisk/vdisk/format"
)

// Head stands for a branch's newest state in a Key.
const Head = ^uint32(0)

// Branch is what the cache knows of a branch. ID and OriginEpoch never change.
type Branch struct {
	ID          uint32
	Origin      atomic.Pointer[Branch] // nil: it began empty, or has been flattened
	OriginEpoch uint32
	unwritten   atomic.Int64 // dirty leaves and pre-images that no checkpoint has committed
}

// Key names a cached leaf: one of a branch's head, which changes, or one of a point, which does not.
type Key struct {
	Branch *Branch
	Index  uint32
	AsOf   uint32 // the point's epoch, or Head
}

// Leaf is a merged leaf in memory: this header, followed by the other fields of an openLeaf or by a format.Packed. It
// lies in a shard's arena, and only the shard's lock keeps it from moving. Its content changes under the store's lock
// and the shard's lock together.
type Leaf struct {
	next   uint32 // the next leaf of the bucket
	branch uint32
	index  uint32
	asOf   uint32 // as in Key; in a pre-image, the version's epoch
	epoch  uint32 // of the version in this leaf; 0: the branch has no version of its own
	state  atomic.Uint32
}

// openLeaf is a leaf that can be changed.
type openLeaf struct {
	Leaf
	gen     uint64 // of the checkpoint that has to write it; 0: clean, the same as in the table
	content Content
}

// Content is the content of a leaf that can be changed, and what has changed since the state of the same version that is
// in the table, or that is written before this one.
type Content struct {
	format.Leaf
	put   [format.LeafBlocks / 64]uint64 // a bit for each block whose entry was put, with its changed bit
	other bool                           // something else has changed, or there is no such state
}

// Put notes that the entry of block i was put, and its changed bit set.
func (c *Content) Put(i int) { c.put[uint(i)/64%4] |= 1 << (uint(i) % 64) }

// Puts returns the blocks that were put, with a bit for each, the lowest of the first word for block 0. ok is false if
// more may have changed.
func (c *Content) Puts() (blocks [format.LeafBlocks / 64]uint64, ok bool) { return c.put, !c.other }

func (c *Content) forgetPuts() { c.put, c.other = [len(c.put)]uint64{}, false }

// The bits of Leaf.state. All but stateUsed change under the shard's lock.
const (
	stateWords    = 1<<10 - 1 // length in words, with the header
	stateOpen     = 1 << 10   // an openLeaf
	statePreimage = 1 << 11   // a pre-image, see preimage.go
	stateGone     = 1 << 12   // removed; its memory is not reused yet
	stateUsed     = 1 << 13   // used since the clock hand passed
)

const (
	headerWords = int(unsafe.Sizeof(Leaf{}) / 8)
	openWords   = int(unsafe.Sizeof(openLeaf{}) / 8)
)

// Epoch returns the epoch of the branch's own version in this leaf, or 0 if the branch has none.
func (lf *Leaf) Epoch() uint32 { return lf.epoch }

func (lf *Leaf) is(bit uint32) bool { return lf.state.Load()&bit != 0 }

func (lf *Leaf) words() uint32 { return lf.state.Load() & stateWords }

// touch marks the leaf used. Readers share the cache line of state, so touch writes to it only if the bit changes.
func (lf *Leaf) touch() {
	if !lf.is(stateUsed) {
		lf.state.Or(stateUsed)
	}
}

// open returns the leaf as one that can be changed, or nil if it is packed.
func (lf *Leaf) open() *openLeaf {
	if lf.is(stateOpen) {
		return (*openLeaf)(lf.pointer())
	}
	return nil
}

func (lf *Leaf) pointer() unsafe.Pointer { return unsafe.Pointer(lf) }

func (lf *Leaf) packed() format.Packed {
	return unsafe.Slice((*uint64)(unsafe.Add(lf.pointer(), 8*headerWords)), int(lf.words())-headerWords)
}

// Entry returns the entry of block i of the leaf.
func (lf *Leaf) Entry(i int) format.Entry {
	if o := lf.open(); o != nil {
		return o.content.Entries[i]
	}
	return lf.packed().Entry(i)
}

// IsChanged reports whether block i of the leaf was put in the epoch of its version.
func (lf *Leaf) IsChanged(i int) bool {
	if o := lf.open(); o != nil {
		return o.content.IsChanged(i)
	}
	return lf.packed().IsChanged(i)
}

// CopyTo writes the leaf's entries and changed bits to l.
func (lf *Leaf) CopyTo(l *format.Leaf) {
	if o := lf.open(); o != nil {
		*l = o.content.Leaf
	} else {
		lf.packed().Unpack(l)
	}
}

// dirtyGen returns the generation of the checkpoint that has to write the leaf, or 0 if the leaf is clean.
func (lf *Leaf) dirtyGen() uint64 {
	if o := lf.open(); o != nil {
		return o.gen
	}
	return 0
}

// IsHole reports whether n blocks of the leaf, from first on, are all holes.
func (lf *Leaf) IsHole(first, n int) bool {
	for i := first; i < first+n; i++ {
		if !lf.Entry(i).IsHole() {
			return false
		}
	}
	return true
}
