package cow

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Difference says in which blocks the content of one state, to, may be other than that of another, from: docs/streams.md,
// Differences. A state is a snapshot, or the head of a volume. Its methods may be called concurrently, until one of the
// two devices is closed.
type Difference struct {
	s        *Store
	from, to *Device      // from is nil: a state of holes
	size     int64        // of to, when the difference was made
	changed  leafSet      // the leaves that may differ; nil: all that to maps
	loaded   atomic.Int64 // leaves that were loaded to be compared
}

// Difference returns the difference from one open device to another of the same store. It begins with a checkpoint, and
// takes time in proportion to the leaves that changed since the last common ancestor, and to nothing else. If from is
// nil, all data of to differs, and what is a hole does not.
//
// The difference covers at least the blocks that differ when Difference is called. A block that was written again with
// what it had may be part of it, and so may one of a head that is written to later. The size of to is as of the call;
// what lies behind it is not looked at, and what lies behind the end of from counts as a hole of from.
func (s *Store) Difference(ctx context.Context, from, to *Device) (*Difference, error) {
	x := &Difference{s: s, from: from, to: to, size: to.Size()}
	for _, d := range []*Device{to, from} {
		switch {
		case d == nil:
		case d.s != s:
			return nil, fmt.Errorf("difference %s: %s is of another store: %w", x, d.ref, ErrInvalid)
		case d.closed.Load():
			return nil, fmt.Errorf("difference %s: %w", x, ErrClosed)
		}
	}
	if from == nil {
		return x, nil
	}
	if err := s.beginTask(); err != nil {
		return nil, fmt.Errorf("difference %s: %w", x, err)
	}
	defer s.tasks.Done()
	if err := x.gather(ctx); err != nil {
		return nil, fmt.Errorf("difference %s: %w", x, err)
	}
	return x, nil
}

// String names the two states.
func (x *Difference) String() string {
	if x.from == nil {
		return "to " + x.to.ref.String()
	}
	return fmt.Sprintf("from %s to %s", x.from.ref, x.to.ref)
}

// Size returns the size in bytes that the state at the end of the difference had when the difference was made.
func (x *Difference) Size() int64 { return x.size }

// limit returns the number of leaves of a disk of the difference's size.
func (x *Difference) limit() uint32 { return uint32((x.size + leafSize - 1) / leafSize) }

// Extents calls fn for the extents in [off, off+length) that differ, in order, until fn returns false. Neighbours of one
// kind are joined. zero says that the extent is a hole, and reads as zeros; otherwise it is data, which may be anything.
// Extents begin and end at multiples of format.BlockSize, or at an end of the range. What fn is not called for is the
// same in both states.
//
// Extents takes time in proportion to the leaves that differ in the range. A damaged leaf is an error that matches
// ErrCorrupt; fn has been called for what lies before it.
func (x *Difference) Extents(ctx context.Context, off, length int64, fn func(off, length int64, zero bool) bool) error {
	if off < 0 || length < 0 || off > x.size || length > x.size-off {
		return fmt.Errorf("difference %s: %d bytes at %d of %d: %w", x, length, off, x.size, ErrInvalid)
	}
	run := changedRun{fn: fn, from: off, to: off + length}
	first, end := uint32(off/leafSize), uint32((off+length+leafSize-1)/leafSize)
	err := x.leaves(ctx, first, end, func(index uint32, from, to *format.Leaf) error {
		at := int64(index) * leafSize
		for i, e := range to.Entries {
			if e != from.Entries[i] && !run.add(at+int64(i)*format.BlockSize, e.IsHole()) {
				return errStop
			}
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	run.end() // of what lies before a damaged leaf, too
	return err
}

// changedRun joins neighbouring blocks of one kind.
type changedRun struct {
	fn         func(off, length int64, zero bool) bool
	from, to   int64 // the range that is asked for
	start, off int64 // the run that is not reported yet; none if they are equal
	zero       bool
}

// add adds a block. It returns false if fn wants no more.
func (r *changedRun) add(off int64, zero bool) bool {
	start, end := max(off, r.from), min(off+format.BlockSize, r.to)
	if start >= end {
		return true
	}
	more := true
	if start != r.off || zero != r.zero {
		more = r.end()
		r.start, r.zero = start, zero
	}
	r.off = end
	return more
}

// end reports the run. It returns false if fn wants no more.
func (r *changedRun) end() bool {
	start := r.start
	r.start = r.off
	return start == r.off || r.fn(start, r.off-start, r.zero)
}

// leaves calls fn, in order, for each leaf in [first, end) that may differ, with the leaf as of from and as of to. A
// block has other content only if its two entries differ. fn may use the leaves until it returns.
func (x *Difference) leaves(ctx context.Context, first, end uint32, fn func(index uint32, from, to *format.Leaf) error) error {
	if err := x.s.beginTask(); err != nil {
		return fmt.Errorf("difference %s: %w", x, err)
	}
	defer x.s.tasks.Done()
	var from, to, again format.Leaf
	one := func(index uint32) error {
		if err := x.s.interrupted(ctx); err != nil {
			return fmt.Errorf("difference %s: %w", x, err)
		}
		if err := x.load(index, &from, &to, &again); err != nil {
			return fmt.Errorf("difference %s, bytes %d to %d: %w", x, int64(index)*leafSize, (int64(index)+1)*leafSize, leafDamage(index, err))
		}
		return fn(index, &from, &to)
	}
	end = min(end, x.limit())
	if x.changed == nil {
		return x.s.leaves(x.to.b, first, end, one)
	}
	for first < end {
		index, ok := x.changed.next(first)
		if !ok || index >= end {
			return nil
		}
		if err := one(index); err != nil {
			return err
		}
		first = index + 1
	}
	return nil
}

// load loads a leaf of both states.
//
// A point keeps its records, so no slot that one of its entries names gets another meaning while it is compared. An
// entry of a head may die after it was looked at, and its slot be used again, perhaps for an equal entry of the other
// head. So the first head is looked at twice: an entry counts as equal only if it is so both before and after.
func (x *Difference) load(index uint32, from, to, again *format.Leaf) error {
	twoHeads := false
	if x.from != nil {
		if err := x.from.leaf(index, from); err != nil {
			return err
		}
		twoHeads = x.from.asOf == head && x.to.asOf == head
		x.loaded.Add(1)
	}
	x.loaded.Add(1)
	if err := x.to.leaf(index, to); err != nil || !twoHeads {
		return err
	}
	if err := x.from.leaf(index, again); err != nil {
		return err
	}
	for i, e := range to.Entries {
		if from.Entries[i] == e {
			from.Entries[i] = again.Entries[i]
		}
	}
	return nil
}

// leaf loads a leaf of the device. A leaf of a point is not kept in the cache: a difference looks at each one once.
func (d *Device) leaf(index uint32, l *format.Leaf) (err error) {
	k := d.b.leaf(index, d.asOf)
	if d.asOf == head {
		return d.s.cache.View(k, func(lf *leafcache.Leaf) { lf.CopyTo(l) })
	}
	_, err = d.s.loadLeaf(k, l)
	return err
}

// gather fills in the leaves that may differ: those that have a version behind the common ancestor.
func (x *Difference) gather(ctx context.Context) (err error) {
	x.s.mu.Lock()
	spans, common := behindAncestor(point{x.from.b, x.from.asOf}, point{x.to.b, x.to.asOf})
	x.s.mu.Unlock()
	limit := x.limit()
	x.changed = newLeafSet(limit)
	note := func(index uint32) error {
		x.changed.add(index)
		return x.s.interrupted(ctx)
	}
	if !common {
		return errors.Join(x.s.leaves(x.from.b, 0, limit, note), x.s.leaves(x.to.b, 0, limit, note))
	}
	// Memory is looked at before the table, because a leaf leaves memory only after the table has it.
	inMemory := append(x.s.cache.InMemory(&x.from.b.leaves, 0, limit), x.s.cache.InMemory(&x.to.b.leaves, 0, limit)...)
	tx, all, err := x.s.readTable()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tx.Close()) }()
	if !all {
		for _, index := range inMemory {
			x.changed.add(index)
		}
	}
	return metadata.Guard(func() error {
		for _, sp := range spans {
			var stopped error
			err := tx.Changes(metadata.Version{Branch: sp.b.ID, Epoch: sp.after + 1}, sp.upTo, func(v metadata.Version) bool {
				if v.Leaf < limit {
					stopped = note(v.Leaf)
				}
				return stopped == nil
			})
			if err := errors.Join(err, stopped); err != nil {
				return err
			}
		}
		return nil
	})
}

// span is a part of a branch: its epochs in (after, upTo].
type span struct {
	b           *branch
	after, upTo uint32
}

// behindAncestor returns the parts of the lines of two points that lie behind their last common ancestor. common
// reports whether they have one; otherwise the parts are all of both lines.
//
// The ancestor is one of the two points, or a point at which a branch of their lines begins. So it is kept, and the
// reaper moves no version from one side of it to the other. If a branch is flattened meanwhile, its point may go; but
// then the branch itself has a version of each leaf. The caller holds mu.
func behindAncestor(a, b point) (spans []span, common bool) {
	onLine := map[*branch]uint32{} // of a, and up to which epoch
	for p := a; p.b != nil; p = p.origin() {
		onLine[p.b] = p.epoch
	}
	var meet *branch
	for p := b; p.b != nil; p = p.origin() {
		if epoch, ok := onLine[p.b]; ok {
			meet, common = p.b, true
			if epoch != p.epoch {
				spans = append(spans, span{p.b, min(epoch, p.epoch), max(epoch, p.epoch)})
			}
			break
		}
		spans = append(spans, span{p.b, 0, p.epoch})
	}
	for p := a; p.b != meet; p = p.origin() {
		spans = append(spans, span{p.b, 0, p.epoch})
	}
	return spans, common
}

// originOf is origin for a caller that does not hold mu. The branch may be flattened right after.
func (s *Store) originOf(p point) point {
	s.mu.Lock()
	defer s.mu.Unlock()
	return p.origin()
}

// origin returns the point at which p's branch begins, or the zero point. The caller holds mu.
func (p point) origin() point { return point{p.b.origin, p.b.OriginEpoch} }

// leafSet is a set of leaves, a bit for each.
type leafSet []uint64

func newLeafSet(limit uint32) leafSet { return make(leafSet, limit/64+1) }

func (t leafSet) add(index uint32) { t[index/64] |= 1 << (index % 64) }

// next returns the first leaf of the set that is not before index.
func (t leafSet) next(index uint32) (uint32, bool) {
	for i := int(index / 64); i < len(t); i++ {
		w := t[i]
		if i == int(index/64) {
			w &^= 1<<(index%64) - 1
		}
		if w != 0 {
			return uint32(i)*64 + uint32(bits.TrailingZeros64(w)), true
		}
	}
	return 0, false
}

// count returns the number of leaves in the set.
func (t leafSet) count() (n int) {
	for _, w := range t {
		n += bits.OnesCount64(w)
	}
	return n
}
