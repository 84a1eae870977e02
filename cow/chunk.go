package cow

import (
	"fmt"
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
	size       uint32 // of the file; how far end may go
	end        uint32 // end of the records
	live       uint32 // bytes that versions refer to
	pinnedDead uint32 // bytes that do not count as live, and that cleaning would not give back; as far as this process knows
	sealed     bool
	rowDirty   bool   // live, end or moved differ from the table's row
	reserved   bool   // made from the room that is kept for the cleaner and for events
	forEvents  bool   // of a reserved one: for events alone
	moved      uint32 // blocks that are alive, named by entries as here, and elsewhere: see forwards
	unmoved    bool   // the cleaner's last way through it moved nothing; guarded by Store.cleanMu
	damaged    bool   // the cleaner met a record that does not verify
	hasMoved   bool   // the table has a row of moved blocks
	dead       bool   // its row has gone, and its file goes
	gone       bool   // the file was removed, moved blocks keep the slot; set before anybody sees the chunk
	inTable    bool   // the table had a row of it at Open
	inSlot     bool   // it is in the slot table
	counted    counted

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

// die takes n bytes that lived. What is pinned dead goes with what lives, over which it is taken to be spread evenly. mu is
// held.
func (c *chunk) die(n uint32) {
	if c.pinnedDead > 0 && c.live > 0 {
		c.pinnedDead -= min(c.pinnedDead, uint32(uint64(c.pinnedDead)*uint64(n)/uint64(c.live)))
	}
	if c.live -= n; c.live == 0 {
		c.pinnedDead = 0
	}
}

func (c *chunk) release() {
	if c.refs.Add(-1) == 0 && c.file != nil {
		_ = c.file.Close() // nothing unsynced is left in it: the log holds a reference until then
	}
}

// handle opens the file at its first use: a store may have very many chunks. It has a descriptor only while it is used
// (docs/engine.md, Open files).
func (c *chunk) handle() (storage.File, error) {
	c.open.Lock()
	defer c.open.Unlock()
	if c.file == nil {
		f, err := c.fs.Open(c.name())
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", c.name(), lost(err))
		}
		c.file = f
	}
	return c.file, nil
}

func (c *chunk) row() format.Chunk {
	return format.Chunk{Slot: c.slot, Seq: c.seq, End: c.end, Live: c.live}
}
