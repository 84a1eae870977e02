package cow

// ChunkKind is what a chunk is to the log.
type ChunkKind string

// The kinds of chunks. Of several that fit, it is the first.
const (
	ChunkDamaged  ChunkKind = "damaged"  // the cleaner met a record in it that does not verify
	ChunkCleaning ChunkKind = "cleaning" // its live data is being moved
	ChunkOpen     ChunkKind = "open"     // records are added to it, or will be next
	ChunkDead     ChunkKind = "dead"     // nothing in it is live: its file goes, mostly with the next checkpoint
	ChunkFull     ChunkKind = "full"
)

// ChunkInfo is one file of the log.
type ChunkInfo struct {
	Slot        uint32 // which names the file
	Seq         uint64 // chunks are numbered in the order in which they were made
	Kind        ChunkKind
	FileBytes   int64
	RecordBytes int64 // of records in it, dead or live
	LiveBytes   int64 // of these, live data
}

// chunkBatch is how many slots are looked at while mu is held once: 7 µs.
const chunkBatch = 256

// EachChunk calls each for every chunk file, by slot. It is for people who look at the store while it is in use: writers
// never wait long for it, and chunks that come and go meanwhile may be told or not.
func (s *Store) EachChunk(each func(ChunkInfo)) error {
	batch := make([]ChunkInfo, 0, chunkBatch)
	for n := range s.slots.pages {
		p := s.slots.pages[n].Load()
		for at := 0; p != nil && at < pageSlots; at += chunkBatch {
			var err error
			if batch, err = s.chunksIn(p, at, batch[:0]); err != nil {
				return err
			}
			for _, c := range batch {
				each(c)
			}
		}
	}
	return nil
}

// chunksIn appends the chunks in a batch of a page's slots to list.
func (s *Store) chunksIn(p *slotPage, at int, list []ChunkInfo) ([]ChunkInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	for i := at; i < at+chunkBatch; i++ {
		if c := p.chunks[i].Load(); c != nil && !c.gone {
			list = append(list, ChunkInfo{c.Slot, c.Seq, s.kindOf(c), int64(c.Size), int64(c.End), int64(c.live)})
		}
	}
	return list, nil
}

// kindOf returns what a chunk is. The caller holds mu.
func (s *Store) kindOf(c *chunk) ChunkKind {
	switch {
	case c.damaged:
		return ChunkDamaged
	case c == s.cleaner.chunk:
		return ChunkCleaning
	case !c.Sealed:
		return ChunkOpen
	case c.dead || c.live == 0 && !c.kept:
		return ChunkDead
	}
	return ChunkFull
}
