package cow

import (
	"errors"

	"github.com/vdisk/vdisk/format"
)

// errNothing is returned by a check of install for a record that would change nothing.
var errNothing = errors.New("there is nothing to change")

// install is the commit point of every change of blocks, by writers and by the cleaner: the record gets its number and
// its place in the log, and the leaf k, which has all of its n blocks, says so, in one critical section (invariant 1).
// mu is held, room for the record is reserved for the purpose p, and neither lock was given up since. check decides by
// the leaf as it is whether the change is still to be made; it is called with the leaf locked, and its error is
// install's. A leaf that is not in the cache is errEvicted, and one that may not become dirty now errFull: nothing has
// happened then.
func (s *Store) install(k leafKey, h *format.RecordHeader, payload []byte, n int, p purpose, waited bool, check func(*leaf) error) error {
	lf, sh := s.cache.lock(k)
	if lf == nil {
		return errEvicted
	}
	defer sh.mu.Unlock()
	if err := check(lf); err != nil {
		return err
	}
	if !s.isWritable(k.b, lf) && !s.mayDirty(waited, p) {
		return errFull
	}
	o, err := s.makeWritable(k, sh)
	if err != nil {
		return err
	}
	c, off := s.wal.append(h, payload)
	if h.Kind == format.KindHole {
		s.applyHole(o, int(h.Block%format.LeafBlocks), n)
	} else {
		s.applyData(o, h, c, off)
	}
	s.checkpointDue()
	return nil
}
