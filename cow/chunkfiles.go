package cow

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// findChunks matches the chunk files with the rows of the table. It returns the chunks of the log from the replay
// position on, in order, and the files that belong to neither the log nor the table.
func (s *Store) findChunks(tb *metadata.Tables, cp format.Checkpoint) (logChunks []*chunk, left []leaving, err error) {
	names, err := s.fs.List()
	if err != nil {
		return nil, nil, fmt.Errorf("list the chunks: %w", err)
	}
	known, err := s.tableChunks(tb)
	if err != nil {
		return nil, nil, err
	}
	if err := s.proveRows(tb, names); err != nil {
		return nil, nil, err
	}
	f := foundFiles{s: s, known: known, cp: cp}
	for _, name := range names {
		slot, ok := wal.ParseChunkName(name)
		switch {
		case name == wal.ReserveName, name == wal.MarkName, slices.Contains(metadata.CopyNames[:], name): // here if the store's folder is also the folder of the chunks
		case !ok:
			f.strange = append(f.strange, name)
		default:
			if err := f.add(name, slot); err != nil {
				return nil, nil, err
			}
		}
	}
	if len(f.strange) > 0 {
		s.log.Warn("there are files that are not ours among the chunks", "files", len(f.strange), "first", firstOf(f.strange))
	}
	whole := f.findMissing(tb, names)
	for i := range f.old {
		if err := s.judge(&f.old[i], cp, whole); err != nil {
			return nil, nil, err
		}
	}
	slices.SortFunc(f.log, func(a, b *chunk) int { return cmp.Compare(a.Seq, b.Seq) })
	return f.log, append(f.left, f.old...), nil
}

// foundFiles sorts the files that are found among the chunks.
type foundFiles struct {
	s     *Store
	known map[uint32]format.Chunk // the table's rows, by slot
	cp    format.Checkpoint

	log     []*chunk  // from the replay position on
	left    []leaving // neither the table's nor the log's
	old     []leaving // files without a row, of chunks before the replay position
	strange []string  // names that are not chunk names
}

// add decides what the file of a slot is.
func (f *foundFiles) add(name string, slot uint32) error {
	s := f.s
	r, isKnown := f.known[slot]
	if isKnown && r.Seq < f.cp.ChunkSeq {
		return nil // the table has all of its records
	}
	h, err := s.wal.Header(name, slot)
	if err == nil && isKnown && h.Seq == 0 {
		err = fault.Corruptf("it is missing")
	}
	if errors.Is(err, ErrCorrupt) || fault.IsUnreadable(err) {
		if err := s.repair(&LogDamage{Chunk: name, Err: err}); err != nil {
			return err
		}
		if !isKnown {
			f.left = append(f.left, leaving{name: name, as: wal.AsDamaged})
			return nil
		}
		h, err = format.ChunkHeader{Slot: slot, Seq: r.Seq}, nil
	}
	if err == nil {
		err = inTime(h, f.cp)
	}
	if err != nil {
		return fmt.Errorf("chunk file %s: %w", name, err)
	}
	s.wal.KnowDurable(h.Durable)
	switch {
	case isKnown && h.Seq != r.Seq:
		return fault.Corruptf("chunk file %s has the sequence %d, the table says %d", name, h.Seq, r.Seq)
	case isKnown:
		f.log = append(f.log, s.slots.get(slot))
	case h.Seq < max(f.cp.ChunkSeq, 1):
		f.old = append(f.old, leaving{name: name, seq: h.Seq})
	case s.slots.get(slot) != nil:
		return fault.Corruptf("chunk file %s has the sequence %d, but blocks were moved from its slot", name, h.Seq)
	default:
		c := s.foundChunk(format.Chunk{Slot: slot, Seq: h.Seq, End: format.ChunkHeaderSize}, false)
		s.slots.put(c)
		f.log = append(f.log, c)
		s.wal.UsedChunk(h.Seq)
	}
	return nil
}

// findMissing looks for the files of the table's chunks, and reports whether all are there. The replay will miss those
// of the log.
func (f *foundFiles) findMissing(tb *metadata.Tables, names []string) (whole bool) {
	whole = true
	var missing []string
	for _, r := range tb.Chunks {
		if _, found := slices.BinarySearch(names, wal.ChunkName(r.Slot)); found {
			continue
		}
		whole = false
		if r.Seq >= f.cp.ChunkSeq {
			f.log = append(f.log, f.s.slots.get(r.Slot))
			continue
		}
		missing = append(missing, wal.ChunkName(r.Slot))
	}
	if len(missing) > 0 {
		f.s.log.Error("chunk files are missing; run check", "chunks", len(missing), "first", firstOf(missing))
	}
	return whole
}

// firstOf returns the first few names, so that a warning stays on one line however many there are.
func firstOf(names []string) []string { return names[:min(len(names), 3)] }

// inTime refuses a table that is older than the checkpoint in a chunk's header. That checkpoint's commit was durable
// before the header was written.
func inTime(h format.ChunkHeader, cp format.Checkpoint) error {
	if h.Checkpoint > cp.Seq {
		return fault.Corruptf("the table is older than the log: it is as of record %d, and has been as of record %d", cp.Seq, h.Checkpoint)
	}
	return nil
}

// proveRows checks that the files of the table's chunks are those chunks. It does nothing if the table is known to be
// the one that the last owner left. It refuses the table if a file's header has a later checkpoint than the table, or
// if a file holds a younger chunk, which belongs to a younger table. Any other mismatch is damage to that one chunk,
// which its readers and Check report.
func (s *Store) proveRows(tb *metadata.Tables, names []string) error {
	if s.meta.Verified() {
		return nil
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, min(len(tb.Chunks), headerReaders))
	for w := range errs {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(tb.Chunks)) && errs[w] == nil; i = next.Add(1) - 1 {
				r := tb.Chunks[i]
				name := wal.ChunkName(r.Slot)
				if _, found := slices.BinarySearch(names, name); !found {
					continue
				}
				h, err := s.wal.Header(name, r.Slot)
				if err != nil || r.Seq >= tb.Checkpoint.ChunkSeq {
					continue
				}
				if err = inTime(h, tb.Checkpoint); err == nil && h.Seq > r.Seq {
					err = fault.Corruptf("the table is older than the log: it has the sequence %d for it, and the file has %d", r.Seq, h.Seq)
				}
				if err != nil {
					errs[w] = fmt.Errorf("chunk file %s: %w", name, err)
				}
			}
		})
	}
	wg.Wait()
	return cmp.Or(errs...) // one error is enough
}

// headerReaders is the number of chunk headers that are read at once.
const headerReaders = 16

// tableChunks puts the chunks that have a row into the slot table, and returns the rows by slot.
func (s *Store) tableChunks(tb *metadata.Tables) (known map[uint32]format.Chunk, err error) {
	known = map[uint32]format.Chunk{}
	for _, r := range tb.Chunks {
		known[r.Slot] = r
		s.slots.put(s.foundChunk(r, true))
		s.wal.UsedChunk(r.Seq)
	}
	for _, r := range tb.Forwarded {
		c := s.slots.get(r.Slot)
		if c == nil {
			s.slots.put(s.goneChunk(r.Slot, r.Seq, r.Blocks))
			continue
		}
		if c.Seq != r.Seq {
			return nil, fault.Corruptf("chunk %s has the sequence %d, and moved blocks of %d", c.Name(), c.Seq, r.Seq)
		}
		c.moved, c.hasMoved = r.Blocks, true
	}
	return known, nil
}

// foundChunk returns a chunk that was there when the store was opened.
func (s *Store) foundChunk(r format.Chunk, inTable bool) *chunk {
	c := &chunk{Chunk: wal.FoundChunk(r.Slot, r.Seq, r.End, s.fs), live: r.Live, inTable: inTable}
	if c.live == 0 && inTable {
		s.markRow(c) // it was dead when its last owner ended; the next checkpoint removes it
	}
	return c
}

// leaving is a chunk file that belongs to neither the table nor the log.
type leaving struct {
	name string
	seq  uint64 // sequence number of the chunk; 0: the file has no header
	as   string // why the file is set aside; "": nobody needs anything in it, and it is removed
}

// droppedKept is the number of dropped files that are kept, of those from the last logs that ended early.
const droppedKept = 4

// judge decides what becomes of a file before the replay position that has no row. A chunk dies when a checkpoint takes
// its row away, and its file is removed after that. A chunk that was still being made has no records. Any other file is
// set aside. If the file of a row is missing (whole is false), the table may be another one, and a file with a header
// is set aside in any case.
func (s *Store) judge(f *leaving, cp format.Checkpoint, whole bool) error {
	slot, _ := wal.ParseChunkName(f.name)
	c := newChunk(slot, f.seq, s.fs)
	defer c.Release()
	file, err := c.Handle()
	if err != nil {
		return err
	}
	if f.seq == 0 { // it was being made; but a header that was overwritten with zeros looks the same
		empty, err := hasOnlyZeros(file)
		if !empty {
			f.as = wal.AsUnknown
		}
		return fault.IgnoreUnreadable(err)
	}
	first, err := c.FirstSeq()
	if err != nil {
		return err
	}
	tail := int64(0)
	if first == 0 {
		if tail, err = c.Tail(format.ChunkHeaderSize, 0); err != nil {
			return err
		}
	}
	switch {
	case first >= cp.Seq: // an owner that was about to remove the file moved the replay position behind it
		f.as = wal.AsDropped
	case tail > 0, !whole:
		f.as = wal.AsUnknown
	}
	return nil
}

// hasOnlyZeros reports whether a file holds nothing but zeros. It returns false for a file that cannot be read.
func hasOnlyZeros(f storage.File) (bool, error) {
	p := make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(p)) {
		n, err := wal.ReadFull(f, p, off)
		if err != nil || !format.IsZero(p[:n]) {
			return false, err
		}
		if n < len(p) {
			return true, nil
		}
	}
}

// clear removes the files that nobody needs, and then sets the others aside. Removing comes first because it may make
// room for the directory of those set aside.
func (s *Store) clear(left []leaving) error {
	for _, f := range left {
		if f.as == "" {
			if err := s.fs.Remove(f.name); err != nil {
				return fmt.Errorf("remove chunk file %s: %w", f.name, err)
			}
		}
	}
	for _, f := range left {
		if f.as != "" {
			if err := s.setAside(f.name, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// setAside moves a file out of the chunks folder. The file is kept under a name that says why, as given by f.
func (s *Store) setAside(name string, f leaving) error {
	as := wal.AsideName(f.as, f.seq, f.name)
	err := s.fs.SetAside(name, as)
	for errors.Is(err, ErrNoSpace) && s.reserve.Give(wal.ElbowRoom) { // the folder itself needs blocks
		err = s.fs.SetAside(name, as)
	}
	if err != nil {
		return fmt.Errorf("set chunk file %s aside: %w", f.name, err)
	}
	s.log.Warn("a chunk file was set aside", "chunk", f.name, "as", asideDir+"/"+as)
	if f.as != wal.AsDropped {
		return nil
	}
	return s.fs.PruneAside(wal.AsDropped+"-", droppedKept)
}
