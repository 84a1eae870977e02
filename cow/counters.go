package cow

import (
	"time"

	"github.com/vdisk/vdisk/format"
)

// Counters are what a store has done since it was opened, and what it is doing: docs/metrics.md. All of it is counted
// anyway, or where a lock is held in any case, so that nothing becomes slower by it.
type Counters struct {
	Volumes []VolumeCounters // in no order

	// Of the log. Records are counted over the life of the store.
	Records         uint64 // that it has
	DurableRecords  uint64 // of these, those that a power cut leaves
	AppendedBytes   uint64
	ReplayBytes     uint64 // appended since the last checkpoint began: a restart replays about as much
	Syncs           uint64
	SyncTime        time.Duration
	Failed          bool   // nothing can be written any more
	WrittenBytes    uint64 // of data in records of volumes, before compression
	CompressedBytes uint64 // of these records

	// Of the caches.
	MapLookups, MapLoads uint64 // of leaves; loads from the table
	UnitHits, UnitMisses uint64 // for reads of a part of a unit

	Checkpoints        uint64
	CheckpointFailures uint64
	CheckpointTime     time.Duration
	LastCheckpoint     time.Time // zero: there was none

	CleanedChunks  uint64
	MovedBytes     uint64 // by the cleaner and the cold pass
	ReclaimedBytes uint64 // in dead chunks whose files were removed or used again
	Cleaning       bool   // a chunk is being cleaned
	Paced          bool   // writers are held back, because room is short

	FileBytes  int64 // of chunk files
	RoomBytes  int64 // how many more bytes the chunk files can take
	LimitBytes int64 // most bytes in chunk files; 0: the file system sets the limit

	DamagedPlaces int // that are known
}

// VolumeCounters are those of one volume.
type VolumeCounters struct {
	Name            string
	Size            int64
	Snapshots       int
	Open            int    // open devices of it and its snapshots
	WrittenBytes    uint64 // before compression
	CompressedBytes uint64
}

// packed counts data that was written to a volume.
type packed struct{ blocks, stored uint64 }

// add counts n blocks in a record of size bytes.
func (p *packed) add(n, size int) {
	p.blocks += uint64(n)
	p.stored += uint64(size)
}

func (p *packed) bytes() (written, stored uint64) { return p.blocks * format.BlockSize, p.stored }

// Counters returns the counters of the store. They are read one after another while the store goes on.
func (s *Store) Counters() Counters {
	c := s.Totals()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.catalog.volumes {
		if v.Receiving == nil {
			c.Volumes = append(c.Volumes, v.counters())
		}
	}
	return c
}

// Totals returns the counters without those of each volume, at the same cost however many there are.
func (s *Store) Totals() Counters {
	c := Counters{Failed: s.readOnly == nil && s.wal.Err() != nil, Paced: s.cleaner.pacer.on.Load()}
	c.MapLookups, c.MapLoads = s.cache.Lookups()
	c.UnitHits, c.UnitMisses = s.units.lookups()
	c.Syncs, c.SyncTime = s.wal.Syncs()
	c.Checkpoints, c.CheckpointTime = s.checkpoints.timing.Get()
	if last := s.checkpoints.last.Load(); last != 0 {
		c.LastCheckpoint = time.Unix(0, last)
	}
	known, _ := s.damage.all()
	c.DamagedPlaces = len(known)
	free, err := s.fs.Free()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		c.RoomBytes = max(0, s.room(free))
	}
	c.FileBytes, c.LimitBytes = s.slots.files, s.wal.Limit
	c.Records, c.DurableRecords = max(s.wal.NextSeq(), 1)-1, max(s.wal.Durable(), 1)-1
	c.AppendedBytes = s.wal.Appended()
	c.ReplayBytes = c.AppendedBytes - s.checkpoints.at.Load()
	c.WrittenBytes, c.CompressedBytes = s.packed.bytes()
	c.CheckpointFailures = s.checkpoints.failures
	c.CleanedChunks, c.MovedBytes, c.Cleaning = s.cleaner.chunks, s.cleaner.moved, s.cleaner.chunk != nil
	c.ReclaimedBytes = uint64(s.slots.removed)
	return c
}

// counters returns those of the volume. The caller holds mu.
func (v *volume) counters() VolumeCounters {
	c := VolumeCounters{Name: v.Name, Size: v.Size, Snapshots: len(v.snapshots), Open: v.readers}
	if v.writer {
		c.Open++
	}
	c.WrittenBytes, c.CompressedBytes = v.packed.bytes()
	return c
}
