package audit

import (
	"errors"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// snapshot finds the figures of one snapshot without a scan of all versions. It looks at the leaves of the snapshot,
// and at the versions between the references before and after it. done is false if other points would go with it.
func (s *UsageScan) snapshot(point pointRef) (u Figures, done bool, err error) {
	lost := s.lost([]pointRef{point})
	if len(lost) > 1 {
		return u, false, nil
	}
	held, err := s.referenced(point)
	if err == nil && len(lost) == 1 {
		u.Exclusive, err = s.between(point)
	}
	u.Mapped, u.Referenced = held.mapped, held.stored
	u.Shared, u.Used = u.Referenced-u.Exclusive, u.Exclusive
	return u, true, err
}

// referenced adds up the leaves that a reference sees.
func (s *UsageScan) referenced(point pointRef) (sum size, err error) {
	for index := uint32(0); ; index++ {
		next, more, err := s.nextLeaf(point.b, index)
		if err != nil || !more {
			return sum, err
		}
		index = next
		if _, err := s.rows.leaf(s.tx, point.b.ID, point.epoch, index, &s.leaf); err != nil {
			return sum, err
		}
		n, err := s.sizeOf(&s.leaf)
		if err != nil {
			return sum, err
		}
		sum.add(n, +1)
	}
}

// nextLeaf returns the first leaf at or after index that the branch or one of its origins has.
func (s *UsageScan) nextLeaf(b *branchRefs, index uint32) (next uint32, more bool, err error) {
	if err := s.interrupted(); err != nil {
		return 0, false, err
	}
	for ; b != nil; b = b.origin {
		n, ok, err := s.tx.NextLeaf(b.ID, index)
		if err != nil {
			return 0, false, err
		}
		if ok && (!more || n < next) {
			next, more = n, true
		}
	}
	return next, more, nil
}

// between adds up the blocks that only one reference sees: those put after the reference before it, and overwritten
// before the next.
func (s *UsageScan) between(point pointRef) (n int64, err error) {
	i := point.b.search(point.epoch)
	after, until := uint32(0), point.b.Epoch
	if i > 0 {
		after = point.b.refs[i-1].epoch
	}
	if i+1 < len(point.b.refs) {
		until = point.b.refs[i+1].epoch
	}
	leaves := map[uint32]bool{}
	err = s.tx.Changes(metadata.Version{Branch: point.b.ID, Epoch: after + 1}, point.epoch, func(v metadata.Version) bool {
		leaves[v.Leaf] = true
		return true
	})
	if err != nil {
		return 0, err
	}
	only := refRange{int32(i), int32(i) + 1}
	for index := range leaves {
		if err := s.interrupted(); err != nil {
			return 0, err
		}
		p := pass{s: s, b: point.b}
		p.enter(index)
		for epoch := until; epoch > after; epoch-- {
			if epoch, err = s.tx.Leaf(metadata.Version{Branch: point.b.ID, Leaf: index, Epoch: epoch}, &s.leaf); err != nil {
				return 0, err
			}
			if epoch <= after {
				break
			}
			err := p.owners(int32(point.b.search(epoch)), &s.leaf, func(_ int, by refRange, share int64) {
				if by == only {
					n += share
				}
			})
			if err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// size is the size of some blocks: bytes mapped, and bytes as stored.
type size struct{ mapped, stored int64 }

func (n *size) add(o size, sign int64) {
	n.mapped += sign * o.mapped
	n.stored += sign * o.stored
}

// sizeOf adds up the blocks that a leaf maps.
func (s *UsageScan) sizeOf(lf *format.Leaf) (sum size, err error) {
	for _, e := range lf.Entries {
		if !e.IsHole() {
			share, err := s.share(e)
			if err != nil {
				return sum, err
			}
			sum.add(size{format.BlockSize, share}, +1)
		}
	}
	return sum, nil
}

// share returns what a block takes in the log, at the place where it is now.
func (s *UsageScan) share(e format.Entry) (int64, error) {
	if slot := e.Slot(); int(slot) >= len(s.moved) || !s.moved[slot] {
		return int64(e.Share()), nil
	}
	at, _, err := s.forwards.find(s.tx, e)
	return int64(at.Share()), err
}

// scan goes over all versions of a branch, once, after those of its origins.
func (s *UsageScan) scan(b *branchRefs) error {
	if b.scanned {
		return nil
	}
	b.sums, b.owned = make([]size, len(b.refs)+1), map[refRange]int64{}
	var begin size
	if b.origin != nil {
		var err error
		if begin, err = s.held(b.fork()); err != nil {
			return err
		}
	}
	p := pass{s: s, b: b}
	if err := s.history(b, p.version); err != nil {
		return err
	}
	for i := range b.sums { // so far, each is the difference from the reference before
		b.sums[i].add(begin, +1)
		begin = b.sums[i]
	}
	b.scanned = true
	return nil
}

// history is like Tx.History, but can be interrupted.
func (s *UsageScan) history(b *branchRefs, fn func(v metadata.Version, lf *format.Leaf) error) error {
	n := 0
	return s.tx.History(b.ID, func(v metadata.Version, lf *format.Leaf) error {
		if n++; n%64 == 0 {
			if err := s.interrupted(); err != nil {
				return err
			}
		}
		return fn(v, lf)
	})
}

// pass is a scan of a branch at one of its leaves. It sees the newest version of the leaf first.
type pass struct {
	s     *UsageScan
	b     *branchRefs
	begun bool
	leaf  uint32
	seen  int32                    // references from here on have a newer version
	from  [format.LeafBlocks]int32 // the same for each block: they see a newer one
	base  size                     // what the leaf was when the branch began
}

func (p *pass) version(v metadata.Version, lf *format.Leaf) (err error) {
	if p.enter(v.Leaf) {
		if p.base, err = p.s.began(p.b, v.Leaf); err != nil {
			return err
		}
	}
	first := int32(p.b.search(v.Epoch))
	if first < p.seen {
		sum, err := p.s.sizeOf(lf)
		if err != nil {
			return err
		}
		sum.add(p.base, -1)
		p.b.sums[first].add(sum, +1)
		p.b.sums[p.seen].add(sum, -1)
		p.seen = first
	}
	var last refRange
	var sum int64
	err = p.owners(first, lf, func(_ int, by refRange, share int64) {
		if by != last {
			p.b.own(last, sum)
			last, sum = by, 0
		}
		sum += share
	})
	p.b.own(last, sum)
	return err
}

// enter begins a leaf if it is another one than before, and reports whether it is.
func (p *pass) enter(leaf uint32) bool {
	if p.begun && leaf == p.leaf {
		return false
	}
	p.begun, p.leaf, p.seen = true, leaf, int32(len(p.b.refs))
	for i := range p.from {
		p.from[i] = p.seen
	}
	return true
}

// owners calls fn for each block that the version owns and that references see, with the range of these references and
// the block's share. first is the first reference that sees the version.
func (p *pass) owners(first int32, lf *format.Leaf, fn func(i int, by refRange, share int64)) error {
	for i, e := range lf.Entries {
		if !lf.IsChanged(i) {
			continue
		}
		by := refRange{first, p.from[i]}
		p.from[i] = min(first, by.end)
		if e.IsHole() || by.first >= by.end {
			continue
		}
		share, err := p.s.share(e)
		if err != nil {
			return err
		}
		fn(i, by, share)
	}
	return nil
}

// only returns how many bytes of the blocks that a point refers to go with it: those of blocks that nothing else sees,
// except points that go with it.
func (s *UsageScan) only(point pointRef) (n int64, err error) {
	for b, lost := range s.lost([]pointRef{point}) {
		if b == point.b {
			n += b.freed(lost)
			continue
		}
		seen, err := s.seenBy(point, b, lost[0]) // the lost reference of an origin is where the branch begins
		if err != nil {
			return 0, err
		}
		n += seen
	}
	return n, nil
}

// seenBy returns the bytes of those blocks that only one reference of an origin sees, and that the point sees, too.
// Only the point keeps that reference alive.
func (s *UsageScan) seenBy(point pointRef, b *branchRefs, only int32) (n int64, err error) {
	p := pass{s: s, b: b}
	var now format.Leaf
	known := false // now holds the present leaf
	err = s.history(b, func(v metadata.Version, lf *format.Leaf) error {
		if p.enter(v.Leaf) {
			known = false
		}
		var bad error
		err := p.owners(int32(b.search(v.Epoch)), lf, func(i int, by refRange, share int64) {
			if by != (refRange{only, only + 1}) || bad != nil {
				return
			}
			if !known {
				_, bad = s.rows.leaf(s.tx, point.b.ID, point.epoch, v.Leaf, &now)
				known = true
			}
			if now.Entries[i] == lf.Entries[i] {
				n += share
			}
		})
		return errors.Join(err, bad)
	})
	return n, err
}

// began returns what a leaf was when the branch began.
func (s *UsageScan) began(b *branchRefs, index uint32) (n size, err error) {
	if b.origin == nil {
		return n, nil
	}
	found, err := s.rows.leaf(s.tx, b.OriginBranch, b.OriginEpoch, index, &s.leaf)
	if err != nil || !found {
		return n, err
	}
	return s.sizeOf(&s.leaf)
}
