package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// loadAndReplay brings memory to the end of the log: the tables of the last
// checkpoint, then every record behind it. It returns the chunk files that are behind the end
// of the log, or were being made or removed at a crash: they go once all is proved. Nothing on disk is changed, but that
// records which may not be durable are written once more.
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
	s.wal.nextSeq, s.wal.nextChunk, s.wal.committed = cp.Seq, max(cp.NextChunkSeq, 1), cp.Seq
	if err := s.loadTables(tb); err != nil {
		return nil, err
	}
	s.slots.cleanable, s.coldMark = cp.ChunkSeq, tb.Cold
	logChunks, left, err := s.findChunks(tb, cp)
	if err != nil {
		return nil, err
	}
	limits, err := firstRecords(logChunks)
	if err != nil {
		return nil, err
	}
	if len(limits) > 0 && limits[0] < cp.Seq {
		return nil, corruptf("the table is as of record %d, and the log goes on with record %d: they do not belong together", cp.Seq, limits[0])
	}
	t := &batch{s: s}
	var end logEnd
	for i, c := range logChunks {
		from := uint32(format.ChunkHeaderSize)
		if i == 0 && c.seq == cp.ChunkSeq {
			from = cp.Offset
		}
		r, err := s.replayChunk(t, c, from, limits[i])
		if err != nil {
			return nil, fmt.Errorf("replay chunk %s: %w", c.name(), err)
		}
		end.add(c, r, r.records > 0 || c.seq <= cp.ChunkSeq)
	}
	if err := t.apply(); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	leavings, err := s.endLog(&end, cp)
	return append(left, leavings...), err
}

func (s *Store) loadTables(tb *metadata.Tables) error {
	t := &s.catalog
	// Ids rise, and a branch is younger than its origin.
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

// firstRecords returns, for each chunk of the log, the least number that the first record of a later one has. The log
// of the owner that made the later one ended before it: what is found behind that now, where a record verifies that
// did not verify for that owner, is not of the log.
func firstRecords(chunks []*chunk) (limits []uint64, err error) {
	limits = make([]uint64, len(chunks))
	limit := uint64(math.MaxUint64)
	for i := len(chunks) - 1; i >= 0; i-- {
		limits[i] = limit
		if i == 0 {
			break
		}
		seq, err := firstRecord(chunks[i])
		if err != nil {
			return nil, fmt.Errorf("chunk %s: %w", chunks[i].name(), err)
		}
		if seq > 0 {
			limit = min(limit, seq)
		}
	}
	return limits, nil
}

// firstRecord returns the number of a chunk's first record; 0: there is none that can be read and verifies.
func firstRecord(c *chunk) (seq uint64, err error) {
	f, err := c.handle()
	if err != nil {
		return 0, readable(err)
	}
	head := make([]byte, format.RecordHeaderSize)
	if n, err := readFull(f, head, format.ChunkHeaderSize); err != nil || n < len(head) {
		return 0, readable(err)
	}
	h, err := format.DecodeRecordHeader(head, c.seq, format.ChunkHeaderSize)
	if err != nil {
		return 0, nil
	}
	payload := make([]byte, h.PayloadLen)
	n, err := readFull(f, payload, format.ChunkHeaderSize+format.RecordHeaderSize)
	if err != nil || n < len(payload) || h.VerifyPayload(payload) != nil {
		return 0, readable(err)
	}
	return h.Seq, nil
}

// chunkReplay is what a replay found in one chunk.
type chunkReplay struct {
	records int
	dropped int64 // bytes that were written to the log behind the records
	why     error // the record behind them is not there; nil: the summary says that there is none
	lost    bool  // and that is no end of a log, or it is not known whether it is
}

// replayChunk applies the records of a chunk from an offset on, up to the first that does not verify, does not have
// the next sequence number, or has the number limit. If all of them were made durable once, what its summary says of
// them is enough.
func (s *Store) replayChunk(t *batch, c *chunk, from uint32, limit uint64) (r chunkReplay, err error) {
	c.end = from
	f, err := c.handle()
	if errors.Is(err, fs.ErrNotExist) {
		err = corruptf("the file is missing")
	}
	if errors.Is(err, ErrCorrupt) || isUnreadable(err) {
		return chunkReplay{why: err, lost: true}, nil
	}
	if err != nil {
		return r, err
	}
	size, err := f.Size()
	if err != nil {
		return r, err
	}
	c.size = uint32(min(size, format.MaxChunkSize))
	s.slots.recount(c)
	if c.size < from {
		return chunkReplay{why: corruptf("the file has %d bytes", size), lost: true}, nil
	}
	sum, err := readSummary(f, c, c.size)
	if isUnreadable(err) { // then the records are read
		s.recovery.unsettled, err = true, nil
	}
	if err != nil {
		return r, err
	}
	before := s.wal.nextSeq
	if sum != nil && sum.before(s.wal.durable) {
		r.why, err = s.replaySummary(t, c, sum, from, limit)
		if s.wal.nextSeq > before {
			s.recovery.Summaries++
		}
	} else {
		r.why, err = s.replayRecords(t, c, from, limit)
	}
	if err != nil {
		return r, err
	}
	r.records, r.lost = int(s.wal.nextSeq-before), isUnreadable(r.why)
	s.recovery.Records += int64(r.records)
	c.written = c.end
	s.markRow(c) // if it is dead the next checkpoint removes it
	switch {
	case sum == nil:
		r.dropped, err = (&recordReader{f: f, c: c, off: c.end}).tail()
	case c.end < sum.End:
		r.dropped = int64(sum.End - c.end)
		s.recovery.unsettled = true
	default:
		return r, nil
	}
	if r.dropped == 0 { // else it stays: nobody knows why the record before it does not verify
		s.untrimmed = append(s.untrimmed, c)
	}
	return r, err
}

// replaySummary applies what a summary says of the records from an offset on. Only events and moved records are read:
// what they say is not in it.
func (s *Store) replaySummary(t *batch, c *chunk, sum *summary, from uint32, limit uint64) (why, err error) {
	r := &recordReader{f: c.file, c: c, readOnly: true}
	bad := sum.each(func(seq uint64, off uint32, e *format.SummaryEntry) bool {
		if off < from {
			return true
		}
		if off != c.end || seq != s.wal.nextSeq || seq >= limit {
			why = corruptf("the chunk goes on with record %d at %d", seq, off)
			return false
		}
		var payload []byte
		var h *format.RecordHeader
		if e.Kind == format.KindEvent || e.Kind == format.KindMoved {
			r.off = off
			if h, payload, err = r.next(seq); err != nil || payload == nil {
				why = r.why
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

// replayed goes past a record.
func (s *Store) replayed(c *chunk, size int) {
	s.wal.nextSeq++
	c.end += uint32(size)
	s.recovery.Bytes += int64(size)
}

// replayRecords reads and applies the records from an offset on.
func (s *Store) replayRecords(t *batch, c *chunk, from uint32, limit uint64) (why, err error) {
	r := &recordReader{f: c.file, c: c, off: from, at: from, readOnly: s.readOnly != nil}
	why = corruptf("a later chunk has the record")
	for s.wal.nextSeq < limit {
		h, payload, err := r.next(s.wal.nextSeq)
		if err != nil {
			return nil, err
		}
		durable := s.wal.nextSeq < s.wal.durable
		if h == nil || payload == nil && !(durable && h.Kind == format.KindData) {
			why = r.why
			break
		}
		e := format.SummaryEntry{Kind: h.Kind, Branch: h.Branch, Block: h.Block, Blocks: h.Blocks, Size: h.Size()}
		switch {
		case payload == nil: // damage to this record's blocks, which their readers will meet
			s.log.Error("a record of the log is damaged; run check", "chunk", c.name(), "offset", c.end, "err", r.why)
			s.recovery.Damaged++
			r.off += uint32(e.Size)
		case h.Kind == format.KindHole:
			n, err := format.DecodeHole(payload, h.Block)
			if err != nil {
				return nil, err
			}
			e.Blocks = int(min(n, format.LeafBlocks+1)) // more is refused
		}
		if err := s.replayRecord(t, &e, h, payload, c, c.end); err != nil {
			return nil, fmt.Errorf("record %d at %d: %w", h.Seq, c.end, err)
		}
		s.replayed(c, e.Size)
		if durable {
			r.back = r.off
		}
	}
	if c.end > from && !r.readOnly {
		s.wal.needSync(c)
	}
	return why, r.writeBack()
}

// replayRecord applies a record, or holds it back in the batch. Events and moved records come with their header and
// payload.
func (s *Store) replayRecord(t *batch, e *format.SummaryEntry, h *format.RecordHeader, payload []byte, c *chunk, off uint32) error {
	if e.Kind == format.KindEvent || e.Kind == format.KindMoved {
		if err := t.apply(); err != nil { // what it is about is as before it
			return err
		}
	}
	switch e.Kind {
	case format.KindEvent:
		var ev format.Event
		if err := format.DecodeEvent(payload, &ev); err != nil {
			return err
		}
		s.catalogDirty = true
		return s.catalog.apply(&ev, s.gen)
	case format.KindMoved:
		return s.replayMoved(h, payload, c, off)
	}
	b := s.catalog.branches[e.Branch]
	if b == nil {
		return corruptf("branch %d does not exist", e.Branch)
	}
	block := int(e.Block % format.LeafBlocks)
	if block+e.Blocks > format.LeafBlocks {
		return corruptf("%d blocks from %d on are not of one leaf", e.Blocks, e.Block)
	}
	var first format.Entry
	if e.Kind == format.KindData {
		first = format.MakeEntry(c.slot, off, e.Size, e.Blocks, 0)
	}
	return t.hold(b, uint32(e.Block/format.LeafBlocks), block, e.Blocks, first)
}

// recordReader reads the records of a chunk in order, through a window.
type recordReader struct {
	f    storage.File
	c    *chunk
	off  uint32 // of the next record
	win  []byte // bytes of the file from winOff on
	at   uint32 // winOff
	back uint32 // what lies before was durable, and is not written back
	why  error  // next returned no record, or no payload

	readOnly bool // what is read is durable, and not written back
}

const readWindow = 128 << 10 // or one record, if that is larger

// next returns the record at off if it verifies and has the number seq. Else there is no header, or no payload if that
// is what does not verify, and why says what is wrong. The error is one that is no property of the log.
func (r *recordReader) next(seq uint64) (*format.RecordHeader, []byte, error) {
	r.why = nil
	head, err := r.bytes(format.RecordHeaderSize)
	if err != nil || head == nil {
		return nil, nil, err
	}
	h, err := format.DecodeRecordHeader(head, r.c.seq, r.off)
	if err == nil && h.Seq != seq {
		err = corruptf("the record there has the number %d", h.Seq)
	}
	if err != nil {
		r.why = err
		return nil, nil, nil
	}
	rec, err := r.bytes(h.Size())
	if err != nil || rec == nil {
		return &h, nil, err
	}
	payload := rec[format.RecordHeaderSize : format.RecordHeaderSize+h.PayloadLen]
	if r.why = h.VerifyPayload(payload); r.why != nil {
		return &h, nil, nil
	}
	r.off += uint32(h.Size())
	return &h, payload, nil
}

// bytes returns n bytes from off on, or nil where the file ends before, or the disk does not have them.
func (r *recordReader) bytes(n int) ([]byte, error) {
	if r.off < r.at || r.off+uint32(n) > r.at+uint32(len(r.win)) {
		err := r.load(max(n, readWindow), r.off)
		if isUnreadable(err) && n < readWindow {
			err = r.load(n, r.off) // what the disk does not have may lie behind them
		}
		if isUnreadable(err) {
			r.why = err
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	if r.off+uint32(n) > r.at+uint32(len(r.win)) {
		r.why = corruptf("the file ends at %d", r.at+uint32(len(r.win)))
		return nil, nil
	}
	return r.win[r.off-r.at:][:n], nil
}

// writeBack writes the window's verified records once more. A process whose sync has failed may
// have left records that the page cache calls clean and that the disk does not have: only
// what is written again is synced again.
func (r *recordReader) writeBack() error {
	from := max(r.at, r.back)
	if r.readOnly || r.off <= from {
		return nil
	}
	_, err := r.f.WriteAt(r.win[from-r.at:r.off-r.at], int64(from))
	return err
}

func (r *recordReader) load(n int, off uint32) error {
	if err := r.writeBack(); err != nil {
		return err
	}
	if cap(r.win) < n {
		r.win = make([]byte, n)
	}
	m, err := readFull(r.f, r.win[:n], int64(off))
	if err != nil {
		m = 0
	}
	r.win, r.at = r.win[:m], off
	return err
}

// tail is how many bytes behind the end of the log were written to it, as far as can be seen: up to a stretch
// without a record of this chunk's. A former life of the file may have left any other bytes there.
func (r *recordReader) tail() (n int64, err error) {
	r.readOnly = true
	end, last := r.off, r.off
	for r.off-last < readWindow {
		head, err := r.bytes(format.RecordHeaderSize)
		if err != nil || head == nil {
			return int64(last - end), err // at the end of the file, or of what can be read
		}
		off := r.off
		r.off += format.RecordAlign
		if !format.IsRecordHeader(head, r.c.seq, off) {
			continue
		}
		if h, err := format.DecodeRecordHeader(head, r.c.seq, off); err == nil {
			r.off = off + uint32(h.Size())
			last = r.off
		}
	}
	return int64(last - end), nil
}

// readFull reads up to len(p) bytes: fewer only at the end of the file.
func readFull(f storage.File, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := f.ReadAt(p[n:], off+int64(n))
		n += m
		if errors.Is(err, io.EOF) || err == nil && m == 0 {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
