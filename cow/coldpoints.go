package cow

import (
	"errors"
	"slices"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// The part of a cold pass for records that snapshots hold. They are moved and forwarded, as by the cleaner.

// coldRecord is a record with blocks that a version owns.
type coldRecord struct {
	name  format.Entry // entry of its first block
	block uint64       // number of its first block
	mask  uint16       // the blocks that the version owns
}

// points goes on with the versions of ended epochs of a leaf. It moves those records of the next coldSlice blocks that
// get smaller. It returns errFull if a checkpoint has to come first.
func (p *coldPass) points(l *coldLeaf) error {
	s, b := p.s, l.b
	s.checkpoints.mu.Lock() // as in mover.moveGathered
	defer s.checkpoints.mu.Unlock()
	if s.checkpoints.lastAborted {
		return errFull
	}
	s.mu.Lock()
	asOf, mine := l.epoch, s.catalog.branches[b.ID] == b
	if b.volume != nil {
		// What the head owns in its present epoch changes all the time, until a snapshot ends the epoch. Earlier
		// versions do not change.
		asOf, mine = min(asOf, b.Epoch-1), mine && b.volume.codec.codec != format.Raw
	}
	s.mu.Unlock()
	l.ofPoint = false
	if asOf == 0 || !mine {
		return nil
	}
	v := metadata.Version{Branch: b.ID, Leaf: l.index}
	var err error
	if v.Epoch, err = s.version(b, l.index, asOf, !b.reaping, &p.leaf); err != nil || v.Epoch == 0 {
		return err
	}
	if _, gone := s.changes.dropping[v]; v.Epoch != l.epoch || gone {
		l.block, l.moved = 0, false
	}
	if _, gone := s.changes.dropping[v]; gone || !p.isCold(&p.leaf, false) {
		l.block = format.LeafBlocks
	} else if err := p.version(l); err != nil {
		l.ofPoint = !errors.Is(err, ErrCorrupt)
		return err
	}
	if l.epoch = v.Epoch; l.block == format.LeafBlocks {
		l.epoch, l.block, l.moved = v.Epoch-1, 0, false
	}
	l.ofPoint = l.epoch > 0
	return nil
}

// version moves those records in the next slice of a version, which is in p.leaf, that get smaller. The caller holds
// checkpoints.mu.
func (p *coldPass) version(l *coldLeaf) error {
	var rs []coldRecord
	end := l.block + coldSlice // no record crosses it
	for i := l.block; i < end; i++ {
		e := p.leaf.Entries[i]
		if e.IsHole() || !p.leaf.IsChanged(i) {
			continue
		}
		block := uint64(l.index)*format.LeafBlocks + uint64(i) - uint64(e.Index())
		at := slices.IndexFunc(rs, func(r coldRecord) bool { return r.name.SameRecord(e) && r.block == block })
		if at < 0 {
			at = len(rs)
			rs = append(rs, coldRecord{name: e.WithIndex(0), block: block})
		}
		rs[at].mask |= 1 << e.Index()
	}
	for _, r := range rs {
		is, n, err := p.record(l.b, r)
		if err != nil {
			return err
		}
		if n > 0 {
			if !l.moved {
				l.moved = true
				p.report.Leaves++
			}
			p.report.Before += int64(is)
			p.report.Written += int64(n)
		}
	}
	l.block = end
	return nil
}

// record moves one record of a version if it gets smaller: from size is to size n. n is 0 if it was not moved. The
// caller holds checkpoints.mu.
func (p *coldPass) record(b *branch, r coldRecord) (is, n int, err error) {
	s := p.s
	at := r.name
	if to, moved, err := s.forwards.lookup(r.name); err != nil {
		return 0, 0, err
	} else if moved {
		if at = to.To; at.Size() < r.name.Size() {
			// An earlier pass made it smaller, or the cleaner, which left out its dead blocks.
			return 0, 0, nil
		}
	}
	s.mu.Lock()
	c := s.slots.get(at.Slot())
	ok := c != nil && !c.gone && !c.dead
	s.mu.Unlock()
	if !ok {
		return 0, 0, fault.Corruptf("%v is in no chunk", at)
	}
	stored := p.comp[:at.Size()]
	defer func() {
		if errors.Is(err, ErrCorrupt) {
			s.damage.note(badPlace{record: unitKey{c.Seq, at.WithIndex(0), r.block}}, err)
		}
	}()
	if err := s.readRecord(c, at.Offset(), stored); err != nil {
		return 0, 0, err
	}
	payload, codec, err := format.VerifyRecord(stored, c.Seq, at, r.block)
	if err != nil || codec == format.Zstd {
		return 0, 0, err
	}
	unit := p.data[:at.Blocks()*format.BlockSize]
	if err := format.Decompress(codec, unit, payload); err != nil {
		return 0, 0, err
	}
	leaveOut(unit, r.mask)
	z := p.zstd.get()
	defer p.zstd.put(z)
	out, codec := z.Compress(p.comp[len(stored):len(stored)], unit)
	h := format.RecordHeader{
		Block: r.block, Branch: b.ID, Kind: format.KindMoved, Codec: codec, Blocks: at.Blocks(),
		PayloadLen: format.MovedSize + len(out),
	}
	if at.Size()-h.Size() < at.Size()/coldGain+1 {
		return 0, 0, nil
	}
	n, err = p.mover.forward(&h, out, r.name, r.mask)
	return at.Size(), n, err
}

// readRecord reads a record, which may still be on its way to the chunk file.
func (s *Store) readRecord(c *chunk, off uint32, p []byte) error {
	if s.wal.Read(c.Chunk, off, p) {
		return nil
	}
	f, err := c.Handle()
	if err != nil {
		return err
	}
	got, err := wal.ReadFull(f, p, int64(off))
	if err == nil && got < len(p) {
		err = fault.Corruptf("chunk %s ends at %d", c.Name(), int64(off)+int64(got))
	}
	return fault.AsCorrupt(err)
}
