package cow

import (
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// hotUnit is the size into which writes are cut. Written data may soon be read or overwritten in part, and each block
// that is read costs reading and decompressing its whole unit. Larger units would save another tenth of the space, but
// double the cost of a random read.
const hotUnit = 4 * format.BlockSize

// errChanged is returned if a block is no longer what a partial write was merged with.
var errChanged = errors.New("block changed")

// errEvicted is returned if a leaf has left the cache since it was loaded.
var errEvicted = errors.New("leaf evicted")

// scratch is the memory of one operation.
type scratch struct {
	unit [format.UnitSize]byte // a unit that is merged with the blocks' old content
	comp []byte                // a unit compressed
	plan ReadPlan

	solid bool // zeros are written as data that takes space, not as holes
	small bool // a small write, which may use the last of the room for new mappings
}

func newScratch() any { return &scratch{comp: make([]byte, 0, format.MaxCompressed)} }

// WriteAt writes p at off, both of any alignment. When it returns, the write is acknowledged but not durable; Flush
// makes it durable. A write is split at multiples of 16 KiB, and only each 4 KiB block is written atomically.
func (d *Device) WriteAt(p []byte, off int64) (n int, err error) {
	if err := d.checkWrite(off, int64(len(p))); err != nil {
		return 0, fmt.Errorf("write %s: %w", d.ref, err)
	}
	if err := d.fits(p, off, int64(len(p))); err != nil {
		return 0, fmt.Errorf("write %s at %d: %w", d.ref, off, err)
	}
	sc := d.s.scratch.Get().(*scratch)
	defer d.s.scratch.Put(sc)
	sc.small = len(p) <= smallWrite
	for n < len(p) {
		at := off + int64(n)
		part := p[n:]
		part = part[:min(int64(len(part)), hotUnit-at%hotUnit)]
		if err := d.writeUnit(sc, part, at); err != nil {
			return n, fmt.Errorf("write %s at %d: %w", d.ref, at, err)
		}
		n += len(part)
	}
	if err := d.s.answer(); err != nil {
		return 0, fmt.Errorf("write %s at %d: %w", d.ref, off, err)
	}
	return n, nil
}

// expect is what must still hold when a record is installed: that the first and the last block, if they were merged,
// are what they were merged with, and that the volume still has the size that was looked at.
type expect struct {
	first, last       uint64 // none: the block is covered whole
	wasFirst, wasLast content
	size              int64 // of the volume; 0: any
	// inherited, unless it is nil, are the entries of all blocks, which the branch itself has not put there.
	inherited []format.Entry
}

const none = ^uint64(0)

// writeUnit writes p, which lies within one unit.
func (d *Device) writeUnit(sc *scratch, p []byte, at int64) error {
	first, skip := uint64(at/format.BlockSize), int(at%format.BlockSize)
	if skip == 0 && len(p)%format.BlockSize == 0 {
		return d.putBlocks(sc, p, first, nil)
	}
	n := (skip + len(p) + format.BlockSize - 1) / format.BlockSize
	buf := sc.unit[:n*format.BlockSize]
	for {
		ex, err := d.readEdges(sc, buf, first, skip, len(p))
		if err != nil {
			return err
		}
		copy(buf[skip:], p)
		err = d.putBlocks(sc, buf, first, &ex)
		if !errors.Is(err, errChanged) {
			return err
		}
	}
}

// readEdges reads those blocks at the ends of buf that a write of n bytes at skip covers only in part.
func (d *Device) readEdges(sc *scratch, buf []byte, first uint64, skip, n int) (expect, error) {
	last := first + uint64(len(buf)/format.BlockSize) - 1
	ex := expect{first: first, last: last}
	var err error
	if skip > 0 || skip+n < format.BlockSize {
		if ex.wasFirst, err = d.readBlock(sc, buf[:format.BlockSize], first); err != nil {
			return ex, err
		}
	} else {
		ex.first = none
	}
	switch {
	case (skip+n)%format.BlockSize == 0:
		ex.last = none
	case last == first:
		ex.last, ex.wasLast = ex.first, ex.wasFirst
	default:
		ex.wasLast, err = d.readBlock(sc, buf[len(buf)-format.BlockSize:], last)
	}
	return ex, err
}

// unchangedSince reports whether the n blocks of the leaf from block on still are what ex expects. The caller holds mu.
func (s *Store) unchangedSince(d *Device, ex *expect, lf *leafcache.Leaf, block uint64, n int) bool {
	if ex == nil {
		return true
	}
	if ex.size != 0 && ex.size != d.v.Size {
		return false
	}
	for i, e := range ex.inherited {
		if n := int(block%format.LeafBlocks) + i; lf.Entry(n) != e || lf.IsChanged(n) {
			return false
		}
	}
	same := func(b uint64, was content) bool {
		if b < block || b >= block+uint64(n) { // none, or a block of another record
			return true
		}
		e := lf.Entry(int(b % format.LeafBlocks))
		return e == was.e && (e.IsHole() || s.slots.get(e.Slot()) == was.c)
	}
	return same(ex.first, ex.wasFirst) && same(ex.last, ex.wasLast)
}

// putBlocks writes whole blocks that lie within one unit. It writes runs of zeros as holes, unless sc.solid is set, and
// all other blocks as data.
func (d *Device) putBlocks(sc *scratch, data []byte, first uint64, ex *expect) error {
	for len(data) > 0 {
		zero := format.IsZero(data[:format.BlockSize])
		n := format.BlockSize
		for n < len(data) && format.IsZero(data[n:n+format.BlockSize]) == zero {
			n += format.BlockSize
		}
		var err error
		switch {
		case zero && sc.solid:
			err = d.putSingles(sc, data[:n], first, ex)
		case zero:
			err = d.s.putHole(d, first, n/format.BlockSize, ex)
		default:
			err = d.putData(sc, data[:n], first, ex)
		}
		if err != nil {
			return err
		}
		data, first = data[n:], first+uint64(n/format.BlockSize)
	}
	return nil
}

func (d *Device) putData(sc *scratch, data []byte, first uint64, ex *expect) error {
	blocks := len(data) / format.BlockSize
	c := d.v.codec.get()
	payload, codec := c.Compress(sc.comp, data)
	d.v.codec.put(c)
	if codec == format.Raw && blocks > 1 {
		return d.putSingles(sc, data, first, ex)
	}
	h := d.dataHeader(first, blocks, codec, payload)
	return d.s.writeRecord(d, &h, payload, blocks, ex, sc.small)
}

// dataHeader returns the header of a record with a unit.
func (d *Device) dataHeader(first uint64, blocks int, codec format.Codec, payload []byte) format.RecordHeader {
	return format.RecordHeader{
		Block: first, Branch: d.b.ID, Kind: format.KindData, Codec: codec, Blocks: blocks,
		PayloadLen: len(payload), PayloadCRC: format.Checksum(payload),
	}
}

// putSingles writes blocks that do not compress as one record each, so that reading one costs no more than its own
// size.
func (d *Device) putSingles(sc *scratch, data []byte, first uint64, ex *expect) error {
	for ; len(data) > 0; data, first = data[format.BlockSize:], first+1 {
		block := data[:format.BlockSize]
		h := d.dataHeader(first, 1, format.Raw, block)
		if err := d.s.writeRecord(d, &h, block, 1, ex, sc.small); err != nil {
			return err
		}
	}
	return nil
}

// putHole unmaps n blocks of one leaf.
func (s *Store) putHole(d *Device, first uint64, n int, ex *expect) error {
	var payload [format.HoleSize]byte
	format.EncodeHole(payload[:], uint64(n))
	h := format.RecordHeader{
		Block: first, Branch: d.b.ID, Kind: format.KindHole, Blocks: 1,
		PayloadLen: len(payload), PayloadCRC: format.Checksum(payload[:]),
	}
	return s.writeRecord(d, &h, payload[:], n, ex, false)
}

// writeRecord writes a record of n blocks of one leaf. Where it has to wait for something, it waits and tries again.
func (s *Store) writeRecord(d *Device, h *format.RecordHeader, payload []byte, n int, ex *expect, small bool) error {
	if h.Kind == format.KindData {
		s.cleaner.pacer.wait(h.Size())
	}
	k := d.b.leaf(uint32(h.Block/format.LeafBlocks), head)
	waited, cleared, refused := false, false, 0
	for {
		err := s.tryWriteRecord(d, h, payload, n, ex, waited, small)
		if errors.Is(err, errEvicted) {
			if err = s.cache.Ensure(k); err == nil {
				continue
			}
		}
		switch {
		case err == nil, errors.Is(err, errNothing):
			return nil
		case errors.Is(err, ErrNoSpace) && h.Kind == format.KindHole && !cleared && s.clearEvents() == nil:
			cleared = true
		case errors.Is(err, errNoNew):
			if more, merr := s.moreForNew(refused); !more || merr != nil {
				return errors.Join(err, merr)
			}
			refused++
		case errors.Is(err, errFull):
			if err := s.makeRoom(purposeIn(h)); err != nil {
				return err
			}
		default:
			return err
		}
		waited = true
	}
}

// tryWriteRecord is one attempt of writeRecord. waited says that the writer has waited for a checkpoint.
func (s *Store) tryWriteRecord(d *Device, h *format.RecordHeader, payload []byte, n int, ex *expect, waited, small bool) error {
	hole := h.Kind == format.KindHole
	s.mu.Lock()
	defer s.mu.Unlock()
	first := int(h.Block % format.LeafBlocks)
	err := s.install(d.b, h, payload, n, purposeIn(h), waited, func(lf *leafcache.Leaf) error {
		switch end := h.Block + uint64(n); {
		case end > blocksOf(d.v.Size):
			return fmt.Errorf("block %d is behind the end (the volume has shrunk): %w", end-1, ErrInvalid)
		case !s.unchangedSince(d, ex, lf, h.Block, n):
			return errChanged
		case hole && lf.IsHole(first, n) && (ex == nil || ex.inherited == nil):
			return errNothing
		case hole:
			return nil
		}
		if err := d.overQuota(h.Size(), lf, first, n); err != nil {
			return err
		}
		if isNew(d.b, lf, first, n) {
			return s.roomForNew(h.Size(), small)
		}
		return nil
	})
	if err == nil && !hole {
		s.packed.add(n, h.Size())
		d.v.packed.add(n, h.Size())
	}
	return err
}

// clearEvents makes a checkpoint, to get back the chunks that events and holes took from the reserve. Nothing in these
// chunks is live.
func (s *Store) clearEvents() error {
	s.mu.Lock()
	gen := s.changes.gen
	s.mu.Unlock()
	return s.checkpointOf(gen)
}

// purposeIn returns the purpose for which a write takes room.
func purposeIn(h *format.RecordHeader) wal.Purpose {
	if h.Kind == format.KindHole {
		return wal.ForEvents
	}
	return wal.ForData
}

// mayDirty reports whether one more leaf may become dirty in this generation. A part of each generation is reserved for
// writers that have waited for a checkpoint, so that they need not wait for another. The caller holds mu.
func (s *Store) mayDirty(waited bool, p wal.Purpose) bool {
	limit := s.dirtyLimit
	if !waited {
		limit -= limit / 8
	}
	return s.cache.Unwritten() < limit && s.cache.Unwritten()+s.checkpoints.writing < 2*s.dirtyLimit && s.tableShort(1, p) <= 0
}

// makeRoom makes room for one more dirty leaf. If the table is short of room, it grows the table. Otherwise it waits
// until a checkpoint has begun to write the leaves that fill the cache, or has failed.
func (s *Store) makeRoom(p wal.Purpose) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if short := s.tableShort(1, p); short > 0 {
		// more is true if a checkpoint can free some room.
		more := s.cache.Unwritten()+s.checkpoints.writing+len(s.changes.regions)+s.checkpoints.writingRegions > 0 || s.awaitsReaper()
		s.mu.Unlock()
		err := s.growTable(short, p)
		s.mu.Lock()
		if err == nil || !more {
			return err
		}
	}
	if s.closed {
		return ErrClosed
	}
	gen, failures := s.changes.gen, s.checkpoints.failures
	if s.opts.checkpointInterval < 0 { // no other goroutine makes checkpoints
		s.mu.Unlock()
		defer s.mu.Lock()
		return s.checkpointOf(gen)
	}
	for s.changes.gen == gen {
		if s.checkpoints.failures != failures {
			return s.checkpoints.failure
		}
		if s.closed {
			return ErrClosed
		}
		wal.Poke(s.checkpoints.work)
		s.changes.taken.Wait()
	}
	return nil
}

// checkpointOf returns when a checkpoint of the generation gen, or of a later one, has committed. If no such checkpoint
// has been made by the time it gets checkpoints.mu, it makes one.
func (s *Store) checkpointOf(gen uint64) error {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	if s.checkpoints.committed.Load() >= gen {
		return nil
	}
	return s.checkpointLocked()
}

// checkpointDue wakes the checkpointer when a limit is reached. The caller holds mu.
func (s *Store) checkpointDue() {
	if s.opts.checkpointInterval < 0 {
		return
	}
	since := int64(s.wal.Appended() - s.checkpoints.at.Load())
	if since >= s.opts.checkpointBytes || s.cache.Unwritten() >= s.opts.checkpointLeaves {
		wal.Poke(s.checkpoints.work)
	}
}

// Flush makes all writes that were acknowledged before the call durable.
func (d *Device) Flush() error {
	if d.closed.Load() {
		return ErrClosed
	}
	if d.s.readOnly != nil {
		return nil // nothing needs to be made durable
	}
	if err := d.s.wal.Sync(); err != nil {
		return fmt.Errorf("flush %s: %w", d.ref, err)
	}
	return nil
}

// Discard unmaps the whole 4 KiB blocks in the range, which then read as zeros. Blocks that are only partly in the
// range do not change. The exception is the device's last block, if the device ends within it: Discard unmaps that
// block if the range covers the device's part of it.
func (d *Device) Discard(off, length int64) error {
	if err := d.checkWrite(off, length); err != nil {
		return fmt.Errorf("discard %s: %w", d.ref, err)
	}
	first, end := blocksOf(off), uint64(off+length)/format.BlockSize
	if size := d.Size(); off+length == size && blocksOf(size) > end {
		err := d.punchTo(first, end+1, size)
		if !errors.Is(err, errChanged) {
			return wrapIf(err, "discard %s", d.ref)
		}
	}
	return wrapIf(d.punch(first, end), "discard %s", d.ref)
}

// punchTo is punch up to and including the volume's last block, if the volume ends within that block, so that nothing
// lies behind it. If the volume's size has changed, something may lie there: the block then stays, and punchTo returns
// errChanged.
func (d *Device) punchTo(first, end uint64, size int64) error {
	return d.punchIf(first, end, &expect{first: none, last: none, size: size})
}

// punch unmaps blocks [first, end), with one record a leaf. It skips leaves that map nothing.
func (d *Device) punch(first, end uint64) error { return d.punchIf(first, end, nil) }

// punchIf is punch under the condition ex, which may be nil. It returns errChanged if ex does not hold.
func (d *Device) punchIf(first, end uint64, ex *expect) error {
	if first >= end {
		return nil
	}
	if err := d.s.live(); err != nil { // needed here because there may be no leaf to unmap
		return err
	}
	err := d.s.leaves(d.b, uint32(first/format.LeafBlocks), uint32((end-1)/format.LeafBlocks)+1, func(index uint32) error {
		from := max(first, uint64(index)*format.LeafBlocks)
		to := min(end, (uint64(index)+1)*format.LeafBlocks)
		return d.s.putHole(d, from, int(to-from), ex)
	})
	return errors.Join(err, d.s.answer())
}

// blocksOf returns the number of blocks that n bytes touch.
func blocksOf(n int64) uint64 { return uint64(n+format.BlockSize-1) / format.BlockSize }

func wrapIf(err error, text string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(text+": %w", append(args, err)...)
}
