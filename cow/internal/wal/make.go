package wal

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// makeChunk makes the next chunk. Its file, its header and its directory entry are durable before a record can go into
// it.
func (l *Log) makeChunk() {
	l.mu.Lock()
	wanted, next, seq := l.wanted, l.next, l.nextChunk
	l.wanted = ForData
	l.mu.Unlock()

	var c *Chunk
	var err error
	used := false
	if next == nil {
		c, used, err = l.createChunk(seq, wanted)
	} else {
		_, err = l.sizeForData() // next was made from what is kept free; there may be room for data now
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	l.making = false
	l.madeRound++
	l.makeErr = err
	switch {
	case next != nil:
		next.Reserved = err != nil
	case err == nil:
		l.nextChunk = seq + seqStep() // not earlier, because position() names the chunk that is being made
		l.next = c
		l.space.Add(c)
	default:
		if used {
			l.nextChunk = seq + seqStep()
		}
		if l.wanted > wanted {
			l.making = true // an event or the cleaner began to wait meanwhile, and may use the reserve
			Poke(l.makeWork)
		}
	}
	l.progress.Broadcast()
}

// seqStep returns a random step from one chunk sequence number to the next. The step is random because content that was
// written into a file in an earlier life must not have known the file's later sequence number (docs/engine.md, Blocks
// under the log). 2^64 numbers are enough for 2^35 chunks.
func seqStep() uint64 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails
	return 1<<28 | uint64(binary.NativeEndian.Uint32(b[:])>>4)
}

// A chunk is made only if the next sequence numbers are at most these, because numbers never start over. Then the chunk
// has a number of its own, and there are enough numbers for all records that it can hold.
const (
	LastChunkSeq  = math.MaxUint64 - 1<<30
	LastRecordSeq = math.MaxUint64 - 1<<30
)

// UsedChunk notes that a chunk has the sequence number seq, so that it is not given again.
func (l *Log) UsedChunk(seq uint64) {
	l.nextChunk = max(l.nextChunk, seq, seq+1) // seq alone if seq+1 overflows
}

// createChunk makes a chunk from a file of the pool, or from a new file. If room is short, p says how far into the kept
// space it may go. used reports whether the sequence number may be on the disk now, even if there is an error. If the
// failed chunk's file cannot be removed, the log fails.
func (l *Log) createChunk(seq uint64, p Purpose) (c *Chunk, used bool, err error) {
	l.mu.Lock()
	record := l.nextSeq
	l.mu.Unlock()
	if seq > LastChunkSeq || record > LastRecordSeq {
		return nil, false, fmt.Errorf("the log has come to chunk %d and record %d, and cannot go on; make another store: %w", seq, record, fault.ErrExhausted)
	}
	if c = l.recycle(seq); c == nil {
		if c, err = l.createFile(seq, p); err != nil {
			return nil, false, err
		}
	}
	l.mu.Lock()
	h := format.ChunkHeader{Slot: c.Slot, Seq: seq, UUID: l.uuid, Durable: l.durable, Checkpoint: l.committed}
	l.mu.Unlock()
	head := make([]byte, format.ChunkHeaderSize)
	h.Encode(head)
	_, err = c.file.WriteAt(head, 0)
	// Sync the directory even if the name is old: earlier removals must not be undone once this chunk exists.
	if err = errors.Join(err, c.file.Sync(), l.fs.SyncDir()); err == nil {
		c.End, c.written = format.ChunkHeaderSize, format.ChunkHeaderSize
		return c, true, nil
	}
	err = errors.Join(fmt.Errorf("make chunk %s: %w", c.Name(), err), c.file.Close())
	if rerr := l.fs.Remove(c.Name()); rerr != nil {
		// A replay would end at this file and miss the records in later chunks.
		return nil, true, l.Fail(errors.Join(err, rerr))
	}
	l.mu.Lock()
	l.space.Drop(c.Slot)
	l.mu.Unlock()
	return nil, true, err
}

// recycle makes a chunk from a file of the pool. It returns nil if no file can be used. The file's old chunk keeps its
// slot until the new chunk is made.
func (l *Log) recycle(seq uint64) *Chunk {
	if size, err := l.chunkSize(ForData, l.ChunkBytes); err != nil || int64(size) < l.ChunkBytes {
		return nil
	}
	old := l.Pool.take()
	if old == nil {
		return nil
	}
	c := NewChunk(old.Slot, seq, l.fs)
	c.file, c.Size = old.give(), old.Size
	c.fileSize, c.prepared = c.Size, c.Size
	return c
}

// slotsAbove returns the number of slots that a purpose leaves to higher purposes, so that deleting can still give
// slots back.
func slotsAbove(p Purpose) int {
	switch p {
	case ForData:
		return 64
	case ForEvents:
		return 0
	}
	return 32
}

var errNoSlot = fmt.Errorf("%w: all %d places for chunks are taken; delete snapshots or volumes", fault.NoSpace(syscall.ENOSPC), format.MaxSlots)

// slotFor returns errNoSlot if there is no slot for p.
func (l *Log) slotFor(p Purpose) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.space.FreeSlots() <= slotsAbove(p) {
		return errNoSlot
	}
	return nil
}

// createFile makes a chunk from a new file. If there is no room for data and p is a higher purpose, it takes room from
// what is kept free, and from the reserve.
func (l *Log) createFile(seq uint64, p Purpose) (*Chunk, error) {
	l.mu.Lock()
	slot, ok := l.space.FreeSlot()
	l.mu.Unlock()
	if err := l.slotFor(p); err != nil || !ok {
		return nil, cmp.Or(err, errNoSlot)
	}
	c := NewChunk(slot, seq, l.fs)
	size, err := l.sizeForData()
	if err != nil && p > ForData {
		size, err = l.chunkSize(p, 0)
		c.Reserved, c.ForEvents = true, p == ForEvents && size == EventChunkSize
	}
	if err != nil {
		return nil, err
	}
	f, err := l.fs.Create(c.Name(), int64(size))
	if errors.Is(err, fs.ErrExist) { // the file was not there when the store was opened
		if err = l.fs.SetAside(c.Name(), AsideName(AsUnknown, 0, c.Name())); err == nil {
			f, err = l.fs.Create(c.Name(), int64(size))
		}
	}
	for errors.Is(err, storage.ErrNoSpace) && p > ForData && l.stock.Give(int64(size)) {
		f, err = l.fs.Create(c.Name(), int64(size))
	}
	if err != nil {
		return nil, fmt.Errorf("make chunk %s: %w", c.Name(), err)
	}
	c.file, c.Size, c.fileSize, c.prepared = f, size, size, format.ChunkHeaderSize
	return c, nil
}

// sizeForData returns the size that a new chunk for data can have. If that is less than the usual size, it first
// deletes the files in the pool.
func (l *Log) sizeForData() (uint32, error) {
	if err := l.slotFor(ForData); err != nil {
		return 0, err
	}
	size, err := l.chunkSize(ForData, 0)
	if err != nil || int64(size) < l.ChunkBytes {
		if n, _ := l.Pool.Empty(); n > 0 { // if one cannot be deleted, chunkSize reports the lack of room
			size, err = l.chunkSize(ForData, 0)
		}
	}
	return size, err
}

// chunkSize returns the largest size for a new chunk that there is room for. The chunk takes the place of instead bytes
// that are already used. If there is not even room for the smallest chunk, the error matches ErrNoSpace.
func (l *Log) chunkSize(p Purpose, instead int64) (uint32, error) {
	free, err := l.fs.Free()
	if err != nil {
		return 0, fmt.Errorf("free space of the store: %w", err)
	}
	kept := l.space.Held()
	l.mu.Lock()
	used, work := l.space.Used(), l.space.ForCleaner()
	l.NoteCapacity(free, kept, used)
	l.mu.Unlock()
	keep, least := int64(Spare), min(MinChunkSize, l.ChunkBytes)
	switch p {
	case ForData:
		keep += work
	case ForMoves:
		least = min(EventChunkSize, l.ChunkBytes) // moves into a small chunk give back a larger one
	}
	room := min(free, free+kept-keep)
	if l.Limit > 0 {
		room = min(room, l.Limit-used-(keep-Spare))
	}
	for size := l.ChunkBytes; size >= least; size /= 2 {
		if room+instead >= size {
			return uint32(size), nil
		}
	}
	least = min(MinChunkSize, l.ChunkBytes)
	if p == ForMoves && free+l.stock.Bytes() >= least+l.stock.Wanted()/2 && (l.Limit == 0 || l.Limit-used >= least) {
		return uint32(least), nil // the other half of the reserve is for deletes
	}
	if p == ForEvents {
		return EventChunkSize, nil // if even that is too much, fallocate fails
	}
	if l.Limit > 0 && l.Limit-used < free+kept-Spare {
		return 0, fmt.Errorf("%w: the store's limit is %d MiB, and %d MiB of that are kept for the cleaner; raise it, or delete snapshots or volumes",
			fault.NoSpace(syscall.ENOSPC), l.Limit>>20, (keep-Spare)>>20)
	}
	return 0, fmt.Errorf("%w: the store's file system has %d MiB free, and %d MiB must stay free for deletes, checkpoints and the cleaner; free space there, or delete snapshots or volumes",
		fault.NoSpace(syscall.ENOSPC), free>>20, keep>>20)
}

// NoteCapacity notes how many bytes the chunk files can take in total; used of them are taken. The caller holds mu.
func (l *Log) NoteCapacity(free, kept, used int64) {
	l.capacity = used + max(0, min(free, free+kept-Spare))
	if l.Limit > 0 {
		l.capacity = min(l.capacity, l.Limit)
	}
}

// ChunkLoss returns how many bytes of a new chunk moved records cannot use: its header, and the end that is kept for
// events.
func (l *Log) ChunkLoss() int64 {
	return format.ChunkHeaderSize + min(eventRoom, l.ChunkBytes/16)
}
