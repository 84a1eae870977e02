package cow

import (
	"fmt"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
)

// Room for the cleaner to work in: docs/reclaim.md, The cleaner's room. A chunk gives nothing back before all of its
// live data has been copied. So data leaves room to copy the live data of any one chunk, and the cleaner begins no
// chunk that it has no room to finish. Otherwise the copies from an unfinished chunk would take that room, and then no
// chunk could be cleaned, however much is dead.
//
// Chunks differ in size: each was made as large as there was room for at the time.

// workShare bounds the room that is left for chunks larger than new ones: an eighth of the capacity. Otherwise an old
// chunk of 64 MiB would take all of a store whose limit is 64 MiB from data.
const workShare = 8

// workRoom returns how much room for chunks it takes to clean any chunk that there is. The caller holds mu.
func (s *Store) workRoom() int64 {
	return s.wal.ChunkBytes + s.workBeyond()
}

// workBeyond returns how much of workRoom exceeds one new chunk. The caller holds mu.
func (s *Store) workBeyond() int64 {
	most, chunk := s.slots.mostLive(), s.wal.ChunkBytes
	if most <= max(chunk, liveStep) {
		return 0
	}
	need := most + most/32 + (most/chunk+2)*s.wal.ChunkLoss()
	need += wal.EventChunkSize - need%wal.EventChunkSize
	if c := s.wal.Capacity(); c > 0 {
		need = min(need, chunk+c/workShare)
	}
	return need - chunk
}

// workKept returns how much of workRoom data has to leave at this moment. What the cleaner has copied of the chunk that
// it is cleaning comes back with that chunk, and what is dead comes back with the next checkpoint. The caller holds mu.
func (s *Store) workKept() int64 {
	back := s.slots.owed + s.checkpoints.pendingFree
	c := s.cleaner.chunk
	if c != nil {
		back += int64(s.cleaner.moved - s.cleaner.movedBefore)
	}
	keep := s.wal.ChunkBytes + max(0, s.workBeyond()-back)
	if c != nil && int64(c.live) > s.wal.ChunkBytes {
		keep = max(keep, workFor(c)+(int64(c.live)/s.wal.ChunkBytes+1)*s.wal.ChunkLoss())
	}
	return keep
}

// workFor returns how many bytes it takes to copy the live data of a chunk. A moved record is a little longer than the
// original.
func workFor(c *chunk) int64 { return int64(c.live) + int64(c.live)/64 }

// workable returns how many bytes the cleaner can copy, whatever others write meanwhile, if the file system has free
// bytes free. The caller holds mu.
func (s *Store) workable(free int64) int64 {
	l := s.wal
	room := s.room(free)
	// Writers leave the first term free, and are held back before they can take the second.
	room = max(min(room, s.workRoom()), room-ahead*l.ChunkBytes)
	if least := min(wal.MinChunkSize, l.ChunkBytes); room < least {
		reserve := free + s.reserve.Bytes() - s.reserve.Wanted()/2
		if l.Limit > 0 {
			reserve = min(reserve, l.Limit-s.slots.files)
		}
		room = max(room, reserve)
	}
	room -= room % min(wal.EventChunkSize, l.ChunkBytes)
	for _, c := range []*wal.Chunk{l.Current(), l.Next()} {
		if c != nil && c.Reserved && !c.ForEvents {
			room += int64(c.Size - c.End)
		}
	}
	return room - (room/l.ChunkBytes+1)*l.ChunkLoss() - room/64
}

// noWorkRoom returns the error for when something could be cleaned, but there is no room to do so.
func noWorkRoom(room int64) error {
	return fmt.Errorf("%w: there is room to copy %d KiB, and each chunk with dead data has more than that alive; raise the store's limit, free space on its file system, or delete snapshots or volumes",
		fault.NoSpace(syscall.ENOSPC), max(0, room)>>10)
}
