package wal

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// Chunk is one file of the log. The store, in its account of chunks, holds one reference to it, and a reader holds one
// as long as it may still touch the file. A chunk file that has been removed stays readable until the last reference is
// dropped.
type Chunk struct {
	Slot uint32
	Seq  uint64
	fs   storage.FS
	refs atomic.Int32

	open sync.Mutex // guards file while it is opened at its first use
	file storage.File

	// Guarded by mu, the lock that orders changes of the store.
	Size      uint32 // size of the file, which limits end
	End       uint32 // end of the records
	Sealed    bool   // no record is added any more
	Reserved  bool   // made from the room that is kept for the cleaner and for events
	ForEvents bool   // only for events; set for reserved chunks only

	written  uint32 // end of the bytes that are in the file; guarded by Log.bufMu
	unsynced bool   // listed in Log.unsynced; guarded by Log.writeMu
	fileSize uint32 // size of the file when this process made it
	prepared uint32 // in such a file, the end of the blocks ever written; guarded by Log.writeMu
}

// NewChunk returns a chunk whose file has not been looked at, with one reference.
func NewChunk(slot uint32, seq uint64, fs storage.FS) *Chunk {
	c := &Chunk{Slot: slot, Seq: seq, fs: fs}
	c.refs.Store(1)
	return c
}

// FoundChunk returns a chunk that was there when the store was opened, and whose records end at end.
func FoundChunk(slot uint32, seq uint64, end uint32, fs storage.FS) *Chunk {
	c := NewChunk(slot, seq, fs)
	c.Size, c.End, c.written, c.Sealed = end, end, end, true
	return c
}

// ChunkName returns the name of the chunk file in a slot.
func ChunkName(slot uint32) string { return fmt.Sprintf("%08x", slot) }

// ParseChunkName returns the slot of the chunk file called name. ok is false if that is not the name of a chunk file.
func ParseChunkName(name string) (slot uint32, ok bool) {
	n, err := strconv.ParseUint(name, 16, 32)
	return uint32(n), err == nil && n < format.MaxSlots && ChunkName(uint32(n)) == name
}

// Name returns the name of the chunk's file.
func (c *Chunk) Name() string { return ChunkName(c.Slot) }

// Acquire takes a reference. The caller already holds one, or holds a lock under which the store cannot drop its own.
func (c *Chunk) Acquire() { c.refs.Add(1) }

// TryAcquire takes a reference when the store may drop its own at the same time. It returns false if the last reference
// is gone.
func (c *Chunk) TryAcquire() bool {
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

// InUse reports whether there is another reference than the store's.
func (c *Chunk) InUse() bool { return c.refs.Load() > 1 }

// Close closes the file, whatever references there are.
func (c *Chunk) Close() error {
	if c.file == nil {
		return nil
	}
	return c.file.Close()
}

// give hands over the file, which from then on is another chunk's to close. Nobody has a reference.
func (c *Chunk) give() storage.File {
	c.open.Lock()
	defer c.open.Unlock()
	f := c.file
	c.file = nil
	return f
}

// Truncate gives back what is allocated behind offset size. The caller holds a reference, and the file was opened.
func (c *Chunk) Truncate(size uint32) error { return c.file.Truncate(int64(size)) }

// InFile notes that all records of the chunk, as they were found, are in the file.
func (c *Chunk) InFile() { c.written = c.End }

// Release gives a reference back. The last one closes the file.
func (c *Chunk) Release() {
	if c.refs.Add(-1) == 0 && c.file != nil {
		_ = c.file.Close() // nothing unsynced is left in the file: the log holds a reference until then
	}
}

// Handle returns the chunk's file, and opens it at its first use, because a store may have very many chunks. The file
// has a descriptor only while it is used (docs/engine.md, Open files). A missing file is an error that matches
// ErrCorrupt.
func (c *Chunk) Handle() (storage.File, error) {
	c.open.Lock()
	defer c.open.Unlock()
	if c.file == nil {
		f, err := c.fs.Open(c.Name())
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", c.Name(), fault.Lost(err))
		}
		c.file = f
	}
	return c.file, nil
}

// The reasons for setting chunk files aside: docs/engine.md, Opening.
const (
	AsDropped = "dropped" // it has records behind the end of the log
	AsDamaged = "damaged" // a repair took it out of the log
	AsUnknown = "unknown" // where it comes from is unknown
)

// AsideName returns the name of a chunk file that is set aside: why, and which chunk it was.
func AsideName(why string, seq uint64, name string) string {
	return fmt.Sprintf("%s-%016x-%s", why, seq, name)
}

// Header reads the header of the chunk file called name, in a slot. A header that is all zeros, or is cut short, yields
// the sequence number 0: power failed while the chunk was made. A header of another slot or store is damage.
func (l *Log) Header(name string, slot uint32) (h format.ChunkHeader, err error) {
	f, err := l.fs.Open(name)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	head := make([]byte, format.ChunkHeaderSize)
	n, err := ReadFull(f, head, 0)
	if err != nil {
		return h, err
	}
	if n < len(head) || format.IsZero(head) {
		return format.ChunkHeader{Slot: slot}, nil
	}
	h, err = format.DecodeChunkHeader(head)
	if err == nil && (h.Slot != slot || h.UUID != l.uuid) {
		err = fault.Corruptf("it belongs to slot %d of store %x", h.Slot, h.UUID)
	}
	return h, err
}
