package audit

import (
	"cmp"
	"slices"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// UsageScan finds what keeps which blocks alive in one state of the table: docs/reclaim.md, How the figures are found.
type UsageScan struct {
	tx          *metadata.Tx
	interrupted func() error
	forwards    forwardReader
	moved       []bool // by slot: blocks of the chunk have been moved elsewhere
	leaf        format.Leaf

	rows      branchRows
	branches  map[uint32]*branchRefs
	names     []Name // each volume before its snapshots
	points    map[Name]pointRef
	snapshots map[Name][]pointRef // by volume
	families  map[uint32]int64    // stored bytes by the branch at which a family begins; nil: not known yet
}

// branchRefs is a branch and its references: the parts of its history that keep blocks alive.
type branchRefs struct {
	format.Branch
	origin *branchRefs // nil: it began empty
	refs   []reference // by epoch

	scanned bool
	sums    []size             // by reference: what it refers to
	owned   map[refRange]int64 // stored bytes of blocks, by the references that see them
}

// reference keeps blocks alive. It is a point of a branch, or its head, that has a name or at which kept branches
// begin.
type reference struct {
	epoch uint32
	named bool
	forks int
}

// keeps reports whether the reference still keeps blocks alive.
func (r reference) keeps() bool { return r.named || r.forks > 0 }

// refRange is the references from index first to before end.
type refRange struct{ first, end int32 }

// pointRef names a reference.
type pointRef struct {
	b     *branchRefs
	epoch uint32
}

// search returns the index of the first reference at or after an epoch.
func (b *branchRefs) search(epoch uint32) int {
	i, _ := slices.BinarySearchFunc(b.refs, epoch, func(r reference, epoch uint32) int { return cmp.Compare(r.epoch, epoch) })
	return i
}

// fork returns the point where the branch begins. The branch must have an origin.
func (b *branchRefs) fork() pointRef { return pointRef{b.origin, b.OriginEpoch} }

func (b *branchRefs) own(by refRange, n int64) {
	if n > 0 {
		b.owned[by] += n
	}
}

// NewUsageScan reads the names, the branches and the points in a state of the table, which has to last as long as the
// scan. interrupted is called now and then; if it returns an error, the scan ends with that.
func NewUsageScan(tx *metadata.Tx, interrupted func() error) (*UsageScan, error) {
	tb, err := tx.Load()
	if err != nil {
		return nil, err
	}
	s := &UsageScan{
		tx: tx, interrupted: interrupted, rows: branchRowsOf(tb),
		branches: map[uint32]*branchRefs{}, points: map[Name]pointRef{}, snapshots: map[Name][]pointRef{},
	}
	s.forwards.index(tb.Forwarded)
	for _, r := range tb.Forwarded {
		if int(r.Slot) >= len(s.moved) {
			s.moved = append(s.moved, make([]bool, int(r.Slot)+1-len(s.moved))...)
		}
		s.moved[r.Slot] = true
	}
	for _, row := range tb.Branches { // by id: an origin comes before the branches that begin there
		b := &branchRefs{Branch: row, origin: s.branches[row.OriginBranch]}
		if b.OriginBranch != 0 && b.origin == nil {
			return nil, fault.Corruptf("branch %d has the origin %d, which does not exist", b.ID, b.OriginBranch)
		}
		s.branches[b.ID] = b
	}
	if err := s.findNames(tb); err != nil {
		return nil, err
	}
	return s, s.findRefs(tb)
}

// findNames notes the volumes and snapshots, and the points and heads that they name.
func (s *UsageScan) findNames(tb *metadata.Tables) error {
	volumes := map[uint32]Name{}
	for _, v := range tb.Volumes {
		b := s.branches[v.Branch]
		if b == nil {
			return fault.Corruptf("volume %q is on branch %d, which does not exist", v.Name, v.Branch)
		}
		n := Name{Volume: v.Name}
		volumes[v.ID], s.points[n] = n, pointRef{b, b.Epoch}
		s.names = append(s.names, n)
		b.refs = append(b.refs, reference{epoch: b.Epoch, named: true})
	}
	for _, sn := range tb.Snapshots {
		b := s.branches[sn.Branch]
		if b == nil {
			return fault.Corruptf("snapshot %q is of branch %d, which does not exist", sn.Name, sn.Branch)
		}
		b.refs = append(b.refs, reference{epoch: sn.Epoch, named: sn.Volume != 0})
		if v, ok := volumes[sn.Volume]; ok {
			n := Name{v.Volume, sn.Name}
			s.names = append(s.names, n)
			s.points[n] = pointRef{b, sn.Epoch}
			s.snapshots[v] = append(s.snapshots[v], s.points[n])
		}
	}
	slices.SortFunc(s.names, Name.compare)
	return nil
}

// findRefs finds the references of all branches. It goes from the last branch to the first, because a branch has a
// higher id than its origin.
func (s *UsageScan) findRefs(tb *metadata.Tables) error {
	for _, b := range s.branches {
		slices.SortFunc(b.refs, func(a, b reference) int { return cmp.Compare(a.epoch, b.epoch) })
	}
	for _, row := range slices.Backward(tb.Branches) {
		b := s.branches[row.ID]
		b.refs = slices.DeleteFunc(b.refs, func(r reference) bool { return !r.keeps() })
		if len(b.refs) == 0 || b.origin == nil {
			continue
		}
		i := b.origin.search(b.OriginEpoch)
		if i == len(b.origin.refs) || b.origin.refs[i].epoch != b.OriginEpoch {
			return fault.Corruptf("branch %d begins at epoch %d of branch %d, which is no point", b.ID, b.OriginEpoch, b.OriginBranch)
		}
		b.origin.refs[i].forks++
	}
	return nil
}

// held returns what a point or head refers to.
func (s *UsageScan) held(point pointRef) (size, error) {
	if err := s.scan(point.b); err != nil {
		return size{}, err
	}
	return point.b.sums[point.b.search(point.epoch)], nil
}

// freed returns how many bytes are freed when the points lose their names.
func (s *UsageScan) freed(points ...pointRef) (n int64, err error) {
	for b, lost := range s.lost(points) {
		if err := s.scan(b); err != nil {
			return 0, err
		}
		n += b.freed(lost)
	}
	return n, nil
}

// lost returns, by branch and in order, the references that go when the points lose their names. A branch goes with its
// last reference, and the point at which it began may go with the branch.
func (s *UsageScan) lost(points []pointRef) map[*branchRefs][]int32 {
	lost := map[*branchRefs][]int32{}
	left := map[pointRef]reference{}
	var loses func(point pointRef, what func(*reference))
	loses = func(point pointRef, what func(*reference)) {
		i := point.b.search(point.epoch)
		r, known := left[point]
		if !known {
			r = point.b.refs[i]
		}
		what(&r)
		left[point] = r
		if r.keeps() {
			return
		}
		lost[point.b] = append(lost[point.b], int32(i))
		if len(lost[point.b]) == len(point.b.refs) && point.b.origin != nil {
			loses(point.b.fork(), func(r *reference) { r.forks-- })
		}
	}
	for _, point := range points {
		loses(point, func(r *reference) { r.named = false })
	}
	for _, is := range lost {
		slices.Sort(is)
	}
	return lost
}

// freed returns the bytes of blocks that only lost references see.
func (b *branchRefs) freed(lost []int32) (n int64) {
	if len(lost) == 1 {
		return b.owned[refRange{lost[0], lost[0] + 1}]
	}
	before := make([]int32, len(b.refs)+1) // how many lost references come before each reference
	for _, i := range lost {
		before[i+1] = 1
	}
	for i := range b.refs {
		before[i+1] += before[i]
	}
	for by, bytes := range b.owned {
		if before[by.end]-before[by.first] == by.end-by.first {
			n += bytes
		}
	}
	return n
}
