package cow

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Room for the table: docs/reclaim.md, The table. What the next commits may take is counted before anything changes
// that they have to write, and the table's file already has the blocks by then.

const (
	// leafNeed bounds what a commit takes for one leaf: three pages for its value and for pages that it splits, one for
	// the list of changes, and one above each of the two.
	leafNeed = 6 << 12
	// leafGrowth bounds what one leaf adds to a table that is written whole: value and change, in pages half full.
	leafGrowth = 8 << 10
	// rowNeed bounds what a commit takes for rows of volumes, snapshots, branches and chunks, for each version that the
	// reaper may reap.
	rowNeed = 8 << 10
	// growMost is the most that the table's file grows by at once, if no more is needed.
	growMost = 16 << 20
)

// tableShort returns how many bytes the table's file lacks for the next commits: for all that is dirty, for n leaves
// more, and for what is kept from purpose p. Room for a batch of the reaper is kept from all purposes. The file is
// large enough if the result is not positive. The caller holds mu.
func (s *Store) tableShort(n int, p wal.Purpose) int64 {
	free, used := s.meta.Room()
	rows := len(s.catalog.dirtyVolumes) + len(s.catalog.dirtySnapshots) + len(s.catalog.dirtyBranches)
	leaves := int64(s.cache.Unwritten() + s.checkpoints.writing + len(s.changes.dropping) + len(s.changes.regions) + s.checkpoints.writingRegions + rows/4 + n)
	need := min(leaves*leafNeed, used+leaves*leafGrowth)
	batch := int64(s.opts.reapBatch)
	need += batch*(leafNeed+rowNeed) + (free+used)/512 // the last term is the list of free pages
	if p == wal.ForData {
		need += batch / 2 * leafNeed // for discards and the cleaner
	}
	return need - free
}

// growTable makes the table's file n bytes larger, or somewhat more, if that leaves free what purpose p may not use.
// Otherwise it returns ErrNoSpace. The table is as it was after any error.
func (s *Store) growTable(n int64, p wal.Purpose) error {
	free, err := s.fs.Free()
	if err != nil {
		return fmt.Errorf("free space of the store: %w", err)
	}
	room := free
	if p == wal.ForData {
		room = min(room, free+s.reserve.Bytes()-wal.Spare)
	}
	_, used := s.meta.Room()
	for _, step := range []int64{max(n, min(max(used/16, int64(s.opts.reapBatch)*rowNeed), growMost)), n} {
		if step > room {
			continue
		}
		if err = s.meta.Grow(step); err == nil {
			return nil
		}
	}
	full := syscall.ENOSPC
	switch {
	case err != nil && !metadata.IsFull(err):
		return fmt.Errorf("room for the table of blocks: %w", err)
	case errors.Is(err, syscall.EDQUOT):
		full = syscall.EDQUOT
	}
	return fmt.Errorf("%w: the table of blocks needs %d KiB more, and %d MiB are free on the store's file system; free space there, or delete snapshots or volumes",
		fault.NoSpace(full), n>>10, free>>20)
}

// allocateTable allocates blocks for the table's file, from one offset to another.
func (s *Store) allocateTable(f *os.File, from, to int64) error {
	if err := s.opts.growTable(to - from); err != nil {
		return err
	}
	return metadata.Allocate(f, from, to)
}

// purposeOf returns how far an event may use the space that is kept free. An event that makes a name, or may make a row
// larger, counts as data; all others give room back, or take next to none.
func purposeOf(ev *format.Event) wal.Purpose {
	switch ev.Op {
	case "create", "snapshot", "clone", "receive", "mark", "received", "hold", "set":
		return wal.ForData
	}
	return wal.ForEvents
}

// Room returns how many bytes of records fit into the store as it is, without cleaning. It is an error to ask a store
// that can only be read, for which Open sets no size of chunks.
func (s *Store) Room() (int64, error) {
	if err := s.beginTask(); err != nil {
		return 0, err
	}
	defer s.tasks.Done()
	if s.readOnly != nil {
		return 0, s.readOnly
	}
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

// kept returns how much of the space that has to stay free the store holds already: the reserve, and the free pages of
// the table. The pages count up to half of spare.
func (s *Store) kept() int64 {
	free, _ := s.meta.Room()
	return s.reserve.Bytes() + min(free, wal.Spare/2)
}

// lowDisk reports whether less is free on the file system than has to stay free. Then nothing is kept for reuse.
func (s *Store) lowDisk() bool { return s.lowDiskWith(0) }

// lowDiskWith is lowDisk for when n more bytes are taken.
func (s *Store) lowDiskWith(n int64) bool {
	free, err := s.fs.Free()
	kept := s.kept()
	s.mu.Lock()
	defer s.mu.Unlock()
	return err == nil && free-n+kept < wal.Spare+s.wal.ChunkBytes+s.workRoom()
}

// fillReserve fills the reserve up. It only logs an error, because nothing depends on it.
func (s *Store) fillReserve() {
	if err := s.reserve.Fill(s.used(true)); err != nil {
		s.log.Warn("no blocks can be kept for when the file system is full", "err", err)
	}
}

// makeElbowRoom frees some of the reserve if the file system is full, because an owner writes small files.
func (s *Store) makeElbowRoom() {
	if free, err := s.fs.Free(); err == nil && free < wal.ElbowRoom {
		s.reserve.Give(2 * wal.ElbowRoom)
	}
}
