package cow

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// chunk is one file of the log. The slot table holds one reference to it, and a read plan holds one as long
// as it may still touch the file. A chunk that has been removed stays readable until the last reference is
// dropped.
type chunk struct {
	slot uint32
	seq  uint64
	fs   storage.FS
	refs atomic.Int32

	open sync.Mutex // guards file while it is opened at its first use
	file storage.File

	// Guarded by Store.mu.
	size       uint32 // size of the file, which limits end
	end        uint32 // end of the records
	live       uint32 // bytes that versions refer to
	pinnedDead uint32 // not live, but not given back by cleaning, as far as this process knows
	sealed     bool
	rowDirty   bool   // live, end or moved differ from the row in the table
	reserved   bool   // made from the room that is kept for the cleaner and for events
	forEvents  bool   // only for events; set for reserved chunks only
	moved      uint32 // live blocks that entries still place here, but that were moved: see forwards
	unmoved    bool   // the cleaner's last pass over the chunk moved nothing; guarded by Store.cleanMu
	damaged    bool   // the cleaner met a record in it that does not verify
	hasMoved   bool   // the table has a row of blocks that were moved from it
	dead       bool   // its row is gone, and its file is to be removed
	gone       bool   // its file was removed; moved blocks keep the slot; set before others see the chunk
	inTable    bool   // the table had a row of it at Open
	inSlot     bool   // it is in the slot table
	counted    counted

	written  uint32 // end of the bytes that are in the file; guarded by recordLog.bufMu
	unsynced bool   // listed in recordLog.unsynced; guarded by recordLog.writeMu
	fileSize uint32 // size of the file when this process made it
	prepared uint32 // in such a file, the end of the blocks ever written; guarded by recordLog.writeMu
}

func newChunk(slot uint32, seq uint64, fs storage.FS) *chunk {
	c := &chunk{slot: slot, seq: seq, fs: fs}
	c.refs.Store(1)
	return c
}

func chunkName(slot uint32) string { return fmt.Sprintf("%08x", slot) }

func (c *chunk) name() string { return chunkName(c.slot) }

// acquire takes a reference. The caller already holds one, or holds a lock under which the slot table cannot
// drop its own.
func (c *chunk) acquire() { c.refs.Add(1) }

// tryAcquire takes a reference when the slot table may drop its own at the same time. It returns false if the
// last reference is gone.
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

// die takes n bytes off the live bytes. It takes pinnedDead to be spread evenly over the live bytes, and
// reduces it in proportion. The caller holds Store.mu.
func (c *chunk) die(n uint32) {
	if c.pinnedDead > 0 && c.live > 0 {
		c.pinnedDead -= min(c.pinnedDead, uint32(uint64(c.pinnedDead)*uint64(n)/uint64(c.live)))
	}
	if c.live -= n; c.live == 0 {
		c.pinnedDead = 0
	}
}

// release gives a reference back. The last one closes the file.
func (c *chunk) release() {
	if c.refs.Add(-1) == 0 && c.file != nil {
		_ = c.file.Close() // nothing unsynced is left in the file: the log holds a reference until then
	}
}

// handle returns the chunk's file, and opens it at its first use, because a store may have very many chunks.
// The file has a descriptor only while it is used (docs/engine.md, Open files). A missing file is an error
// that matches ErrCorrupt.
func (c *chunk) handle() (storage.File, error) {
	c.open.Lock()
	defer c.open.Unlock()
	if c.file == nil {
		f, err := c.fs.Open(c.name())
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", c.name(), fault.Lost(err))
		}
		c.file = f
	}
	return c.file, nil
}

func (c *chunk) row() format.Chunk {
	return format.Chunk{Slot: c.slot, Seq: c.seq, End: c.end, Live: c.live}
}
