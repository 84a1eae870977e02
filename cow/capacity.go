package cow

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
)

// Overwriting a block that only the head of a volume has gives back what it takes, once the old record is cleaned. So
// overwrites can go on in a full store, if new mappings stop while the cleaner still finds enough dead data:
// docs/reclaim.md, New mappings stop first.

const (
	// newParts is the part of the capacity, in 64ths, that new mappings leave to overwrites; smallParts is what small
	// requests leave. The metadata of a file system comes in small requests, and a file system that cannot write its
	// metadata breaks.
	newParts, smallParts = 7, 5
	// smallWrite is the largest request that counts as small.
	smallWrite = 64 << 10
	// namesLeave is what a new name leaves to new mappings, because everything that is overwritten after a snapshot
	// is a new mapping.
	namesLeave = 1 << 20
	// endChunks are chunks for the log's end, beside the cleaner's room.
	endChunks = 2
)

// isNew reports whether a write of n blocks maps a block that is a hole, or that a snapshot has, too. The caller holds
// the leaf's lock.
func isNew(b *branch, lf *leafcache.Leaf, first, n int) bool {
	if lf.Epoch() != b.Epoch {
		return true
	}
	for i := first; i < first+n; i++ {
		if !lf.IsChanged(i) || lf.Entry(i).IsHole() {
			return true
		}
	}
	return false
}

// roomForNew returns an error, which matches ErrNoSpace and errNoNew, if a new mapping of n bytes of log would take
// what is kept for overwrites. The caller holds mu.
func (s *Store) roomForNew(n int, small bool) error {
	parts := int64(newParts)
	if small {
		parts = smallParts
	}
	return s.roomBelow(n, s.mostNew(parts), s.opts.Reserve)
}

// roomForNames is roomForNew for an event that makes names. The caller holds mu.
func (s *Store) roomForNames() error { return s.roomBelow(namesLeave, s.mostNamed(newParts), 0) }

// roomBelow is roomForNew, where most is what may be stored, less a reserve. The caller holds mu.
func (s *Store) roomBelow(n int, most, reserve int64) error {
	capacity, live := s.wal.Capacity(), s.liveNow()
	s.lookAtFill(live + int64(n))
	if capacity == 0 || s.opts.takeAll || live+int64(n) <= most {
		return nil
	}
	bound, way := "there is room for", "free space on the store's file system"
	if capacity == s.wal.Limit {
		bound, way = "the store's limit is", "raise it"
	}
	if reserve > 0 {
		way += ", lower the reserve"
	}
	return fmt.Errorf("%w: %d MiB are stored, %s %d MiB, and %d of these are %w; %s, or delete snapshots or volumes",
		fault.NoSpace(syscall.ENOSPC), live>>20, bound, capacity>>20, (capacity-most)>>20, errNoNew, way)
}

// errNoNew is matched by the error of a refused new mapping.
var errNoNew = errors.New("kept for what is written over")

// moreForNew reports whether there may be room by now for a new mapping that was refused. With tries 0, which is the
// first call, it looks at the free space again, as some may have been freed on the file system. Later it makes a
// checkpoint, if that may reap what deleted names held.
func (s *Store) moreForNew(tries int) (bool, error) {
	if tries == 0 {
		free, err := s.fs.Free()
		if err != nil {
			return false, fmt.Errorf("free space of the store: %w", err)
		}
		kept := s.kept()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wal.NoteCapacity(free, kept, s.slots.files)
		return true, nil
	}
	s.mu.Lock()
	gen, more := s.changes.gen, s.awaitsReaper()
	s.mu.Unlock()
	if !more {
		return false, nil
	}
	return true, s.checkpointOf(gen)
}
