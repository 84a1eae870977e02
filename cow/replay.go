package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strconv"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// loadAndReplay brings memory to the end of the log: the tables of the last
// checkpoint, then every record behind it. It returns the chunk files that are behind the end
// of the log, or were being made or removed at a crash: they go when the
// next checkpoint has been committed. Nothing on disk is changed.
func (s *Store) loadAndReplay() (remove []string, err error) {
	var tb *metadata.Tables
	err = s.meta.View(func(tx *metadata.Tx) (err error) { tb, err = tx.Load(); return err })
	if err != nil {
		return nil, err
	}
	cp := tb.Checkpoint
	if cp.Seq == 0 { // no checkpoint yet
		cp = format.Checkpoint{Seq: 1, ChunkSeq: 1, Offset: format.ChunkHeaderSize, NextID: 1, NextChunkSeq: 1}
	}
	s.wal.nextSeq, s.wal.nextChunk = cp.Seq, max(cp.NextChunkSeq, 1)
	if err := s.loadTables(tb); err != nil {
		return nil, err
	}
	s.slots.cleanable, s.coldMark = cp.ChunkSeq, tb.Cold
	logChunks, remove, err := s.findChunks(tb, cp)
	if err != nil {
		return nil, err
	}
	limits, err := firstRecords(logChunks)
	if err != nil {
		return nil, err
	}
	t := &batch{s: s}
	var behind []*chunk // without a record that the log goes on with
	var dropped []int64 // by chunk of behind: the bytes there
	for i, c := range logChunks {
		from := uint32(format.ChunkHeaderSize)
		if i == 0 && c.seq == cp.ChunkSeq {
			from = cp.Offset
		}
		n, tail, err := s.replayChunk(t, c, from, limits[i])
		if err != nil {
			return nil, fmt.Errorf("replay chunk %s: %w", c.name(), err)
		}
		if n > 0 || c.seq <= cp.ChunkSeq {
			// The log goes on here: what is behind the records of the chunks before was none of it. A chunk in
			// between has no record: room was made that nobody used in the end.
			behind, dropped, s.recovery.DroppedBytes = nil, nil, 0
		} else if !c.inTable {
			behind, dropped = append(behind, c), append(dropped, tail)
		}
		s.recovery.DroppedBytes += tail
	}
	for i, c := range behind {
		if dropped[i] > 0 {
			s.recovery.DroppedFiles++
		}
		remove = append(remove, c.name())
		s.slots.remove(c.slot)
		c.release()
	}
	if err := t.apply(); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	if l := s.wal; l.durable > l.nextSeq {
		s.recovery.Lost = int64(l.durable - l.nextSeq)
		s.recovery.unsettled = true
		l.durable = l.nextSeq
	}
	return remove, nil
}

func (s *Store) loadTables(tb *metadata.Tables) error {
	t := &s.tables
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

// findChunks matches the chunk files with the table's rows. It returns the chunks of the log
// from the replay position on, in order, and the files to remove.
func (s *Store) findChunks(tb *metadata.Tables, cp format.Checkpoint) (logChunks []*chunk, remove []string, err error) {
	names, err := s.fs.List()
	if err != nil {
		return nil, nil, fmt.Errorf("list the chunks: %w", err)
	}
	known := map[uint32]format.Chunk{}
	rows := tb.Chunks
	for _, r := range rows {
		known[r.Slot] = r
		s.slots.put(s.foundChunk(r, true))
		s.wal.usedChunk(r.Seq)
	}
	for _, r := range tb.Forwarded {
		c := s.slots.get(r.Slot)
		if c == nil {
			s.slots.put(s.goneChunk(r.Slot, r.Seq, r.Blocks))
			continue
		}
		if c.seq != r.Seq {
			return nil, nil, corruptf("chunk %s has the sequence %d, and moved blocks of %d", c.name(), c.seq, r.Seq)
		}
		c.moved, c.hasMoved = r.Blocks, true
	}
	for _, name := range names {
		slot, ok := parseChunkName(name)
		if name == reserveName {
			continue // of a store whose folder is the chunks', too
		}
		if !ok {
			s.log.Warn("there is a file that is not ours among the chunks", "name", name)
			continue
		}
		r, isKnown := known[slot]
		if isKnown && r.Seq < cp.ChunkSeq {
			continue // before the replay position: the table has all of it
		}
		h, err := s.chunkHeader(name, slot)
		switch {
		case outOfReach(err):
			return nil, nil, fmt.Errorf("chunk file %s: %w", name, err)
		case err != nil:
			return nil, nil, fmt.Errorf("chunk file %s: %w (move it away to go on without it)", name, err)
		case isKnown && h.Seq != r.Seq:
			return nil, nil, corruptf("chunk file %s has the sequence %d, the table says %d", name, h.Seq, r.Seq)
		}
		s.wal.durable = max(s.wal.durable, h.Durable)
		switch {
		case isKnown:
			logChunks = append(logChunks, s.slots.get(slot))
		case h.Seq < max(cp.ChunkSeq, 1): // removed, or never finished
			remove = append(remove, name)
		case s.slots.get(slot) != nil:
			return nil, nil, corruptf("chunk file %s has the sequence %d, but blocks were moved from its slot", name, h.Seq)
		default:
			c := s.foundChunk(format.Chunk{Slot: slot, Seq: h.Seq, End: format.ChunkHeaderSize}, false)
			s.slots.put(c)
			logChunks = append(logChunks, c)
			s.wal.usedChunk(h.Seq)
		}
	}
	for _, r := range rows {
		if r.Seq < cp.ChunkSeq {
			continue
		}
		if _, found := slices.BinarySearch(names, chunkName(r.Slot)); !found {
			return nil, nil, corruptf("chunk file %s, where the log goes on, is missing", chunkName(r.Slot))
		}
	}
	slices.SortFunc(logChunks, func(a, b *chunk) int { return cmp.Compare(a.seq, b.seq) })
	return logChunks, remove, nil
}

// foundChunk is a chunk that was there when the store was opened.
func (s *Store) foundChunk(r format.Chunk, inTable bool) *chunk {
	c := newChunk(r.Slot, r.Seq, s.fs)
	c.size, c.end, c.live, c.written = r.End, r.End, r.Live, r.End
	c.sealed, c.inTable = true, inTable
	if c.live == 0 && inTable {
		s.markRow(c) // it died with its last owner; the next checkpoint removes it
	}
	return c
}

func parseChunkName(name string) (slot uint32, ok bool) {
	n, err := strconv.ParseUint(name, 16, 32)
	return uint32(n), err == nil && n < format.MaxSlots && chunkName(uint32(n)) == name
}

// chunkHeader reads a chunk file's header. One of zeros has the sequence 0:
// power failed while the chunk was made.
func (s *Store) chunkHeader(name string, slot uint32) (h format.ChunkHeader, err error) {
	f, err := s.fs.Open(name)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	head := make([]byte, format.ChunkHeaderSize)
	n, err := readFull(f, head, 0)
	if err != nil {
		return h, err
	}
	if n < len(head) || format.IsZero(head) {
		return format.ChunkHeader{Slot: slot}, nil
	}
	h, err = format.DecodeChunkHeader(head)
	if err == nil && (h.Slot != slot || h.UUID != s.wal.uuid) {
		err = corruptf("it belongs to slot %d of store %x", h.Slot, h.UUID)
	}
	return h, err
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

// firstRecord returns the number of a chunk's first record; 0: none verifies.
func firstRecord(c *chunk) (seq uint64, err error) {
	f, err := c.handle()
	if err != nil {
		return 0, err
	}
	head := make([]byte, format.RecordHeaderSize)
	if n, err := readFull(f, head, format.ChunkHeaderSize); err != nil || n < len(head) {
		return 0, err
	}
	h, err := format.DecodeRecordHeader(head, c.seq, format.ChunkHeaderSize)
	if err != nil {
		return 0, nil
	}
	payload := make([]byte, h.PayloadLen)
	n, err := readFull(f, payload, format.ChunkHeaderSize+format.RecordHeaderSize)
	if err != nil || n < len(payload) || h.VerifyPayload(payload) != nil {
		return 0, err
	}
	return h.Seq, nil
}

// replayChunk applies the records of a chunk from an offset on, up to the first that does not verify, does not have
// the next sequence number, or has the number limit. If all of them were made durable once, what its summary says of
// them is enough. It returns how many there were, and how many bytes behind them were written to the log.
func (s *Store) replayChunk(t *batch, c *chunk, from uint32, limit uint64) (records int, dropped int64, err error) {
	f, err := c.handle()
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, corruptf("the file is missing")
	}
	if err != nil {
		return 0, 0, err
	}
	size, err := f.Size()
	if err != nil {
		return 0, 0, err
	}
	c.size = uint32(min(size, format.MaxChunkSize))
	sum, err := readSummary(f, c, c.size)
	if err != nil {
		return 0, 0, err
	}
	before := s.wal.nextSeq
	if sum != nil && sum.before(s.wal.durable) {
		err = s.replaySummary(t, c, sum, from, limit)
		if s.wal.nextSeq > before {
			s.recovery.Summaries++
		}
	} else {
		err = s.replayRecords(t, c, from, limit)
	}
	if err != nil {
		return 0, 0, err
	}
	records = int(s.wal.nextSeq - before)
	s.recovery.Records += int64(records)
	c.written = c.end
	s.markRow(c) // if it is dead the next checkpoint removes it
	switch {
	case sum == nil:
		s.ends = append(s.ends, c)
		r := &recordReader{f: f, c: c, off: c.end}
		dropped, err = r.tail()
	case c.end < sum.End:
		s.ends = append(s.ends, c)
		dropped = int64(sum.End - c.end)
		s.recovery.unsettled = true
	}
	return records, dropped, err
}

// replaySummary applies what a summary says of the records from an offset on. Only events and moved records are read:
// what they say is not in it.
func (s *Store) replaySummary(t *batch, c *chunk, sum *summary, from uint32, limit uint64) (err error) {
	c.end = from
	r := &recordReader{f: c.file, c: c, readOnly: true}
	bad := sum.each(func(seq uint64, off uint32, e *format.SummaryEntry) bool {
		if off < from {
			return true
		}
		if off != c.end || seq != s.wal.nextSeq || seq >= limit {
			return false
		}
		var payload []byte
		var h *format.RecordHeader
		if e.Kind == format.KindEvent || e.Kind == format.KindMoved {
			r.off = off
			if h, payload, err = r.next(seq); h == nil {
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
	return errors.Join(err, bad)
}

// replayed goes past a record.
func (s *Store) replayed(c *chunk, size int) {
	s.wal.nextSeq++
	c.end += uint32(size)
	s.recovery.Bytes += int64(size)
}

// replayRecords reads and applies the records from an offset on.
func (s *Store) replayRecords(t *batch, c *chunk, from uint32, limit uint64) error {
	c.end = from
	r := &recordReader{f: c.file, c: c, off: from, at: from, readOnly: s.readOnly != nil}
	for s.wal.nextSeq < limit {
		h, payload, err := r.next(s.wal.nextSeq)
		if err != nil {
			return err
		}
		if h == nil {
			break
		}
		e := format.SummaryEntry{Kind: h.Kind, Branch: h.Branch, Block: h.Block, Blocks: h.Blocks, Size: h.Size()}
		if h.Kind == format.KindHole {
			n, err := format.DecodeHole(payload, h.Block)
			if err != nil {
				return err
			}
			e.Blocks = int(min(n, format.LeafBlocks+1)) // more is refused
		}
		if err := s.replayRecord(t, &e, h, payload, c, c.end); err != nil {
			return fmt.Errorf("record %d at %d: %w", h.Seq, c.end, err)
		}
		s.replayed(c, e.Size)
	}
	if c.end > from {
		if !r.readOnly {
			s.wal.needSync(c)
		}
	}
	return r.writeBack()
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
		s.admin = true
		return s.tables.apply(&ev, s.gen)
	case format.KindMoved:
		return s.replayMoved(h, payload, c, off)
	}
	b := s.tables.branches[e.Branch]
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
	f   storage.File
	c   *chunk
	off uint32 // of the next record
	win []byte // bytes of the file from winOff on
	at  uint32 // winOff

	readOnly bool // what is read is durable, and not written back
}

const readWindow = 128 << 10 // or one record, if that is larger

// next returns the record at off if it verifies and has the number seq, or nil.
func (r *recordReader) next(seq uint64) (*format.RecordHeader, []byte, error) {
	head, err := r.bytes(format.RecordHeaderSize)
	if err != nil || head == nil {
		return nil, nil, err
	}
	h, err := format.DecodeRecordHeader(head, r.c.seq, r.off)
	if err != nil || h.Seq != seq {
		return nil, nil, nil // the log ends here
	}
	rec, err := r.bytes(h.Size())
	if err != nil || rec == nil {
		return nil, nil, err
	}
	payload := rec[format.RecordHeaderSize : format.RecordHeaderSize+h.PayloadLen]
	if h.VerifyPayload(payload) != nil {
		return nil, nil, nil
	}
	r.off += uint32(h.Size())
	return &h, payload, nil
}

// bytes returns n bytes from off on, or nil where the file ends before.
func (r *recordReader) bytes(n int) ([]byte, error) {
	if r.off < r.at || r.off+uint32(n) > r.at+uint32(len(r.win)) {
		if err := r.load(max(n, readWindow), r.off); err != nil {
			return nil, err
		}
	}
	if r.off+uint32(n) > r.at+uint32(len(r.win)) {
		return nil, nil
	}
	return r.win[r.off-r.at:][:n], nil
}

// writeBack writes the window's verified records once more. A process whose sync has failed may
// have left records that the page cache calls clean and that the disk does not have: only
// what is written again is synced again.
func (r *recordReader) writeBack() error {
	if r.readOnly || r.off <= r.at {
		return nil
	}
	_, err := r.f.WriteAt(r.win[:r.off-r.at], int64(r.at))
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
			return int64(last - end), err
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

// removeFiles removes chunk files that no table row and no record refers to.
func (s *Store) removeFiles(names []string) error {
	for _, name := range names {
		if err := s.fs.Remove(name); err != nil {
			return fmt.Errorf("remove chunk file %s: %w", name, err)
		}
	}
	return nil
}
