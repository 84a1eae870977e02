package cow

import (
	"errors"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// errNothing is returned by a check of install if the record would change nothing.
var errNothing = errors.New("there is nothing to change")

// install is the commit point of every change of blocks, by writers and by the cleaner. In one critical section
// (invariant 1), it gives the record its sequence number and its place in the log, and changes the leaf of b's head
// that has all of the record's n blocks, to match.
//
// The caller holds mu. install may release mu while it waits for room in the log, for purpose p. From then on it does
// not: it calls check with the leaf locked, to decide by the present state whether to make the change; if check returns
// an error, install returns it. install returns errEvicted if the leaf is not in the cache, and errFull if the leaf may
// not become dirty now. After any error nothing has changed.
func (s *Store) install(b *branch, h *format.RecordHeader, payload []byte, n int, p wal.Purpose, waited bool, check func(*leafcache.Leaf) error) error {
	if err := s.wal.Reserve(h.Size(), p); err != nil {
		return err
	}
	l := s.cache.Lock(b.leaf(uint32(h.Block/format.LeafBlocks), head))
	defer l.Unlock()
	lf := l.Leaf()
	if lf == nil {
		return errEvicted
	}
	if err := check(lf); err != nil {
		return err
	}
	if !l.IsWritable(b.Epoch) && !s.mayDirty(waited, p) {
		return errFull
	}
	content, err := l.MakeWritable(b.Epoch)
	if err != nil {
		return err
	}
	b.written = b.Epoch
	first := int(h.Block % format.LeafBlocks)
	was := b.count.held(&content.Leaf, first, n)
	c, off := s.wal.Append(h, payload)
	if h.Kind == format.KindHole {
		s.applyHole(content, first, n)
	} else {
		s.applyData(content, h, c.Slot, off)
	}
	b.count.change(was, b.count.held(&content.Leaf, first, n))
	s.checkpointDue()
	return nil
}
