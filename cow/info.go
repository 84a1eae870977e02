package cow

import (
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
)

// StoreInfo describes a store as a whole.
type StoreInfo struct {
	UUID       string    `json:"uuid"`
	Created    time.Time `json:"created"`
	Version    int       `json:"version"`
	Volumes    int       `json:"volumes"`
	Snapshots  int       `json:"snapshots"`
	Chunks     int       `json:"chunks"`
	ChunkBytes int64     `json:"chunk_bytes"`        // of records in chunk files
	LiveBytes  int64     `json:"live_bytes"`         // of those records, what volumes and snapshots refer to
	SpareBytes int64     `json:"spare_bytes"`        // of files of dead chunks that are kept for reuse
	MetaBytes  int64     `json:"meta_bytes"`         // of the table's file, including room for growth
	CopyBytes  int64     `json:"copy_bytes"`         // of the copy of the table; 0: there is none
	CopyWhy    string    `json:"copy_why,omitempty"` // why there is none, or no new one

	ReserveBytes int64 `json:"reserve_bytes"` // of the file system; kept for deletes and checkpoints
	FreeBytes    int64 `json:"free_bytes"`    // of the file system

	Fill       *Fill `json:"fill,omitempty"` // nil: not known
	FillLevels []int `json:"fill_levels"`    // of WatchFill

	AsideFiles int   `json:"aside_files"` // chunk files that were set aside; -1: they cannot be listed
	AsideBytes int64 `json:"aside_bytes"` // of the files that were set aside

	Scrub ScrubStatus `json:"scrub"`
}

// Info returns a description of the store.
func (s *Store) Info() StoreInfo {
	in := StoreInfo{UUID: s.info.UUID, Created: s.info.Created, Version: s.info.Version, Scrub: s.ScrubStatus()}
	in.MetaBytes, in.ReserveBytes = s.meta.Size(), s.reserve.Bytes()
	c := s.meta.CopyState()
	if in.CopyBytes = c.Bytes; c.Why != nil {
		in.CopyWhy = c.Why.Error()
	}
	if n, err := s.fs.Free(); err == nil {
		in.FreeBytes = n
	}
	if f, err := s.Fill(); err == nil {
		in.Fill = &f
	}
	var err error
	if in.AsideFiles, in.AsideBytes, err = s.setAsideSoFar(); err != nil {
		s.log.Warn("what was set aside cannot be listed", "folder", s.in.Join(asideDir), "err", err)
		in.AsideFiles, in.AsideBytes = -1, 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	in.FillLevels = s.fill.levels
	in.Volumes = len(s.catalog.volumes)
	in.Snapshots = len(s.catalog.snapshots) - len(s.catalog.unnamedPoints)
	in.SpareBytes = s.wal.Pool.Bytes()
	in.Chunks, in.ChunkBytes, in.LiveBytes = int(s.slots.chunks), s.slots.ends, s.slots.live
	for _, f := range []*wal.Chunk{s.wal.Current(), s.wal.Next()} {
		if f != nil {
			c := s.slots.get(f.Slot)
			in.Chunks++
			in.ChunkBytes += int64(c.End)
			in.LiveBytes += int64(c.live)
		}
	}
	return in
}
