package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	s.cleanable = cp.ChunkSeq
	logChunks, remove, err := s.findChunks(tb, cp)
	if err != nil {
		return nil, err
	}
	ended := false
	for i, c := range logChunks {
		from := uint32(format.ChunkHeaderSize)
		if i == 0 && c.seq == cp.ChunkSeq {
			from = cp.Offset
		}
		before := s.recovery.DroppedBytes
		if !ended {
			n, err := s.replayChunk(c, from)
			if err != nil {
				return nil, fmt.Errorf("replay chunk %s: %w", c.name(), err)
			}
			// The next chunk goes on with the next sequence number, or nothing does.
			ended = n == 0 && c.seq > cp.ChunkSeq
		}
		if ended && !c.inTable {
			if s.recovery.DroppedBytes > before {
				s.recovery.DroppedFiles++
			}
			remove = append(remove, c.name())
			s.slots.remove(c.slot)
			c.release()
		}
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
	t.nextID = max(t.nextID, tb.Checkpoint.NextID)
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
		s.addChunk(r, true)
		s.wal.nextChunk = max(s.wal.nextChunk, r.Seq+1)
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
		c.moved = r.Blocks
	}
	for _, name := range names {
		slot, ok := parseChunkName(name)
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
		case err != nil:
			return nil, nil, fmt.Errorf("chunk file %s: %w (move it away to go on without it)", name, err)
		case isKnown && h.Seq != r.Seq:
			return nil, nil, corruptf("chunk file %s has the sequence %d, the table says %d", name, h.Seq, r.Seq)
		case isKnown:
			logChunks = append(logChunks, s.slots.get(slot))
		case h.Seq < max(cp.ChunkSeq, 1): // removed, or never finished
			remove = append(remove, name)
		case s.slots.get(slot) != nil:
			return nil, nil, corruptf("chunk file %s has the sequence %d, but blocks were moved from its slot", name, h.Seq)
		default:
			c := s.addChunk(format.Chunk{Slot: slot, Seq: h.Seq, End: format.ChunkHeaderSize}, false)
			logChunks = append(logChunks, c)
			s.wal.nextChunk = max(s.wal.nextChunk, h.Seq+1)
		}
	}
	for _, r := range rows {
		if r.Seq >= cp.ChunkSeq && !slices.Contains(names, chunkName(r.Slot)) {
			return nil, nil, corruptf("chunk file %s, where the log goes on, is missing", chunkName(r.Slot))
		}
	}
	slices.SortFunc(logChunks, func(a, b *chunk) int { return int(int64(a.seq) - int64(b.seq)) })
	return logChunks, remove, nil
}

func (s *Store) addChunk(r format.Chunk, inTable bool) *chunk {
	c := newChunk(r.Slot, r.Seq, s.fs)
	c.size, c.end, c.live, c.written = r.End, r.End, r.Live, r.End
	c.sealed, c.inTable = true, inTable
	if c.live == 0 && inTable {
		s.markRow(c) // it died with its last owner; the next checkpoint removes it
	}
	s.slots.put(c)
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

// replayChunk applies the records of a chunk from an offset on, up to the first that
// does not verify or does not have the next sequence number.
func (s *Store) replayChunk(c *chunk, from uint32) (records int, err error) {
	f, err := c.handle()
	if errors.Is(err, fs.ErrNotExist) {
		return 0, corruptf("the file is missing")
	}
	if err != nil {
		return 0, err
	}
	size, err := f.Size()
	if err != nil {
		return 0, err
	}
	c.size = uint32(min(size, format.MaxChunkSize))
	r := &recordReader{f: f, c: c, off: from, at: from}
	for {
		off := r.off
		h, payload, err := r.next(s.wal.nextSeq)
		if err != nil {
			return records, err
		}
		if h == nil {
			break
		}
		if err := s.replayRecord(h, payload, c, off); err != nil {
			return records, fmt.Errorf("record %d at %d: %w", h.Seq, off, err)
		}
		s.wal.nextSeq++
		records++
		c.end = r.off
		s.recovery.Bytes += int64(h.Size())
	}
	if err := r.writeBack(); err != nil {
		return records, err
	}
	s.recovery.Records += int64(records)
	c.end, c.written = r.off, r.off
	if records > 0 {
		s.wal.needSync(c)
	}
	s.markRow(c) // if it is dead the next checkpoint removes it
	dropped, err := r.tail()
	s.recovery.DroppedBytes += dropped
	return records, err
}

func (s *Store) replayRecord(h *format.RecordHeader, payload []byte, c *chunk, off uint32) error {
	if h.Kind == format.KindEvent {
		var ev format.Event
		if err := format.DecodeEvent(payload, &ev); err != nil {
			return err
		}
		s.admin = true
		return s.tables.apply(&ev, s.gen)
	}
	n := uint64(h.Blocks)
	if h.Kind == format.KindHole {
		var err error
		if n, err = format.DecodeHole(payload, h.Block); err != nil {
			return err
		}
	}
	if h.Kind == format.KindMoved {
		return s.replayMoved(h, payload, c, off)
	}
	b := s.tables.branches[h.Branch]
	if b == nil {
		return corruptf("branch %d does not exist", h.Branch)
	}
	first := h.Block % format.LeafBlocks
	if first+n > format.LeafBlocks {
		return corruptf("%d blocks from %d on are not of one leaf", n, h.Block)
	}
	lf, sh, err := s.headLeaf(leafKey{b, uint32(h.Block / format.LeafBlocks), head})
	if err != nil {
		return err
	}
	defer sh.mu.Unlock()
	if h.Kind == format.KindHole {
		s.applyHole(lf, int(first), int(n))
	} else {
		s.applyData(lf, h, c, off)
	}
	return nil
}

// recordReader reads the records of a chunk in order, through a window.
type recordReader struct {
	f   storage.File
	c   *chunk
	off uint32 // of the next record
	win []byte // bytes of the file from winOff on
	at  uint32 // winOff
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
	if r.off <= r.at {
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

// tail is how many bytes behind the end of the log were written, as far as can be
// seen: up to a stretch of zeros.
func (r *recordReader) tail() (n int64, err error) {
	for off := r.off; off < format.MaxChunkSize; off += uint32(len(r.win)) {
		if err := r.load(readWindow, off); err != nil {
			return n, err
		}
		used := bytes.TrimRight(r.win, "\x00")
		if len(used) == 0 {
			break
		}
		n = int64(off-r.off) + int64(len(used))
	}
	return n, nil
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
