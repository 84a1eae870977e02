package cow

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
)

// sendLeaf is what a stream takes of one leaf of a snapshot: parts in the order of their blocks, and the records that
// have them. Its memory is used again for the next leaf.
type sendLeaf struct {
	parts   []sendPart
	records []sendRecord
	order   []int // of the records in the log
	fetches ReadPlan
	arena   []byte
	unit    [format.UnitSize]byte
	comp    [format.MaxCompressed]byte
}

// sendPart is a run of blocks that differ: of one unit, or holes.
type sendPart struct {
	first  uint64
	blocks int
	record int // index; -1: holes
}

// sendRecord is a record that has a part.
type sendRecord struct {
	was     format.Entry // what the leaf says
	mask    uint16       // the blocks of the unit that are wanted
	first   uint64       // the block at which the unit begins
	c       *chunk       // a reference is held; nil: not yet
	moved   bool         // it is read where it was moved to
	e       format.Entry // where it is read
	at      int          // offset in arena
	payload []byte       // the unit as stored
	codec   format.Codec
}

// split finds the parts of a leaf that differ, of the blocks in [from, end). first is the leaf's first block.
func (l *sendLeaf) split(old, now *format.Leaf, first, from, end uint64) {
	l.parts, l.records = l.parts[:0], l.records[:0]
	differs := func(i int) bool {
		b := first + uint64(i)
		return b >= from && b < end && now.Entries[i] != old.Entries[i]
	}
	for i := 0; i < format.LeafBlocks; {
		e := now.Entries[i]
		n := 1
		if !differs(i) {
			i++
			continue
		}
		for i+n < format.LeafBlocks && differs(i+n) && follows(e, now.Entries[i+n], n) {
			n++
		}
		p := sendPart{first: first + uint64(i), blocks: n, record: -1}
		if !e.IsHole() {
			p.record = l.recordOf(e, p.first)
			l.records[p.record].mask |= (1<<n - 1) << e.Index()
		}
		l.parts = append(l.parts, p)
		i += n
	}
}

// recordOf returns the index of the record that has a block. Overwrites leave holes in a unit, so a record may have
// several parts, which lie close to one another.
func (l *sendLeaf) recordOf(e format.Entry, block uint64) int {
	for i := len(l.records) - 1; e.Blocks() > 1 && i >= max(0, len(l.records)-format.UnitBlocks); i-- {
		if l.records[i].was.SameRecord(e) {
			return i
		}
	}
	l.records = append(l.records, sendRecord{was: e, e: e, first: block - uint64(e.Index())})
	return len(l.records) - 1
}

// read reads and verifies all records. It returns how many bytes it read.
//
// The snapshot is open and keeps its records. So an entry of it means the same record as long as it is sent, and no
// lock is needed to find its chunk.
func (l *sendLeaf) read(s *Store) (n int64, err error) {
	l.order = l.order[:0]
	for i := range l.records {
		r := &l.records[i]
		was, c, e, err := s.resolve(r.was)
		if err != nil {
			return 0, fmt.Errorf("block %d: %w", r.first, err)
		}
		r.c, r.e, r.moved = c, e, was.c != c
		n += int64(e.Size())
		l.order = append(l.order, i)
	}
	slices.SortFunc(l.order, func(a, b int) int {
		x, y := &l.records[a], &l.records[b]
		return cmp.Or(cmp.Compare(x.c.Seq, y.c.Seq), cmp.Compare(x.e.Offset(), y.e.Offset()))
	})
	if cap(l.arena) < int(n) {
		l.arena = make([]byte, max(int(n), 2*cap(l.arena)))
	}
	l.arena = l.arena[:n]
	err = l.fetch(s)
	for i := range l.records {
		if verr := l.verify(s, &l.records[i]); verr != nil {
			return n, cmp.Or(err, verr)
		}
	}
	return n, nil
}

// fetch reads the records, those that are neighbours in the log together. After an error some may be missing, which
// verify finds.
func (l *sendLeaf) fetch(s *Store) (err error) {
	pl, at := &l.fetches, 0
	pl.fetches = pl.fetches[:0]
	var before *sendRecord // the last record of the last fetch
	for _, i := range l.order {
		r := &l.records[i]
		r.at = at
		at += r.e.Size()
		buf := l.arena[r.at:at]
		if s.wal.Read(r.c.Chunk, r.e.Offset(), buf) {
			before = nil
			continue
		}
		if before != nil && before.c == r.c && before.e.Offset()+uint32(before.e.Size()) == r.e.Offset() {
			f := &pl.fetches[len(pl.fetches)-1]
			f.Buf = f.Buf[:len(f.Buf)+len(buf)]
			before = r
			continue
		}
		file, herr := r.c.Handle()
		if herr != nil {
			clear(buf)
			err, before = cmp.Or(err, herr), nil
			continue
		}
		pl.fetches = append(pl.fetches, Fetch{Buf: buf, Off: int64(r.e.Offset()), file: file, slot: r.c.Slot})
		before = r
	}
	if len(pl.fetches) > 1 {
		pl.try()
	}
	for i := range pl.fetches {
		f := &pl.fetches[i]
		if ferr := f.Read(); ferr != nil {
			clear(f.Buf) // nothing that an earlier leaf left may seem to be a record
			err = cmp.Or(err, ferr)
		}
	}
	return err
}

// verify verifies a record. If it does not verify, it looks for it again: other records that were read with it may be
// the damaged ones, and the cleaner may have made a copy (see rescue).
func (l *sendLeaf) verify(s *Store, r *sendRecord) (err error) {
	defer func() {
		if err != nil {
			s.damage.note(badPlace{record: unitKey{r.c.Seq, r.e.WithIndex(0), r.first}}, err)
		}
	}()
	stored := l.arena[r.at : r.at+r.e.Size()]
	err = r.parse(stored)
	if err == nil || !errors.Is(err, ErrCorrupt) {
		return err
	}
	err = fmt.Errorf("chunk %s offset %d: %w", r.c.Name(), r.e.Offset(), err)
	if r.alone(s) == nil {
		return nil
	}
	if r.moved {
		return err
	}
	to, c, ok := s.forwards.copyOf(r.was, r.mask, &s.slots)
	if !ok {
		return err
	}
	r.c.Release()
	r.c, r.e, r.moved = c, to, true
	if r.alone(s) == nil {
		return nil
	}
	return err
}

// parse takes the unit out of a stored record.
func (r *sendRecord) parse(stored []byte) (err error) {
	r.payload, r.codec, err = format.VerifyRecord(stored, r.c.Seq, r.e, r.first)
	return err
}

// alone reads the record alone. The memory is made anew, as this happens only over damage.
func (r *sendRecord) alone(s *Store) error {
	buf := make([]byte, r.e.Size())
	if err := s.readRecord(r.c, r.e.Offset(), buf); err != nil {
		return err
	}
	return r.parse(buf)
}

// encoded returns a part of a record: the unit as it is stored, or a part of the unit as a unit of its own, compressed
// by a codec of the pool. It is valid until the next call.
func (l *sendLeaf) encoded(p *sendPart, pool *codecPool) (payload []byte, codec format.Codec, err error) {
	r := &l.records[p.record]
	if p.blocks == r.e.Blocks() {
		return r.payload, r.codec, nil
	}
	unit := l.unit[:r.e.Blocks()*format.BlockSize]
	if err := format.Decompress(r.codec, unit, r.payload); err != nil {
		return nil, 0, fmt.Errorf("chunk %s offset %d: %w", r.c.Name(), r.e.Offset(), err)
	}
	from := int(p.first-r.first) * format.BlockSize
	c := pool.get()
	defer pool.put(c)
	payload, codec = c.Compress(l.comp[:0], unit[from:from+p.blocks*format.BlockSize])
	return payload, codec, nil
}

// release gives back the references on the chunks.
func (l *sendLeaf) release() {
	for i := range l.records {
		if c := l.records[i].c; c != nil {
			c.Release()
		}
	}
	l.records = l.records[:0]
}
