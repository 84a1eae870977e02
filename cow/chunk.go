package cow

import (
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// chunk is a file of the log with the account of what is alive in it. The slot table holds one reference to the file,
// and a read plan holds one as long as it may still touch the file.
type chunk struct {
	*wal.Chunk

	// Guarded by Store.mu.
	live       uint32 // bytes that versions refer to
	pinnedDead uint32 // not live, but not given back by cleaning, as far as this process knows
	rowDirty   bool   // live, end or moved differ from the row in the table
	moved      uint32 // live blocks that entries still place here, but that were moved: see forwards
	unmoved    bool   // the cleaner's last pass over the chunk moved nothing; guarded by Store.cleaner.mu
	damaged    bool   // the cleaner met a record in it that does not verify
	hasMoved   bool   // the table has a row of blocks that were moved from it
	dead       bool   // its row is gone, and its file is to be removed
	kept       bool   // nothing in it is alive, but its moved records may be found nowhere else: see keepUnproven
	gone       bool   // its file was removed; moved blocks keep the slot; set before others see the chunk
	inTable    bool   // the table had a row of it at Open
	inSlot     bool   // it is in the slot table
	counted    counted
}

func newChunk(slot uint32, seq uint64, fs storage.FS) *chunk {
	return &chunk{Chunk: wal.NewChunk(slot, seq, fs)}
}

// die takes n bytes off the live bytes. It takes pinnedDead to be spread evenly over the live bytes, and reduces it in
// proportion. The caller holds Store.mu.
func (c *chunk) die(n uint32) {
	if c.pinnedDead > 0 && c.live > 0 {
		c.pinnedDead -= min(c.pinnedDead, uint32(uint64(c.pinnedDead)*uint64(n)/uint64(c.live)))
	}
	if c.live -= n; c.live == 0 {
		c.pinnedDead = 0
	}
}

func (c *chunk) row() format.Chunk {
	return format.Chunk{Slot: c.Slot, Seq: c.Seq, End: c.End, Live: c.live}
}
