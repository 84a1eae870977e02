package cow

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// The cleaner: docs/reclaim.md, Cleaning. It copies the live data of a chunk to the end of the log. A checkpoint then
// removes the chunk like any other dead one. Blocks that only a volume's head has are written again, by compare and
// swap on their entries; records that snapshots hold are moved and forwarded.

const (
	// cleanBatch is how many bytes the cleaner moves before it lets checkpoints and other work run.
	cleanBatch = 256 << 10
	// worthwhile is the part of a chunk that must be dead for cleaning to gain anything.
	worthwhile = 0.05
	// quickWaste is the part of a chunk that must be dead for it to be cleaned before a larger chunk, which takes long.
	quickWaste = 0.25
	// slack and slackBytes bound the dead data on a disk that has room: cleaning starts when dead data exceeds slack of
	// the live data plus slackBytes.
	slack      = 0.4
	slackBytes = 256 << 20
	// ahead is for how many chunks the cleaner tries to keep room.
	ahead = 7
)

// cleaner is the state of the cleaner. mu is held while one chunk is cleaned; it is taken before checkpoints.mu.
type cleaner struct {
	mu         lockorder.Mutex[lockorder.Cleaner]
	mover      *mover
	othersSeen uint64 // bytes that others had appended when giveWay last looked

	// Guarded by Store.mu.
	moved          uint64 // bytes that the cleaner appended
	chunks         uint64 // chunks that were cleaned
	chunk          *chunk // being cleaned
	movedBefore    uint64 // value of moved when this chunk was begun
	writersWaiting bool   // writers wait for the cleaner
	exhausted      bool   // it can give nothing back as things are
	roomTaken      uint64 // number of chunks that were given to data
	pinnedStale    bool   // names were reaped since chunk.pinnedDead was counted

	work  chan struct{} // a value means that there is work
	pacer pacer         // paces what others append while the cleaner is pressed
}

// CleanReport says what Clean did.
type CleanReport struct {
	Chunks int   `json:"chunks"`      // chunks cleaned
	Moved  int64 `json:"moved_bytes"` // bytes of records written again
	// Freed is the bytes in dead chunks whose files were removed, or reused for new chunks, while Clean ran, less
	// Moved; at least 0. What others write meanwhile is not counted. What they overwrite is counted, because the chunks
	// that die of it are removed as well.
	Freed int64 `json:"freed_bytes"`
}

// Clean gives back the space of data that was overwritten, discarded or deleted. It cleans every chunk that existed
// when cleaning began, if the dead part of the chunk is at least waste (0.05 to 1). It returns when that is done, or
// when ctx ends.
func (s *Store) Clean(ctx context.Context, waste float64) (CleanReport, error) {
	var rep CleanReport
	if err := s.beginTask(); err != nil {
		return rep, fmt.Errorf("clean: %w", err)
	}
	defer s.tasks.Done()
	before := s.removedBytes()
	freed := func() CleanReport {
		if _, err := s.wal.Pool.Empty(); err != nil {
			s.log.Error("files of dead chunks stay", "err", err)
		}
		rep.Freed = max(0, s.removedBytes()-before-rep.Moved)
		return rep
	}
	// Deleted data comes first: it needs no copying.
	if err := s.reclaimDeleted(ctx); err != nil {
		return freed(), fmt.Errorf("clean: %w", err)
	}
	s.unpin()
	for limit := s.end().ChunkSeq; ; {
		r, err := s.cleanOne(ctx, max(waste, worthwhile), limit, nil)
		rep.Moved += r.Moved
		rep.Chunks += r.Chunks
		if err == nil && r.Chunks > 0 {
			err = s.Checkpoint()
		}
		if r.Chunks == 0 || err != nil {
			return freed(), wrapIf(err, "clean")
		}
	}
}

// removedBytes returns how many bytes were in the dead chunks whose files were removed or reused for new chunks.
func (s *Store) removedBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.slots.removed
}

// unpin resets pinnedDead in all chunks if names have been reaped since it was counted (pinnedStale): the head may have
// become the owner of records that are partly dead, and the cleaner writes only the live blocks of a head's record.
func (s *Store) unpin() {
	s.mu.Lock()
	stale := s.cleaner.pinnedStale
	s.cleaner.pinnedStale = false
	s.mu.Unlock()
	if !stale {
		return
	}
	for n := range s.slots.pages { // one lock a page: there may be very many chunks, and others wait for mu
		s.mu.Lock()
		s.slots.page(n, func(c *chunk) {
			c.pinnedDead = 0
			s.slots.recount(c)
		})
		s.mu.Unlock()
	}
}

// reclaimDeleted makes checkpoints until the table knows everything that is dead: all that was written lies before the
// replay position, and everything deleted is reaped.
func (s *Store) reclaimDeleted(ctx context.Context) error {
	for {
		if err := errors.Join(s.Checkpoint(), context.Cause(ctx)); err != nil {
			return err
		}
		if !s.reapsMore() {
			return nil
		}
	}
}

// all, as a limit for sequence numbers, includes every chunk.
const all = ^uint64(0)

// cleanOne cleans the most promising of the chunks with sequence numbers below limit. If there is none, the report
// counts no chunk. If there are some but no room to clean any, it returns ErrNoSpace. pause, which may be nil, is
// called between batches with the time that the last batch took.
func (s *Store) cleanOne(ctx context.Context, waste float64, limit uint64, pause func(time.Duration) error) (r CleanReport, err error) {
	s.cleaner.mu.Lock()
	defer s.cleaner.mu.Unlock()
	c, err := s.victim(waste, limit)
	if c == nil {
		return r, err
	}
	defer c.Release()
	r.Chunks = 1
	r.Moved, err = s.cleanChunk(ctx, c, pause)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.cleaner.chunks++
	}
	if c.live == 0 {
		r.Freed = int64(c.End)
	}
	return r, err
}

// victim chooses the chunk that is best to clean, of those that there is room to clean, and takes a reference. At least
// the part waste of it is dead. While writers wait, or while the reaper may give back data that would be copied, a
// chunk with more live data than a new one holds is chosen only if no other chunk gives something back soon. victim
// returns nil if there is no such chunk, and ErrNoSpace if there are some but no room to clean any.
func (s *Store) victim(waste float64, limit uint64) (*chunk, error) {
	free, err := s.fs.Free()
	if err != nil {
		return nil, fmt.Errorf("free space of the store: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	room := s.workable(free)
	var c *chunk
	var tooLarge bool
	if s.slots.mostLive() > s.wal.ChunkBytes && (s.cleaner.writersWaiting || s.awaitsReaper()) {
		c, _ = s.slots.dirtiest(max(waste, quickWaste), limit, s.wal.NextChunk(), min(room, s.wal.ChunkBytes))
	}
	if c == nil {
		c, tooLarge = s.slots.dirtiest(waste, limit, s.wal.NextChunk(), room)
	}
	switch {
	case c != nil:
		c.Acquire()
	case tooLarge:
		return nil, noWorkRoom(room)
	}
	return c, nil
}

// cleanChunk moves the live data of c, and returns how many bytes it wrote. The caller holds cleaner.mu.
func (s *Store) cleanChunk(ctx context.Context, c *chunk, pause func(time.Duration) error) (moved int64, err error) {
	if s.cleaner.mover == nil {
		s.cleaner.mover = newMover(s)
	}
	m := s.cleaner.mover
	if err := m.begin(c); err != nil {
		return 0, err
	}
	s.setCleaning(c)
	defer s.setCleaning(nil)
	for more := true; more; {
		if err := errors.Join(context.Cause(ctx), s.live()); err != nil {
			return moved, err
		}
		start := time.Now()
		var n int
		if n, more, err = m.batch(); err != nil {
			return moved, err
		}
		moved += int64(n)
		if m.full {
			if err := s.roomToMove(); err != nil {
				return moved, err
			}
		}
		if pause != nil && more {
			if err := pause(time.Since(start)); err != nil {
				return moved, err
			}
		}
	}
	if moved == 0 && c.unmoved {
		s.markUncleanable(c)
	}
	c.unmoved = moved == 0
	return moved, nil
}

// setCleaning notes which chunk is being cleaned; nil means none.
func (s *Store) setCleaning(c *chunk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleaner.chunk, s.cleaner.movedBefore = c, s.cleaner.moved
}

// roomToMove makes room for what the cleaner dirties: it makes a checkpoint, and makes room in the table.
func (s *Store) roomToMove() error {
	if err := s.checkpoint(); err != nil {
		return err
	}
	return s.growToMove()
}

// growToMove makes room in the table only.
func (s *Store) growToMove() error {
	s.mu.Lock()
	short := s.tableShort(1, wal.ForMoves)
	s.mu.Unlock()
	if short <= 0 {
		return nil
	}
	return s.growTable(short, wal.ForMoves)
}

// markUncleanable notes that the live data of a chunk cannot be moved. Otherwise the chunk would be chosen again and
// again.
func (s *Store) markUncleanable(c *chunk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.pinnedDead = c.End - format.ChunkHeaderSize - min(c.live, c.End-format.ChunkHeaderSize)
	s.slots.recount(c)
}
