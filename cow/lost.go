package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/format"
)

// Lost is a range of a volume or snapshot that cannot be read.
type Lost struct {
	Ref    Ref   `json:"ref"`
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// String names the volume or snapshot and the range.
func (l Lost) String() string { return fmt.Sprintf("%v %d+%d", l.Ref, l.Offset, l.Length) }

func (l Lost) compare(m Lost) int {
	if c := l.Ref.compare(m.Ref); c != 0 {
		return c
	}
	return int(min(1, max(-1, l.Offset-m.Offset)))
}

// compare orders a volume before its snapshots.
func (r Ref) compare(q Ref) int {
	if c := strings.Compare(r.Volume, q.Volume); c != 0 {
		return c
	}
	return strings.Compare(r.Snapshot, q.Snapshot)
}

// namedPoint is the state of a volume or snapshot.
type namedPoint struct {
	ref  Ref
	b    *branch
	asOf uint32
	size int64
}

// points returns all volumes and snapshots, in the order of their names.
func (s *Store) points() []namedPoint {
	s.mu.Lock()
	points := make([]namedPoint, 0, len(s.catalog.volumes)+len(s.catalog.snapshots))
	for _, v := range s.catalog.volumes {
		points = append(points, namedPoint{Ref{Volume: v.Name}, v.branch, head, v.Size})
		for _, sn := range v.snapshots {
			points = append(points, namedPoint{Ref{v.Name, sn.Name}, sn.branch, sn.Epoch, sn.Size})
		}
	}
	s.mu.Unlock() // sorting very many would make others wait
	slices.SortFunc(points, func(a, b namedPoint) int { return a.ref.compare(b.ref) })
	return points
}

// lostTo adds, for each of the places, the ranges that it takes of the points, in the order of the points. This is the
// one way from damage to names: docs/engine.md, Known damage. The store may be in use; what is written meanwhile may
// count or not.
func (s *Store) lostTo(ctx context.Context, bad map[badPlace]*[]Lost, points []namedPoint) error {
	if len(bad) == 0 {
		return nil
	}
	indexes := make([]uint32, 0, len(bad))
	for p := range bad {
		indexes = append(indexes, p.leafIndex())
	}
	slices.Sort(indexes)
	indexes = slices.Compact(indexes)
	f := lostFinder{s: s, bad: bad}
	for _, p := range points {
		for _, index := range indexes {
			if err := s.interrupted(ctx); err != nil {
				return err
			}
			if int64(index)*leafSize >= p.size {
				break
			}
			if err := f.leaf(p, index); err != nil {
				return fmt.Errorf("%v: %w", p.ref, err)
			}
		}
	}
	return nil
}

// lostFinder looks for the blocks that places take.
type lostFinder struct {
	s    *Store
	bad  map[badPlace]*[]Lost
	now  format.Leaf
	slot uint32 // the slot that was looked at last
	of   *chunk // its chunk
	away bool   // blocks of it may have been moved
	old  map[unitKey]bool
}

// leaf looks at one leaf of a point.
func (f *lostFinder) leaf(p namedPoint, index uint32) error {
	err := (&Device{s: f.s, b: p.b, asOf: p.asOf}).leaf(index, &f.now)
	at := int64(index) * leafSize
	if errors.Is(err, ErrCorrupt) {
		f.add(leafPlace(index, err), p, at, leafSize)
		return nil
	}
	if err != nil {
		return err
	}
	f.of = nil
	for i, e := range f.now.Entries {
		if e.IsHole() {
			continue
		}
		if k, ok := f.find(e, uint64(index)*format.LeafBlocks+uint64(i)); ok {
			f.add(badPlace{record: k}, p, at+int64(i)*format.BlockSize, format.BlockSize)
		}
	}
	return nil
}

// find returns where the record is that has a block. ok is false if there is no such chunk, or if the record was moved
// and can still be read at its old place.
func (f *lostFinder) find(e format.Entry, block uint64) (k unitKey, ok bool) {
	s := f.s
	if f.of == nil || f.slot != e.Slot() {
		f.slot, f.of = e.Slot(), s.slots.get(e.Slot())
		if f.of == nil {
			return k, false
		}
		s.mu.Lock()
		f.away = f.of.gone || f.of.moved > 0
		s.mu.Unlock()
	}
	c, first := f.of, block-uint64(e.Index())
	k = unitKey{c.Seq, e.WithIndex(0), first}
	if !f.away {
		return k, true
	}
	to, moved, err := s.forwards.lookup(e)
	if err != nil || !moved || to.Mask&(1<<e.Index()) == 0 {
		return k, true
	}
	at := s.slots.get(to.To.Slot())
	if at == nil {
		return k, false
	}
	was := k
	k = unitKey{at.Seq, to.To.WithIndex(0), first}
	return k, f.bad[badPlace{record: k}] == nil || c.gone || f.fails(was)
}

// fails reports whether a record cannot be read. It is asked for the old places of damaged copies only.
func (f *lostFinder) fails(k unitKey) bool {
	if f.old == nil {
		f.old = map[unitKey]bool{}
	}
	bad, ok := f.old[k]
	if !ok {
		bad = f.s.failure(badPlace{record: k}) != nil
		f.old[k] = bad
	}
	return bad
}

// add notes that a place takes a range of a point.
func (f *lostFinder) add(bad badPlace, p namedPoint, off, length int64) {
	list := f.bad[bad]
	length = min(length, p.size-off)
	if list == nil || length <= 0 {
		return
	}
	addLost(list, p.ref, off, length)
}

// addLost adds a range, in order, to a list.
func addLost(list *[]Lost, ref Ref, off, length int64) {
	if n := len(*list); n > 0 {
		if last := &(*list)[n-1]; last.Ref == ref && last.Offset+last.Length == off {
			last.Length += length
			return
		}
	}
	*list = append(*list, Lost{ref, off, length})
}
