package cow

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// chunk is one file of the log. The slot table holds one reference; a read
// plan holds one while it may still touch the file; a chunk that is removed
// stays readable until the last is dropped.
type chunk struct {
	slot uint32
	seq  uint64
	fs   storage.FS
	refs atomic.Int32

	open sync.Mutex // guards file while it is opened at its first use
	file storage.File

	// Guarded by Store.mu.
	size     uint32 // of the file; how far end may go
	end      uint32 // end of the records
	live     uint32 // bytes that versions refer to
	stuck    uint32 // dead bytes of moved records that live in part, which moving them again would not give back; as far as this process knows
	sealed   bool
	rowDirty bool   // live, end or moved differ from the table's row
	reserved bool   // made from the room that is kept for the cleaner and for events
	moved    uint32 // blocks that are alive, named by entries as here, and elsewhere: see forwards
	unmoved  bool   // the cleaner's last way through it moved nothing; guarded by Store.cleanMu
	damaged  bool   // the cleaner met a record that does not verify
	hasMoved bool   // the table has a row of moved blocks
	dead     bool   // its row has gone, and its file goes
	gone     bool   // the file was removed, moved blocks keep the slot; set before anybody sees the chunk
	inTable  bool   // the table had a row of it at Open

	written  uint32 // end of what is in the file; guarded by recordLog.bufMu
	unsynced bool   // in recordLog.unsynced; guarded by recordLog.writeMu
	fileSize uint32 // of a chunk that this process made: as it was made
	prepared uint32 // of such a chunk: end of the blocks that were written at some time; guarded by recordLog.writeMu
}

func newChunk(slot uint32, seq uint64, fs storage.FS) *chunk {
	c := &chunk{slot: slot, seq: seq, fs: fs}
	c.refs.Store(1)
	return c
}

func chunkName(slot uint32) string { return fmt.Sprintf("%08x", slot) }

func (c *chunk) name() string { return chunkName(c.slot) }

// acquire takes a reference. The caller holds one already, or a lock under
// which the slot table's cannot be dropped.
func (c *chunk) acquire() { c.refs.Add(1) }

// tryAcquire takes a reference where the slot table's may be dropped meanwhile; false: it was.
func (c *chunk) tryAcquire() bool {
	for {
		n := c.refs.Load()
		if n == 0 {
			return false
		}
		if c.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// unstick takes bytes from stuck, some of which an earlier process may have counted.
func (c *chunk) unstick(n uint32) { c.stuck -= min(n, c.stuck) }

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 && c.file != nil {
		_ = c.file.Close() // nothing unsynced is left in it: the log holds a reference until then
	}
}

// handle opens the file at its first use: a store may have very many chunks.
func (c *chunk) handle() (storage.File, error) {
	c.open.Lock()
	defer c.open.Unlock()
	if c.file == nil {
		f, err := c.fs.Open(c.name())
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", c.name(), err)
		}
		c.file = f
	}
	return c.file, nil
}

func (c *chunk) row() format.Chunk {
	return format.Chunk{Slot: c.slot, Seq: c.seq, End: c.end, Live: c.live}
}

// slotTable maps slots to chunks. Changes happen under Store.mu; lookups need no lock.
type slotTable struct{ t atomic.Pointer[[]*chunk] }

func (s *slotTable) get(slot uint32) *chunk {
	t := s.t.Load()
	if t == nil || int(slot) >= len(*t) {
		return nil
	}
	return (*t)[slot]
}

// set replaces the whole table, since readers look at the old one meanwhile; it
// happens once a chunk.
func (s *slotTable) set(slot uint32, c *chunk) {
	var old []*chunk
	if t := s.t.Load(); t != nil {
		old = *t
	}
	t := make([]*chunk, max(len(old), int(slot)+1))
	copy(t, old)
	t[slot] = c
	s.t.Store(&t)
}

// putAll is put of many, on a table that nobody looks at yet.
func (s *slotTable) putAll(cs []*chunk) {
	var t []*chunk
	for _, c := range cs {
		if n := int(c.slot) + 1; n > len(t) {
			t = slices.Grow(t, n-len(t))[:n]
		}
		t[c.slot] = c
	}
	s.t.Store(&t)
}

func (s *slotTable) put(c *chunk)       { s.set(c.slot, c) }
func (s *slotTable) remove(slot uint32) { s.set(slot, nil) }

// all returns the chunks, by slot.
func (s *slotTable) all() []*chunk {
	t := s.t.Load()
	if t == nil {
		return nil
	}
	var cs []*chunk
	for _, c := range *t {
		if c != nil {
			cs = append(cs, c)
		}
	}
	return cs
}

// bytes is the size of all chunk files.
func (s *slotTable) bytes() (n int64) {
	for _, c := range s.all() {
		n += int64(c.size)
	}
	return n
}

// table is the chunks by slot; nil where there is none.
func (s *slotTable) table() []*chunk {
	if t := s.t.Load(); t != nil {
		return *t
	}
	return nil
}

func (s *slotTable) freeSlot() uint32 {
	t := s.t.Load()
	if t == nil {
		return 0
	}
	for i, c := range *t {
		if c == nil {
			return uint32(i)
		}
	}
	return uint32(len(*t))
}

func (s *slotTable) closeAll() error {
	var errs []error
	for _, c := range s.all() {
		if c.file != nil {
			errs = append(errs, c.file.Close())
		}
	}
	return errors.Join(errs...)
}
