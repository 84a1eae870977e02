package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"math"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Recovery describes what Open found behind the last checkpoint.
type Recovery struct {
	Records      int64 // replayed records
	Bytes        int64 // replayed bytes
	Summaries    int   // chunks that were replayed from their summary alone
	DroppedBytes int64 // bytes behind the first record that did not verify
	DroppedFiles int   // chunk files with such bytes
	Lost         int64 // dropped records that had been durable, and that Options.Repair gave up
	Damaged      int   // records in the log whose data cannot be read
	unsettled    bool  // a chunk may have a summary of dropped records, or the log was repaired
}

// Recovery returns what Open replayed and dropped.
func (s *Store) Recovery() Recovery { return s.recovery }

// loadAndReplay brings memory to the end of the log: it loads the tables of the last checkpoint and replays every
// record behind it. It returns the chunk files that are behind the end of the log, or were being made or removed at a
// crash. They are removed or set aside once everything is proved. Nothing on disk is changed, except that records that
// may not be durable are written once more.
func (s *Store) loadAndReplay() (left []leaving, err error) {
	var tb *metadata.Tables
	err = s.meta.View(func(tx *metadata.Tx) (err error) { tb, err = tx.Load(); return err })
	if err != nil {
		return nil, err
	}
	cp := tb.Checkpoint
	if cp.Seq == 0 { // no checkpoint yet
		cp = format.Checkpoint{Seq: 1, ChunkSeq: 1, Offset: format.ChunkHeaderSize, NextID: 1, NextChunkSeq: 1}
	}
	s.wal.Resume(cp.Seq, max(cp.NextChunkSeq, 1))
	if err := s.loadTables(tb); err != nil {
		return nil, err
	}
	s.slots.cleanable, s.cold.mark = cp.ChunkSeq, tb.Cold
	logChunks, left, err := s.findChunks(tb, cp)
	if err != nil {
		return nil, err
	}
	end := logEnd{headers: s.wal.Durable()}
	s.wal.KnowDurable(s.mark.Seq())
	limits, err := firstRecords(logChunks)
	if err != nil {
		return nil, err
	}
	if len(limits) > 0 && limits[0] < cp.Seq {
		return nil, fault.Corruptf("the table is as of record %d, and the log goes on with record %d: they do not belong together", cp.Seq, limits[0])
	}
	t := &batch{s: s}
	for i, c := range logChunks {
		from := uint32(format.ChunkHeaderSize)
		if i == 0 && c.Seq == cp.ChunkSeq {
			from = cp.Offset
		}
		r, err := s.replayChunk(t, c, from, limits[i])
		if err != nil {
			return nil, fmt.Errorf("replay chunk %s: %w", c.Name(), err)
		}
		end.add(c, r, r.records > 0 || c.Seq <= cp.ChunkSeq)
	}
	if err := t.apply(); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	leavings, err := s.endLog(&end, cp, left)
	return append(left, leavings...), err
}

// loadTables fills the catalog from the table's rows.
func (s *Store) loadTables(tb *metadata.Tables) error {
	t := &s.catalog
	// Ids rise, and a branch has a higher id than its origin.
	for _, b := range tb.Branches {
		if err := t.putBranch(b, 0); err != nil {
			return err
		}
	}
	for _, v := range tb.Volumes {
		if err := t.putVolume(v, 0); err != nil {
			return err
		}
	}
	for _, sn := range tb.Snapshots {
		if err := t.putSnapshot(sn, 0); err != nil {
			return err
		}
	}
	t.nextID = max(t.nextID, uint64(tb.Checkpoint.NextID))
	clear(t.dirtyVolumes)
	clear(t.dirtySnapshots)
	clear(t.dirtyBranches)
	return nil
}

// firstRecords returns, for each chunk of the log, the lowest number of the first record of any later chunk. When a
// later chunk was made, its owner's log ended before that record. So a record with that number or a higher one in the
// earlier chunk is not part of the log, even if it verifies now and did not verify for that owner.
func firstRecords(chunks []*chunk) (limits []uint64, err error) {
	limits = make([]uint64, len(chunks))
	limit := uint64(math.MaxUint64)
	for i := len(chunks) - 1; i >= 0; i-- {
		limits[i] = limit
		if i == 0 {
			break
		}
		seq, err := chunks[i].FirstSeq()
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", chunks[i].Name(), err)
		}
		if seq > 0 {
			limit = min(limit, seq)
		}
	}
	return limits, nil
}

// chunkReplay is the result of replaying one chunk.
type chunkReplay struct {
	records int
	dropped int64 // bytes written to the log behind the replayed records
	why     error // why the next record is not there; nil: the summary says that there is none
	lost    bool  // the end found is not the end of a log, or may not be
}

// replayChunk applies the records of a chunk from offset from. It ends at the first record that does not verify, does
// not have the next sequence number, or has the number limit. If all records of the chunk are known to have been
// durable, it applies what the summary says of them and reads only those that the summary does not describe in full.
func (s *Store) replayChunk(t *batch, c *chunk, from uint32, limit uint64) (r chunkReplay, err error) {
	c.End = from
	f, err := c.Handle()
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.Corruptf("the file is missing")
	}
	if errors.Is(err, ErrCorrupt) || fault.IsUnreadable(err) {
		return chunkReplay{why: err, lost: true}, nil
	}
	if err != nil {
		return r, err
	}
	size, err := f.Size()
	if err != nil {
		return r, err
	}
	c.Size = uint32(min(size, format.MaxChunkSize))
	s.slots.recount(c)
	if c.Size < from {
		return chunkReplay{why: fault.Corruptf("the file has %d bytes", size), lost: true}, nil
	}
	sum, err := c.Summary()
	if fault.IsUnreadable(err) { // the records are read instead
		s.recovery.unsettled, err = true, nil
	}
	if err != nil {
		return r, err
	}
	before := s.wal.NextSeq()
	if sum != nil && sum.Before(s.wal.Durable()) {
		r.why, err = s.replaySummary(t, c, sum, from, limit)
		if s.wal.NextSeq() > before {
			s.recovery.Summaries++
		}
	} else {
		r.why, err = s.replayRecords(t, c, from, limit)
	}
	if err != nil {
		return r, err
	}
	r.records, r.lost = int(s.wal.NextSeq()-before), fault.IsUnreadable(r.why)
	s.recovery.Records += int64(r.records)
	c.InFile()
	s.markRow(c) // if the chunk is dead, the next checkpoint removes it
	switch {
	case sum == nil:
		r.dropped, err = c.Tail(c.End, s.wal.NextSeq())
	case c.End < sum.End:
		r.dropped = int64(sum.End - c.End)
		s.recovery.unsettled = true
	default:
		return r, nil
	}
	if r.dropped == 0 { // otherwise the rest stays: nobody knows why the record does not verify
		s.checkpoints.untrimmed = append(s.checkpoints.untrimmed, c)
	}
	return r, err
}

// replaySummary applies what a summary says of the records from offset from. It reads only events and moved records,
// whose payloads are not in the summary. why says why the next record is not there.
func (s *Store) replaySummary(t *batch, c *chunk, sum *wal.Summary, from uint32, limit uint64) (why, err error) {
	var r wal.Reader
	if err := r.Begin(c.Chunk, from, wal.ReplayWindow); err != nil {
		return nil, err
	}
	bad := sum.Each(func(seq uint64, off uint32, e *format.SummaryEntry) bool {
		if off < from {
			return true
		}
		if off != c.End || seq != s.wal.NextSeq() || seq >= limit {
			why = fault.Corruptf("the chunk goes on with record %d at %d", seq, off)
			return false
		}
		var payload []byte
		var h *format.RecordHeader
		if e.Kind == format.KindEvent || e.Kind == format.KindMoved {
			r.Off = off
			if h, payload, err = r.Next(seq); err != nil || payload == nil {
				why = r.Why
				return false
			}
		}
		if err = s.replayRecord(t, e, h, payload, c, off); err != nil {
			err = fmt.Errorf("record %d at %d: %w", seq, off, err)
			return false
		}
		s.replayed(c, e.Size)
		return true
	})
	return why, errors.Join(err, bad)
}

// replayed counts a record of size bytes, and moves the end of c and of the log past it.
func (s *Store) replayed(c *chunk, size int) {
	s.wal.Replayed(c.Chunk, size)
	s.recovery.Bytes += int64(size)
}

// replayRecords reads and applies the records from offset from. why says why the next record is not there.
func (s *Store) replayRecords(t *batch, c *chunk, from uint32, limit uint64) (why, err error) {
	var r wal.Reader
	if err := r.Begin(c.Chunk, from, wal.ReplayWindow); err != nil {
		return nil, err
	}
	r.Rewrites = s.readOnly == nil
	why = fault.Corruptf("a later chunk has the record")
	for s.wal.NextSeq() < limit {
		h, payload, err := r.Next(s.wal.NextSeq())
		if err != nil {
			return nil, err
		}
		durable := s.wal.NextSeq() < s.wal.Durable()
		if h == nil || payload == nil && !(durable && h.Kind == format.KindData) {
			why = r.Why
			break
		}
		e := format.SummaryEntry{Kind: h.Kind, Branch: h.Branch, Block: h.Block, Blocks: h.Blocks, Size: h.Size()}
		switch {
		case payload == nil: // damage to the blocks of this record, which their readers will meet
			s.log.Error("a record of the log is damaged; run check", "chunk", c.Name(), "offset", c.End, "err", r.Why)
			s.damage.note(badPlace{record: unitKey{c.Seq, format.MakeEntry(c.Slot, c.End, e.Size, e.Blocks, 0), e.Block}}, r.Why)
			s.recovery.Damaged++
			r.Off += uint32(e.Size)
		case h.Kind == format.KindHole:
			n, err := format.DecodeHole(payload, h.Block)
			if err != nil {
				return nil, err
			}
			e.Blocks = int(min(n, format.LeafBlocks+1)) // more is refused
		}
		if err := s.replayRecord(t, &e, h, payload, c, c.End); err != nil {
			return nil, fmt.Errorf("record %d at %d: %w", h.Seq, c.End, err)
		}
		s.replayed(c, e.Size)
		if durable {
			r.Durable = r.Off
		}
	}
	if c.End > from && r.Rewrites {
		s.wal.NeedSync(c.Chunk)
	}
	return why, r.WriteBack()
}

// replayRecord applies a record, or holds its change back in the batch. For events and moved records the caller must
// pass the header and the payload.
func (s *Store) replayRecord(t *batch, e *format.SummaryEntry, h *format.RecordHeader, payload []byte, c *chunk, off uint32) error {
	if e.Kind == format.KindEvent || e.Kind == format.KindMoved {
		if err := t.apply(); err != nil { // these records need the state that the records before them left
			return err
		}
	}
	switch e.Kind {
	case format.KindEvent:
		var ev format.Event
		if err := format.DecodeEvent(payload, &ev); err != nil {
			return err
		}
		s.changes.catalog = true
		return s.catalog.apply(&ev, s.changes.gen)
	case format.KindMoved:
		return s.replayMoved(h, payload, c, off)
	}
	b := s.catalog.branches[e.Branch]
	if b == nil {
		return fault.Corruptf("branch %d does not exist", e.Branch)
	}
	block := int(e.Block % format.LeafBlocks)
	if block+e.Blocks > format.LeafBlocks {
		return fault.Corruptf("%d blocks from %d on are not of one leaf", e.Blocks, e.Block)
	}
	var first format.Entry
	if e.Kind == format.KindData {
		first = format.MakeEntry(c.Slot, off, e.Size, e.Blocks, 0)
	}
	return t.hold(b, uint32(e.Block/format.LeafBlocks), block, e.Blocks, first)
}
