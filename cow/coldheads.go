package cow

import (
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// The part of a cold pass for blocks that only the heads of volumes have. They are written again, by compare and swap.

// coldUnit is a run of a leaf's own blocks, as the pass will write it.
type coldUnit struct {
	first, n int
	h        format.RecordHeader
	payload  []byte
}

// runs calls fn for each run of a leaf's own blocks that can be one unit.
func runs(l *format.Leaf, fn func(first, n int)) {
	own := func(i int) bool { return l.IsChanged(i) && !l.Entries[i].IsHole() }
	for i := 0; i < format.LeafBlocks; {
		n := 0
		for i+n < format.LeafBlocks && own(i+n) && (n == 0 || (i+n)%format.UnitBlocks != 0) {
			n++
		}
		if n > 0 {
			fn(i, n)
		}
		i += max(n, 1)
	}
}

// isOptimal reports whether every run of a leaf is a record that only the cold pass writes.
func isOptimal(l *format.Leaf) bool {
	ok := true
	runs(l, func(first, n int) {
		e := l.Entries[first]
		ok = ok && n > hotBlocks && e.Blocks() == n && e.Index() == 0
		for i := 1; ok && i < n; i++ {
			ok = l.Entries[first+i] == e.WithIndex(i)
		}
	})
	return ok
}

// head rewrites those blocks of a leaf that only the head of a volume has, if that gains.
func (p *coldPass) head(b *branch, index uint32) error {
	if p.next == 0 { // otherwise go on with what was read before
		if err := p.prepare(b, index); err != nil || len(p.units) == 0 {
			return err
		}
	}
	return p.rewrite()
}

// prepare makes the units as which a head's leaf is to be rewritten. It makes none if rewriting gains nothing.
func (p *coldPass) prepare(b *branch, index uint32) error {
	p.units, p.next = p.units[:0], 0
	pool := p.s.codecOf(b.ID)
	if pool == nil {
		return nil // its volume has been deleted
	}
	if pool.codec == format.S2 || pool.codec == format.Zstd && pool.level < p.zstd.level {
		pool = p.zstd
	}
	was, places, err := p.read(b, index)
	if err != nil || len(p.units) == 0 {
		return err
	}
	is := 0
	c := pool.get()
	defer pool.put(c)
	p.comp = p.comp[:0]
	for i := range p.units {
		u := &p.units[i]
		room := p.comp[len(p.comp):]
		out, codec := c.Compress(room, p.data[u.first*format.BlockSize:][:u.n*format.BlockSize])
		if codec == format.Zstd {
			// Prefer S2 if it is about as small, because it reads faster.
			if alt, as := p.quick.Compress(p.alt, p.data[u.first*format.BlockSize:][:u.n*format.BlockSize]); as == format.S2 &&
				len(alt) <= len(out)+len(out)/coldGain {
				out, codec = append(out[:0], alt...), as
			}
		}
		if codec != format.Raw && cap(room) >= len(out) {
			p.comp = p.comp[:len(p.comp)+len(out)]
		}
		u.payload = out
		u.h = format.RecordHeader{
			Block: uint64(index)*format.LeafBlocks + uint64(u.first), Branch: b.ID, Kind: format.KindData,
			Codec: codec, Blocks: u.n, PayloadLen: len(out), PayloadCRC: format.Checksum(out),
		}
		is += u.h.Size()
	}
	if was-is < was/coldGain+1 && places < coldPlaces*len(p.units) {
		p.units = p.units[:0]
	}
	p.was, p.is = was, is
	return nil
}

// rewrite writes the units in the place of the blocks that they were read from, unless those have changed. After an
// error, calling it again goes on with the next unit: a partly rewritten leaf is not cold any more, and would not be
// read again.
func (p *coldPass) rewrite() error {
	for ; p.next < len(p.units); p.next++ {
		u := &p.units[p.next]
		_, err := p.s.putMoved(&u.h, u.payload, func(lf *leafcache.Leaf) bool { return p.unchanged(lf, u) })
		if errors.Is(err, errChanged) {
			continue // it was written meanwhile, so it is not cold
		}
		if err != nil {
			return err
		}
	}
	p.next = 0
	p.report.Leaves++
	p.report.Before += int64(p.was)
	p.report.Written += int64(p.is)
	return nil
}

// unchanged reports whether a leaf still has the blocks that were read for u. The caller holds Store.mu and the leaf's
// lock.
func (p *coldPass) unchanged(lf *leafcache.Leaf, u *coldUnit) bool {
	for i := u.first; i < u.first+u.n; i++ {
		e := p.leaf.Entries[i]
		if !lf.IsChanged(i) || lf.Entry(i) != e || p.s.slots.get(e.Slot()) != p.chunks[i] {
			return false
		}
	}
	return true
}

// read reads a head's own blocks of a leaf, and cuts them into units. It makes no units if the leaf is not cold. It
// returns the stored size of the blocks, and in how many places of the log they lie.
func (p *coldPass) read(b *branch, index uint32) (size, places int, err error) {
	s := p.s
	s.mu.Lock()
	epoch, here := b.Epoch, s.catalog.branches[b.ID] == b && b.volume != nil
	s.mu.Unlock()
	if !here {
		return 0, 0, nil
	}
	p.plan.begin(&Device{s: s, ref: Ref{Volume: fmt.Sprint("branch ", b.ID)}, b: b, asOf: head})
	var bad error
	err = s.cache.View(b.leaf(index, head), func(lf *leafcache.Leaf) {
		lf.CopyTo(&p.leaf)
		if lf.Epoch() != epoch || !p.isCold(&p.leaf, true) || isOptimal(&p.leaf) {
			return
		}
		runs(&p.leaf, func(first, n int) {
			p.units = append(p.units, coldUnit{first: first, n: n})
			bad = errors.Join(bad, p.plan.plan(lf, p.data[first*format.BlockSize:][:n*format.BlockSize],
				int64(index)*leafSize+int64(first)*format.BlockSize))
		})
		for i, e := range p.leaf.Entries {
			p.chunks[i] = s.slots.get(e.Slot())
		}
	})
	if err := errors.Join(err, bad); err != nil {
		p.plan.release()
		return 0, 0, err
	}
	if err := p.plan.locate(); err != nil {
		p.plan.release()
		return 0, 0, err
	}
	if err := fault.AsCorrupt(p.plan.Fetch()); err != nil {
		return 0, 0, err
	}
	p.keepSolid()
	size, places = p.layout()
	return size, places, nil
}

// layout returns the stored size of the units' blocks, and in how many places of the log they lie.
func (p *coldPass) layout() (size, places int) {
	var last format.Entry
	for _, u := range p.units {
		for _, e := range p.leaf.Entries[u.first : u.first+u.n] {
			size += int(e.Share())
			if e.SameRecord(last) {
				continue
			}
			if last == 0 || e.Slot() != last.Slot() || e.Offset() != last.Offset()+uint32(last.Size()) {
				places++
			}
			last = e
		}
	}
	return size, places
}
