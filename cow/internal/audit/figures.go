package audit

import (
	"cmp"
	"slices"
	"strings"
)

// Name names a volume (Snapshot empty) or one of its snapshots, like the Ref of package cow.
type Name struct{ Volume, Snapshot string }

// compare orders volumes by name, each before its snapshots.
func (n Name) compare(o Name) int {
	return cmp.Or(strings.Compare(n.Volume, o.Volume), strings.Compare(n.Snapshot, o.Snapshot))
}

// Figures say how much of the store a volume or snapshot takes. docs/reclaim.md, Space, defines them.
type Figures struct {
	Mapped          int64 // bytes of its blocks that hold data
	Referenced      int64 // stored size of these blocks, shared or not
	Exclusive       int64 // what removing it, and nothing else, frees
	Shared          int64 // the part of Referenced that stays then
	UsedBySnapshots int64 // of a volume: what deleting all its snapshots frees
	Used            int64 // what deleting it frees; a volume with its snapshots
}

// All returns the names of all volumes and snapshots, each volume before its snapshots.
func (s *UsageScan) All() []Name { return s.names }

// Of returns the names of a volume and its snapshots, or nothing if it does not exist.
func (s *UsageScan) Of(volume string) []Name {
	from, _ := slices.BinarySearchFunc(s.names, Name{Volume: volume}, Name.compare)
	to := from
	for to < len(s.names) && s.names[to].Volume == volume {
		to++
	}
	return s.names[from:to]
}

// Figures calls fn with what each of the named volumes and snapshots takes, in the order of names. It leaves out those
// that do not exist.
func (s *UsageScan) Figures(names []Name, fn func(Name, Figures)) error {
	if len(names) == 1 && names[0].Snapshot != "" {
		if point, ok := s.points[names[0]]; ok {
			f, done, err := s.snapshot(point)
			if err != nil {
				return err
			}
			if done {
				fn(names[0], f)
				return nil
			}
		}
	}
	for _, n := range names {
		point, ok := s.points[n]
		if !ok {
			continue
		}
		f, err := s.figuresOf(point, s.snapshots[n])
		if err != nil {
			return err
		}
		fn(n, f)
	}
	return nil
}

// figuresOf returns what a point takes that a volume or snapshot names. snapshots are those of the volume.
func (s *UsageScan) figuresOf(point pointRef, snapshots []pointRef) (f Figures, err error) {
	held, err := s.held(point)
	if err != nil {
		return f, err
	}
	f.Mapped, f.Referenced = held.mapped, held.stored
	if f.Exclusive, err = s.freed(point); err != nil {
		return f, err
	}
	only, err := s.only(point)
	if err != nil {
		return f, err
	}
	f.Shared, f.Used = f.Referenced-only, f.Exclusive
	if len(snapshots) == 0 {
		return f, nil
	}
	if f.UsedBySnapshots, err = s.freed(snapshots...); err != nil {
		return f, err
	}
	f.Used, err = s.freed(append(snapshots[:len(snapshots):len(snapshots)], point)...)
	return f, err
}

// Family returns what a volume's family takes: the volume and its snapshots, what it comes from, all clones of any of
// these, and what is kept for them. root is the branch at which the family begins; each family has another. It is 0 if
// there is no such volume.
func (s *UsageScan) Family(volume string) (root uint32, n int64, err error) {
	point, ok := s.points[Name{Volume: volume}]
	if !ok {
		return 0, 0, nil
	}
	root = point.b.root()
	if s.families == nil {
		s.families = map[uint32]int64{}
		for _, b := range s.branches {
			if err := s.scan(b); err != nil {
				return 0, 0, err
			}
			for _, bytes := range b.owned {
				s.families[b.root()] += bytes
			}
		}
	}
	return root, s.families[root], nil
}

// root returns the branch at which the history of a branch begins.
func (b *branchRefs) root() uint32 {
	for b.origin != nil {
		b = b.origin
	}
	return b.ID
}

// Kept returns the stored bytes of all blocks that anything named keeps alive. They are the live bytes, but for what
// was deleted and waits for the reaper.
func (s *UsageScan) Kept() (n int64, err error) {
	for _, b := range s.branches {
		if err := s.scan(b); err != nil {
			return 0, err
		}
		for _, bytes := range b.owned {
			n += bytes
		}
	}
	return n, nil
}
