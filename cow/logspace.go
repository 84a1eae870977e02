package cow

import (
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// logSpace is the store as the log sees it: the account of chunks and of the room for them.
type logSpace struct{ s *Store }

func (l logSpace) FreeSlot() (slot uint32, ok bool) { return l.s.slots.freeSlot() }
func (l logSpace) FreeSlots() int                   { return format.MaxSlots - l.s.slots.taken }
func (l logSpace) Used() int64                      { return l.s.slots.files }
func (l logSpace) Held() int64                      { return l.s.kept() }
func (l logSpace) ForCleaner() int64                { return l.s.workKept() }
func (l logSpace) Add(c *wal.Chunk)                 { l.s.slots.put(&chunk{Chunk: c}) }
func (l logSpace) Drop(slot uint32)                 { l.s.slots.remove(slot) }
func (l logSpace) Changed(c *wal.Chunk)             { l.s.slots.recount(l.s.slots.get(c.Slot)) }
func (l logSpace) Freed(n int64)                    { l.s.slots.removed += n }

// Rotated notes that there was room, and that whatever filled the last chunk may have overwritten something, which can
// be cleaned.
func (l logSpace) Rotated(p wal.Purpose) {
	l.s.cleaner.exhausted = false
	if p == wal.ForData {
		l.s.cleaner.roomTaken++
	}
	wal.Poke(l.s.cleaner.work)
}

// NeedRoom wakes the cleaner for a writer that finds no room. It returns false if the cleaner can give none.
func (l logSpace) NeedRoom() bool {
	s := l.s
	if s.cleaner.exhausted || s.closed || s.opts.checkpointInterval < 0 {
		return false
	}
	s.cleaner.writersWaiting = true
	wal.Poke(s.cleaner.work)
	return true
}

// isIn reports whether a chunk file has its slot still. The caller holds mu.
func (s *Store) isIn(f *wal.Chunk) bool {
	c := s.slots.get(f.Slot)
	return c != nil && c.Chunk == f
}
