package cow

import (
	"errors"
	"fmt"
	"syscall"
)

// Writing over what only the head of a volume has gives back what it takes, once it is cleaned. So it goes on at a full
// store, if new mappings stop where the cleaner still finds enough that is dead: docs/reclaim.md, Cleaning.

const (
	// newParts is the part of the capacity, in 64ths, that new mappings leave to what is written over, and smallParts what
	// small ones leave: the metadata of a file system, which ends if it cannot write it, comes in small requests.
	newParts, smallParts = 7, 5
	// smallWrite is the largest request that is small.
	smallWrite = 64 << 10
	// roomForNames is what a new name leaves to new mappings: all that is written over after a snapshot is new.
	roomForNames = 1 << 20
	// endChunks are for the log's end, beside what the cleaner works in.
	endChunks = 2
)

// isNew reports whether a write of n blocks maps any that the head alone does not have: a hole, or one that a snapshot
// has, too. The leaf is locked.
func isNew(b *branch, lf *leaf, first, n int) bool {
	if lf.epoch != b.Epoch {
		return true
	}
	for i := first; i < first+n; i++ {
		if !lf.isChanged(i) || lf.entry(i).IsHole() {
			return true
		}
	}
	return false
}

// roomForNew refuses a new mapping of n bytes of log that would take what is kept for writing over. mu is held.
func (s *Store) roomForNew(n int, small bool) error {
	capacity, parts := s.wal.capacity, int64(newParts)
	if small {
		parts = smallParts
	}
	live := s.slots.live
	if c := s.wal.current; c != nil {
		live += int64(c.live)
	}
	most := max(0, capacity-capacity*parts/64-endChunks*s.wal.chunkBytes-s.workRoom())
	if capacity == 0 || s.opts.takeAll || live+int64(n) <= most {
		return nil
	}
	bound, way := "there is room for", "free space on the store's file system"
	if capacity == s.wal.limit {
		bound, way = "the store's limit is", "raise it"
	}
	return fmt.Errorf("%w: %d MiB are stored, %s %d MiB, and %d of these are %w; %s, or delete snapshots or volumes",
		noSpace(syscall.ENOSPC), live>>20, bound, capacity>>20, (capacity-most)>>20, errNoNew, way)
}

// noteCapacity notes how much the chunk files can take together, of which used are taken. mu is held.
func (l *recordLog) noteCapacity(free, kept, used int64) {
	l.capacity = used + max(0, min(free, free+kept-spare))
	if l.limit > 0 {
		l.capacity = min(l.capacity, l.limit)
	}
}

// errNoNew is matched by the refusal of a new mapping.
var errNoNew = errors.New("kept for what is written over")

// moreForNew reports whether there may be room for a new mapping that was refused: somebody has freed space on the file
// system, or names have gone, and a checkpoint may reap what they held. It is asked for the first time with tries 0.
func (s *Store) moreForNew(tries int) (bool, error) {
	if tries == 0 {
		free, err := s.fs.Free()
		if err != nil {
			return false, fmt.Errorf("free space of the store: %w", err)
		}
		kept := s.kept()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.wal.noteCapacity(free, kept, s.slots.files)
		return true, nil
	}
	s.mu.Lock()
	gen, more := s.gen, s.awaitsReaper()
	s.mu.Unlock()
	if !more {
		return false, nil
	}
	return true, s.checkpointOf(gen)
}
