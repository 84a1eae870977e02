package cow

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Records that snapshots hold are moved as they are, and forwarded: docs/reclaim.md, Cleaning.

// gathered is a list of records that snapshots may hold, with copies of their headers and payloads.
type gathered struct {
	records []record
	heads   []format.RecordHeader
	data    []byte
	from    uint32 // offset of the first record
}

func (g *gathered) reset() { g.records, g.heads, g.data = g.records[:0], g.heads[:0], g.data[:0] }

// add keeps a record, and copies its header and payload. (When heads or data grow into new memory, earlier records keep
// the old memory.)
func (g *gathered) add(r *record, off uint32) {
	if len(g.records) == 0 {
		g.from = off
	}
	n := len(g.data)
	g.heads, g.data = append(g.heads, *r.h), append(g.data, r.payload...)
	kept := *r
	kept.h = &g.heads[len(g.heads)-1]
	kept.payload = g.data[n:]
	kept.data = kept.payload[len(r.payload)-len(r.data):]
	g.records = append(g.records, kept)
}

// moveGathered moves those of the gathered records that snapshots hold. It holds the checkpoint lock, which keeps out
// the reaper, because the reaper works within checkpoints. Once a version's epoch has ended, only the reaper changes
// which version of a leaf owns a record.
//
// All records are moved in one turn of the lock: while much is being deleted, one checkpoint follows another, and the
// cleaner has to wait for each turn.
func (m *mover) moveGathered() (moved int, err error) {
	changed := m.again[:0]
	m.s.checkpoints.mu.Lock()
	for i := range m.held.records {
		r := &m.held.records[i]
		n, err := m.moveHeld(r)
		moved += n
		switch {
		case errors.Is(err, errChanged):
			changed = append(changed, i)
		case err != nil:
			m.s.checkpoints.mu.Unlock()
			m.met(r.here.Offset(), err)
			return moved, fmt.Errorf("record at %d: %w", r.here.Offset(), err)
		}
	}
	m.s.checkpoints.mu.Unlock()
	m.again = changed
	m.line = lineage{}
	for _, i := range changed { // the reaper has handed these to a head: look at them again
		n, err := m.moveAgain(&m.held.records[i])
		if moved += n; err != nil {
			m.met(m.held.records[i].here.Offset(), err)
			return moved, err
		}
	}
	m.held.reset()
	return moved, nil
}

// moveAgain moves one record, whether a head or a point owns it.
func (m *mover) moveAgain(r *record) (moved int, err error) {
	for {
		n, rest, err := m.writeOwn(r)
		if moved += n; err != nil || !rest {
			return moved, err
		}
		m.s.checkpoints.mu.Lock()
		n, err = m.moveHeld(r)
		m.s.checkpoints.mu.Unlock()
		if moved += n; !errors.Is(err, errChanged) {
			return moved, err
		}
		m.line = lineage{}
	}
}

// moveHeld copies a record that snapshots or clones hold, and notes where it is now. It returns errFull if a checkpoint
// has to come first, and errChanged if the record has another owner by now. The caller holds checkpoints.mu.
func (m *mover) moveHeld(r *record) (n int, err error) {
	// A moved record is logged with a mask of its live blocks, and a replay, which begins with the table, has to find
	// the same blocks alive. After an aborted checkpoint, memory and table differ.
	if m.s.checkpoints.lastAborted {
		return 0, errFull
	}
	m.s.mu.Lock()
	short := m.s.tableShort(1, wal.ForMoves) > 0 // room for the forward
	m.s.mu.Unlock()
	if short {
		return 0, errFull
	}
	was := r.of
	if ok, err := m.find(r); !ok || r.of != was || m.c.dead {
		if ok && r.of != was {
			err = errChanged
		}
		return 0, err
	}
	mask, err := m.ownedMask(r.h, r.name)
	if err == nil && mask != 0 {
		err = r.h.VerifyPayload(r.payload)
	}
	if err != nil || mask == 0 {
		return 0, err
	}
	data, codec, err := m.trim(r, mask)
	if err != nil {
		return 0, err
	}
	h := *r.h
	h.Codec = codec
	return m.forward(&h, data, r.name, mask)
}

// trim returns the content of a record with the blocks outside mask, which are dead, as zeros. Zeros take next to
// nothing. Otherwise the space of the dead blocks would not come back as long as a snapshot holds one of their
// neighbours.
func (m *mover) trim(r *record, mask uint16) (data []byte, codec format.Codec, err error) {
	if bits.OnesCount16(mask) == r.h.Blocks {
		return r.data, r.h.Codec, nil
	}
	unit := m.unit[:r.h.Blocks*format.BlockSize]
	if err := format.Decompress(r.h.Codec, unit, r.data); err != nil {
		return nil, 0, err
	}
	leaveOut(unit, mask)
	how := r.h.Codec
	if how == format.Raw { // Raw would store the zeros at full size
		how = format.S2
	}
	c := m.codecs[how]
	if c == nil {
		if c, err = format.NewCompressor(how, 0); err != nil {
			return nil, 0, err
		}
		m.codecs[how] = c
	}
	if out, codec := c.Compress(m.comp, unit); len(out) < len(r.data) {
		return out, codec, nil
	}
	return r.data, r.h.Codec, nil // it was compressed better than that
}

// leaveOut zeroes the blocks of a unit that are not in mask.
func leaveOut(unit []byte, mask uint16) {
	for i := 0; len(unit) > 0; i++ {
		if mask&(1<<i) == 0 {
			clear(unit[:format.BlockSize])
		}
		unit = unit[format.BlockSize:]
	}
}

// ownedMask returns a mask of those blocks of a record that the version that owns the record has. All live blocks of a
// record have one owner: they were put together, and the reaper hands them on to a single successor. If the owner is
// the present epoch of a volume's head by now, others may change it at any time, and ownedMask returns errChanged. The
// caller holds checkpoints.mu.
func (m *mover) ownedMask(h *format.RecordHeader, name format.Entry) (mask uint16, err error) {
	s := m.s
	s.mu.Lock()
	b, present := s.catalog.branches[h.Branch], head
	if b != nil && b.volume != nil {
		present = b.Epoch
	}
	s.mu.Unlock()
	if b == nil {
		return 0, nil
	}
	index := uint32(h.Block / format.LeafBlocks)
	for asOf := head; asOf > 0; {
		// While the head is being reaped, the cache still has what is gone, and the table has all that is left.
		epoch, err := s.version(b, index, asOf, !b.reaping, &m.leaf)
		if err != nil || epoch == 0 {
			return 0, err
		}
		if _, gone := s.changes.dropping[metadata.Version{Branch: b.ID, Leaf: index, Epoch: epoch}]; !gone {
			mask := ownedIn(&m.leaf, h, name)
			switch {
			case mask != 0 && epoch > present:
				return 0, fault.Corruptf("branch %d leaf %d has a version of epoch %d, and is at %d", b.ID, index, epoch, present)
			case mask != 0 && epoch == present:
				return 0, errChanged
			case mask != 0:
				return mask, nil
			}
		}
		asOf = epoch - 1
	}
	return 0, nil
}

// forward copies a whole record, and notes where it is now. A version of an ended epoch owns those of its blocks that
// are in mask. The caller holds checkpoints.mu.
func (m *mover) forward(h *format.RecordHeader, payload []byte, name format.Entry, mask uint16) (n int, err error) {
	s := m.s
	m.pay = append(m.pay[:0], make([]byte, format.MovedSize)...)
	format.Moved{From: name, Mask: mask}.Encode(m.pay)
	m.pay = append(m.pay, payload...)
	nh := format.RecordHeader{
		Block: h.Block, Branch: h.Branch, Kind: format.KindMoved, Codec: h.Codec, Blocks: h.Blocks,
		PayloadLen: len(m.pay), PayloadCRC: format.Checksum(m.pay),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.wal.Reserve(nh.Size(), wal.ForMoves); err != nil {
		return 0, err
	}
	// A record that cannot be applied would stop every replay.
	switch to, again, err := s.forwards.lookup(name); {
	case err != nil:
		return 0, err
	case again && to.Mask != mask:
		return 0, fault.Corruptf("%v was moved to %v with the blocks %#x, and has %#x", name, to.To, to.Mask, mask)
	}
	c, off := s.wal.Append(&nh, m.pay)
	s.cleaner.moved += uint64(nh.Size())
	return nh.Size(), s.forward(name, mask, format.MakeEntry(c.Slot, off, nh.Size(), nh.Blocks, 0))
}
