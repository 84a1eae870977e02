package cow

import (
	"cmp"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// usageScan finds what keeps which blocks alive in one state of the table: docs/reclaim.md, How the figures
// are found.
type usageScan struct {
	tx          *metadata.Tx
	interrupted func() error
	forwards    checkForwards
	moved       []bool // by slot: blocks of the chunk have been moved elsewhere
	leaf        format.Leaf

	lines     map[uint32]*branchRefs
	refs      []Ref // each volume before its snapshots
	marks     map[Ref]pointRef
	snapshots map[Ref][]pointRef // by volume
}

// branchRefs is a branch and its keepers, which are the parts of its history that keep blocks alive.
type branchRefs struct {
	format.Branch
	origin  *branchRefs // nil: it began empty
	keepers []reference // by epoch

	scanned bool
	sums    []amount           // by keeper: what it refers to
	owned   map[refRange]int64 // stored bytes of blocks, by the keepers that see them
}

// reference is a keeper: a point of a branch, or its head, that has a name or at which kept branches begin.
type reference struct {
	epoch uint32
	named bool
	forks int
}

func (k reference) keeps() bool { return k.named || k.forks > 0 }

// refRange is the keepers from index first to before end.
type refRange struct{ first, end int32 }

// pointRef names a keeper.
type pointRef struct {
	l     *branchRefs
	epoch uint32
}

// search returns the index of the first keeper at or after an epoch.
func (l *branchRefs) search(epoch uint32) int {
	i, _ := slices.BinarySearchFunc(l.keepers, epoch, func(k reference, epoch uint32) int { return cmp.Compare(k.epoch, epoch) })
	return i
}

// fork returns the point where the branch begins. The branch must have an origin.
func (l *branchRefs) fork() pointRef { return pointRef{l.origin, l.OriginEpoch} }

func (l *branchRefs) own(by refRange, n int64) {
	if n > 0 {
		l.owned[by] += n
	}
}

func newCensus(tx *metadata.Tx, interrupted func() error) (*usageScan, error) {
	tb, err := tx.Load()
	if err != nil {
		return nil, err
	}
	c := &usageScan{tx: tx, interrupted: interrupted, lines: map[uint32]*branchRefs{}, marks: map[Ref]pointRef{}, snapshots: map[Ref][]pointRef{}}
	c.forwards.index(tb.Forwarded)
	for _, r := range tb.Forwarded {
		if int(r.Slot) >= len(c.moved) {
			c.moved = append(c.moved, make([]bool, int(r.Slot)+1-len(c.moved))...)
		}
		c.moved[r.Slot] = true
	}
	for _, b := range tb.Branches { // by id: an origin comes before the branches that begin there
		l := &branchRefs{Branch: b, origin: c.lines[b.OriginBranch]}
		if b.OriginBranch != 0 && l.origin == nil {
			return nil, fault.Corruptf("branch %d has the origin %d, which does not exist", b.ID, b.OriginBranch)
		}
		c.lines[b.ID] = l
	}
	if err := c.names(tb); err != nil {
		return nil, err
	}
	return c, c.keep(tb)
}

// names notes the volumes and snapshots, and the points and heads that they name.
func (c *usageScan) names(tb *metadata.Tables) error {
	volumes := map[uint32]Ref{}
	for _, v := range tb.Volumes {
		l := c.lines[v.Branch]
		if l == nil {
			return fault.Corruptf("volume %q is on branch %d, which does not exist", v.Name, v.Branch)
		}
		r := Ref{Volume: v.Name}
		volumes[v.ID], c.marks[r] = r, pointRef{l, l.Epoch}
		c.refs = append(c.refs, r)
		l.keepers = append(l.keepers, reference{epoch: l.Epoch, named: true})
	}
	for _, sn := range tb.Snapshots {
		l := c.lines[sn.Branch]
		if l == nil {
			return fault.Corruptf("snapshot %q is of branch %d, which does not exist", sn.Name, sn.Branch)
		}
		l.keepers = append(l.keepers, reference{epoch: sn.Epoch, named: sn.Volume != 0})
		if v, ok := volumes[sn.Volume]; ok {
			r := Ref{v.Volume, sn.Name}
			c.refs = append(c.refs, r)
			c.marks[r] = pointRef{l, sn.Epoch}
			c.snapshots[v] = append(c.snapshots[v], c.marks[r])
		}
	}
	slices.SortFunc(c.refs, Ref.compare)
	return nil
}

// compare orders volumes by name, each before its snapshots.
func (r Ref) compare(o Ref) int {
	return cmp.Or(strings.Compare(r.Volume, o.Volume), strings.Compare(r.Snapshot, o.Snapshot))
}

// keep finds the keepers of all branches. It goes from the last branch to the first, because a branch has a
// higher id than its origin.
func (c *usageScan) keep(tb *metadata.Tables) error {
	for _, l := range c.lines {
		slices.SortFunc(l.keepers, func(a, b reference) int { return cmp.Compare(a.epoch, b.epoch) })
	}
	for _, b := range slices.Backward(tb.Branches) {
		l := c.lines[b.ID]
		l.keepers = slices.DeleteFunc(l.keepers, func(k reference) bool { return !k.keeps() })
		if len(l.keepers) == 0 || l.origin == nil {
			continue
		}
		k := l.origin.search(l.OriginEpoch)
		if k == len(l.origin.keepers) || l.origin.keepers[k].epoch != l.OriginEpoch {
			return fault.Corruptf("branch %d begins at epoch %d of branch %d, which is no point", b.ID, b.OriginEpoch, b.OriginBranch)
		}
		l.origin.keepers[k].forks++
	}
	return nil
}

// held returns what a point or head refers to.
func (c *usageScan) held(m pointRef) (amount, error) {
	if err := c.scan(m.l); err != nil {
		return amount{}, err
	}
	return m.l.sums[m.l.search(m.epoch)], nil
}

// freed returns how many bytes are freed when the points ms lose their names.
func (c *usageScan) freed(ms ...pointRef) (n int64, err error) {
	for l, lost := range c.lost(ms) {
		if err := c.scan(l); err != nil {
			return 0, err
		}
		n += l.freed(lost)
	}
	return n, nil
}

// lost returns, by branch and in order, the keepers that go when the points ms lose their names. A branch
// goes with its last keeper, and the point at which it began may go with the branch.
func (c *usageScan) lost(ms []pointRef) map[*branchRefs][]int32 {
	lost := map[*branchRefs][]int32{}
	left := map[pointRef]reference{}
	var loses func(m pointRef, what func(*reference))
	loses = func(m pointRef, what func(*reference)) {
		i := m.l.search(m.epoch)
		k, known := left[m]
		if !known {
			k = m.l.keepers[i]
		}
		what(&k)
		left[m] = k
		if k.keeps() {
			return
		}
		lost[m.l] = append(lost[m.l], int32(i))
		if len(lost[m.l]) == len(m.l.keepers) && m.l.origin != nil {
			loses(m.l.fork(), func(k *reference) { k.forks-- })
		}
	}
	for _, m := range ms {
		loses(m, func(k *reference) { k.named = false })
	}
	for _, is := range lost {
		slices.Sort(is)
	}
	return lost
}

// freed returns the bytes of blocks that only lost keepers see.
func (l *branchRefs) freed(lost []int32) (n int64) {
	if len(lost) == 1 {
		return l.owned[refRange{lost[0], lost[0] + 1}]
	}
	before := make([]int32, len(l.keepers)+1) // how many lost keepers come before each keeper
	for _, i := range lost {
		before[i+1] = 1
	}
	for i := range l.keepers {
		before[i+1] += before[i]
	}
	for by, bytes := range l.owned {
		if before[by.end]-before[by.first] == by.end-by.first {
			n += bytes
		}
	}
	return n
}
