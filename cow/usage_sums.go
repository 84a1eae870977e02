package cow

import (
	"context"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// interrupted returns an error if ctx has ended or the store is closing, so that a long operation stops.
func (s *Store) interrupted(ctx context.Context) error {
	select {
	case <-s.quit:
		return ErrClosed
	default:
		return ctx.Err()
	}
}

// readTable returns the table as of now. If no checkpoint can be made any more, it is as of the last one.
func (s *Store) readTable() (*metadata.Tx, error) {
	s.ckptMu.Lock()
	defer s.ckptMu.Unlock()
	s.mu.Lock()
	err := s.usable()
	s.mu.Unlock()
	if err == nil && s.changed() {
		err = s.checkpointLocked()
	}
	if err != nil && s.readOnly == nil && !errors.Is(err, ErrFailed) && !errors.Is(err, ErrNoSpace) {
		return nil, err
	}
	return s.meta.Begin()
}

// Room returns how many bytes of records fit into the store as it is, without cleaning.
func (s *Store) Room() (int64, error) {
	if err := s.beginTask(); err != nil {
		return 0, err
	}
	defer s.tasks.Done()
	free, err := s.fs.Free()
	if err != nil {
		return 0, fmt.Errorf("free space of the store: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	room := min(free, free+s.kept()-wal.Spare)
	if s.wal.Limit > 0 {
		room = min(room, s.wal.Limit-s.slots.files)
	}
	return room - s.workRoom(), nil
}

// usage returns the figures for refs, without those that do not exist.
func (c *usageScan) usage(refs []Ref) (us []Usage, err error) {
	if len(refs) == 1 && refs[0].Snapshot != "" {
		if m, ok := c.marks[refs[0]]; ok {
			u, done, err := c.snapshot(m)
			if u.Ref = refs[0]; done || err != nil {
				return []Usage{u}, err
			}
		}
	}
	for _, r := range refs {
		own, ok := c.marks[r]
		if !ok {
			continue
		}
		u := Usage{Ref: r}
		held, err := c.held(own)
		if err != nil {
			return nil, err
		}
		u.Mapped, u.Referenced = held.mapped, held.stored
		if u.Exclusive, err = c.freed(own); err != nil {
			return nil, err
		}
		only, err := c.only(own)
		if err != nil {
			return nil, err
		}
		u.Shared, u.Used = u.Referenced-only, u.Exclusive
		if snaps := c.snapshots[r]; len(snaps) > 0 {
			if u.UsedBySnapshots, err = c.freed(snaps...); err != nil {
				return nil, err
			}
			if u.Used, err = c.freed(append(snaps[:len(snaps):len(snaps)], own)...); err != nil {
				return nil, err
			}
		}
		us = append(us, u)
	}
	return us, nil
}

// snapshot finds the figures of one snapshot without a scan of all versions. It looks at the leaves of the
// snapshot, and at the versions between the keepers before and after it. done is false if other points would
// go with it.
func (c *usageScan) snapshot(m pointRef) (u Usage, done bool, err error) {
	lost := c.lost([]pointRef{m})
	if len(lost) > 1 {
		return u, false, nil
	}
	held, err := c.referenced(m)
	if err == nil && len(lost) == 1 {
		u.Exclusive, err = c.between(m)
	}
	u.Mapped, u.Referenced = held.mapped, held.stored
	u.Shared, u.Used = u.Referenced-u.Exclusive, u.Exclusive
	return u, true, err
}

// referenced adds up the leaves that a keeper sees.
func (c *usageScan) referenced(m pointRef) (sum amount, err error) {
	for index := uint32(0); ; index++ {
		next, more, err := c.nextLeaf(m.l, index)
		if err != nil || !more {
			return sum, err
		}
		index = next
		if _, err := c.merged(m.l, m.epoch, index, &c.leaf); err != nil {
			return sum, err
		}
		a, err := c.amountOf(&c.leaf)
		if err != nil {
			return sum, err
		}
		sum.add(a, +1)
	}
}

// nextLeaf returns the first leaf at or after index that the branch or one of its origins has.
func (c *usageScan) nextLeaf(l *branchRefs, index uint32) (next uint32, more bool, err error) {
	if err := c.interrupted(); err != nil {
		return 0, false, err
	}
	for ; l != nil; l = l.origin {
		n, ok, err := c.tx.NextLeaf(l.ID, index)
		if err != nil {
			return 0, false, err
		}
		if ok && (!more || n < next) {
			next, more = n, true
		}
	}
	return next, more, nil
}

// between adds up the blocks that only one keeper sees: those put after the keeper before it, and overwritten
// before the next.
func (c *usageScan) between(m pointRef) (n int64, err error) {
	i := m.l.search(m.epoch)
	after, until := uint32(0), m.l.Epoch
	if i > 0 {
		after = m.l.keepers[i-1].epoch
	}
	if i+1 < len(m.l.keepers) {
		until = m.l.keepers[i+1].epoch
	}
	leaves := map[uint32]bool{}
	err = c.tx.Changes(metadata.Version{Branch: m.l.ID, Epoch: after + 1}, m.epoch, func(v metadata.Version) bool {
		leaves[v.Leaf] = true
		return true
	})
	if err != nil {
		return 0, err
	}
	only := refRange{int32(i), int32(i) + 1}
	for index := range leaves {
		if err := c.interrupted(); err != nil {
			return 0, err
		}
		p := pass{c: c, l: m.l}
		p.enter(index)
		for epoch := until; epoch > after; epoch-- {
			if epoch, err = c.tx.Leaf(metadata.Version{Branch: m.l.ID, Leaf: index, Epoch: epoch}, &c.leaf); err != nil {
				return 0, err
			}
			if epoch <= after {
				break
			}
			err := p.owners(int32(m.l.search(epoch)), &c.leaf, func(_ int, by refRange, share int64) {
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

// amount is the size of some blocks: bytes mapped, and bytes as stored.
type amount struct{ mapped, stored int64 }

func (a *amount) add(b amount, sign int64) {
	a.mapped += sign * b.mapped
	a.stored += sign * b.stored
}

// amountOf adds up the blocks that a leaf maps.
func (c *usageScan) amountOf(l *format.Leaf) (a amount, err error) {
	for _, e := range l.Entries {
		if !e.IsHole() {
			share, err := c.share(e)
			if err != nil {
				return a, err
			}
			a.add(amount{format.BlockSize, share}, +1)
		}
	}
	return a, nil
}

// share returns what a block takes in the log, at the place where it is now.
func (c *usageScan) share(e format.Entry) (int64, error) {
	if slot := e.Slot(); int(slot) >= len(c.moved) || !c.moved[slot] {
		return int64(e.Share()), nil
	}
	at, _, err := c.forwards.find(c.tx, e)
	return int64(at.Share()), err
}

// scan goes over all versions of a branch, once, after those of its origins.
func (c *usageScan) scan(l *branchRefs) error {
	if l.scanned {
		return nil
	}
	l.sums, l.owned = make([]amount, len(l.keepers)+1), map[refRange]int64{}
	var begin amount
	if l.origin != nil {
		var err error
		if begin, err = c.held(l.fork()); err != nil {
			return err
		}
	}
	p := pass{c: c, l: l}
	if err := c.history(l, p.version); err != nil {
		return err
	}
	for i := range l.sums { // so far, each is the difference from the keeper before
		l.sums[i].add(begin, +1)
		begin = l.sums[i]
	}
	l.scanned = true
	return nil
}

// history is like Tx.History, but can be interrupted.
func (c *usageScan) history(l *branchRefs, fn func(v metadata.Version, lf *format.Leaf) error) error {
	n := 0
	return c.tx.History(l.ID, func(v metadata.Version, lf *format.Leaf) error {
		if n++; n%64 == 0 {
			if err := c.interrupted(); err != nil {
				return err
			}
		}
		return fn(v, lf)
	})
}

// pass is a scan of a branch at one of its leaves. It sees the newest version of the leaf first.
type pass struct {
	c     *usageScan
	l     *branchRefs
	begun bool
	leaf  uint32
	seen  int32                    // keepers from here on have a newer version
	from  [format.LeafBlocks]int32 // the same for each block: they see a newer one
	base  amount                   // what the leaf was when the branch began
}

func (p *pass) version(v metadata.Version, lf *format.Leaf) (err error) {
	if p.enter(v.Leaf) {
		if p.base, err = p.c.began(p.l, v.Leaf); err != nil {
			return err
		}
	}
	first := int32(p.l.search(v.Epoch))
	if first < p.seen {
		sum, err := p.c.amountOf(lf)
		if err != nil {
			return err
		}
		sum.add(p.base, -1)
		p.l.sums[first].add(sum, +1)
		p.l.sums[p.seen].add(sum, -1)
		p.seen = first
	}
	var last refRange
	var sum int64
	err = p.owners(first, lf, func(_ int, by refRange, share int64) {
		if by != last {
			p.l.own(last, sum)
			last, sum = by, 0
		}
		sum += share
	})
	p.l.own(last, sum)
	return err
}

// enter begins a leaf if it is another one than before, and reports whether it is.
func (p *pass) enter(leaf uint32) bool {
	if p.begun && leaf == p.leaf {
		return false
	}
	p.begun, p.leaf, p.seen = true, leaf, int32(len(p.l.keepers))
	for i := range p.from {
		p.from[i] = p.seen
	}
	return true
}

// owners calls fn for each block that the version owns and that keepers see, with the range of these keepers
// and the block's share. first is the first keeper that sees the version.
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
		share, err := p.c.share(e)
		if err != nil {
			return err
		}
		fn(i, by, share)
	}
	return nil
}

// only returns how many bytes of the blocks that m refers to go with it: those of blocks that nothing else
// sees, except points that go with m.
func (c *usageScan) only(m pointRef) (n int64, err error) {
	for l, lost := range c.lost([]pointRef{m}) {
		if l == m.l {
			n += l.freed(lost)
			continue
		}
		k, err := c.seenBy(m, l, lost[0]) // the lost keeper of an origin is where the branch begins
		if err != nil {
			return 0, err
		}
		n += k
	}
	return n, nil
}

// seenBy returns the bytes of those blocks that only one keeper of an origin sees, and that m sees, too. Only
// m keeps that keeper alive.
func (c *usageScan) seenBy(m pointRef, l *branchRefs, only int32) (n int64, err error) {
	p := pass{c: c, l: l}
	var now format.Leaf
	known := false // now holds the present leaf
	err = c.history(l, func(v metadata.Version, lf *format.Leaf) error {
		if p.enter(v.Leaf) {
			known = false
		}
		var bad error
		err := p.owners(int32(l.search(v.Epoch)), lf, func(i int, by refRange, share int64) {
			if by != (refRange{only, only + 1}) || bad != nil {
				return
			}
			if !known {
				_, bad = c.merged(m.l, m.epoch, v.Leaf, &now)
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
func (c *usageScan) began(l *branchRefs, index uint32) (a amount, err error) {
	if l.origin == nil {
		return a, nil
	}
	found, err := c.merged(l.origin, l.OriginEpoch, index, &c.leaf)
	if err != nil || !found {
		return a, err
	}
	return c.amountOf(&c.leaf)
}

// merged reads a leaf as the branch, or else its origins, had it at an epoch. If none had it, the leaf is
// empty, and found is false.
func (c *usageScan) merged(l *branchRefs, asOf, index uint32, lf *format.Leaf) (found bool, err error) {
	for ; l != nil; l, asOf = l.origin, l.OriginEpoch {
		epoch, err := c.tx.Leaf(metadata.Version{Branch: l.ID, Leaf: index, Epoch: asOf}, lf)
		if err != nil || epoch != 0 {
			return err == nil, err
		}
	}
	*lf = format.Leaf{}
	return false, nil
}
