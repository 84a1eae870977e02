package cow

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// RepairSource is the good content for a repair. Next returns its data in order, and leaves out zeros; at the end it
// returns io.EOF.
type RepairSource interface {
	Size() int64
	Next(p []byte) (n int, off int64, err error)
}

// RepairReport says what Repair has done.
type RepairReport struct {
	Written []Lost `json:"written"` // blocks that were damaged, and have the content of the source now
	Left    []Lost `json:"left"`    // what is still damaged of the volume: its map cannot be read there
	Mended  []Lost `json:"mended"`  // what others have of these blocks, where the source was proved to have what was lost
	Others  []Lost `json:"others"`  // what the records take from other volumes and snapshots, which stays damaged
	Bytes   int64  `json:"bytes"`   // in Written
}

// Repair writes the content of src over those blocks of a volume that cannot be read or do not verify, and over no
// others. The volume may be in use: what others write meanwhile stays. A source that is shorter than the volume is
// refused if the volume is damaged behind its end. If the source is proved to have what a record had, all that refer to
// the record have it again. Otherwise other volumes and snapshots still refer to the damaged record.
func (s *Store) Repair(ctx context.Context, name string, src RepairSource) (RepairReport, error) {
	rep, err := s.repairVolume(ctx, name, src)
	return rep, wrapIf(err, "repair %s", name)
}

func (s *Store) repairVolume(ctx context.Context, name string, src RepairSource) (rep RepairReport, err error) {
	rep = RepairReport{Written: []Lost{}, Left: []Lost{}, Mended: []Lost{}, Others: []Lost{}}
	if err := s.beginTask(); err != nil {
		return rep, err
	}
	defer s.tasks.Done()
	if s.readOnly != nil {
		return rep, s.readOnly
	}
	d, err := s.OpenDevice(Ref{Volume: name}, true)
	if err != nil {
		return rep, err
	}
	d.noQuota = true
	defer func() { err = errors.Join(err, d.Close()) }()
	r := &repairer{s: s, ctx: ctx, d: d, src: src, rep: &rep, size: d.Size(), records: map[badPlace]*[]Lost{}, healer: newHealer(s), healed: map[healedRecord]struct{}{}}
	r.disk.buf, r.good, r.piece, r.dst = storage.DiskBuffer(diskWindow), make([]byte, leafSize), make([]byte, 256<<10), make([]byte, leafSize)
	if end := int64(blocksOf(src.Size())) * format.BlockSize; end < r.size {
		if err := r.refuseBehind(end); err != nil {
			return rep, err
		}
	}
	if err := s.leaves(d.b, 0, math.MaxUint32, r.leaf); err != nil {
		return rep, err
	}
	if err := s.wal.Sync(); err != nil {
		return rep, err
	}
	return rep, r.nameOthers()
}

// nameOthers lists what the damaged records take and took from other volumes and snapshots.
func (r *repairer) nameOthers() (err error) {
	if r.rep.Others, err = r.others(r.records); err != nil {
		return err
	}
	for p, lost := range r.records {
		if len(*lost) == 0 {
			r.s.damage.drop(p)
		}
	}
	copies := map[badPlace]*[]Lost{}
	for h := range r.healed {
		c, at, err := r.s.placeOf(h.was)
		if err != nil {
			return err
		}
		if c != nil {
			copies[badPlace{record: unitKey{c.Seq, at, h.first}}] = new([]Lost)
			c.Release()
		}
	}
	r.rep.Mended, err = r.others(copies)
	return err
}

// others returns what places take from other volumes and snapshots than the one that is repaired.
func (r *repairer) others(places map[badPlace]*[]Lost) ([]Lost, error) {
	list := []Lost{}
	err := r.s.lostTo(r.ctx, places, r.s.points())
	for _, lost := range places {
		for _, l := range *lost {
			if l.Ref != r.d.ref {
				list = append(list, l)
			}
		}
	}
	slices.SortFunc(list, Lost.compare)
	return list, err
}

// repairer is the work of one Repair.
type repairer struct {
	s    *Store
	ctx  context.Context
	d    *Device
	src  RepairSource
	rep  *RepairReport
	size int64

	disk  diskReader
	plan  ReadPlan
	dst   []byte // what plan would fill
	good  []byte // the source's content of a leaf
	piece []byte // memory of data
	data  []byte // of the source, not used yet
	at    int64  // where data lies
	ended bool   // the source has no more

	records map[badPlace]*[]Lost // damaged records, at most mostDamage

	healer *healer
	healed map[healedRecord]struct{} // at most mostDamage
}

// healedRecord is a record that was healed: the entry of its first block, and that block.
type healedRecord struct {
	was   content
	first uint64
}

// badRecord is a record that does not verify, and the blocks of it that the volume has.
type badRecord struct {
	was   content
	first uint64
	mask  uint16
}

// bad returns the records of a range of a leaf that cannot be read or do not verify. ok is false if the map cannot be
// read there.
func (r *repairer) bad(off, length int64) (list []badRecord, ok bool, err error) {
	defer r.disk.forget()
	if err := r.d.plan(&r.plan, r.dst[:length], off); err != nil {
		if errors.Is(err, ErrCorrupt) {
			err = nil
		}
		return nil, false, err
	}
	defer r.plan.release()
	for i := range r.plan.records {
		p := &r.plan.records[i]
		stored := make([]byte, p.e.Size())
		if r.s.wal.Read(p.c.Chunk, p.e.Offset(), stored) {
			continue // it is not in the file yet
		}
		f, err := p.c.Handle()
		n := 0
		if err == nil {
			n, err = r.disk.read(p.c, f, stored, int64(p.e.Offset()))
		}
		if err == nil && n < len(stored) {
			err = fault.Corruptf("the file ends at %d", int64(p.e.Offset())+int64(n))
		}
		if err == nil {
			err = p.key().verify(stored)
		}
		if fault.OutOfReach(err) {
			return nil, false, err
		}
		if err == nil || r.plan.rescue(p, false) {
			continue
		}
		list = append(list, badRecord{p.was, p.first, r.plan.wanted(p)})
		if len(r.records) < mostDamage {
			r.records[badPlace{record: p.key()}] = new([]Lost)
		}
	}
	return list, true, nil
}

// refuseBehind returns an error if the volume is damaged at or behind an offset. It names the ranges.
func (r *repairer) refuseBehind(end int64) error {
	var behind []Lost
	bytes := int64(0)
	add := func(off, length int64) {
		bytes += length
		addLost(&behind, r.d.ref, off, length)
	}
	err := r.s.leaves(r.d.b, uint32(end/leafSize), math.MaxUint32, func(index uint32) error {
		from := max(end, int64(index)*leafSize)
		to := min(r.size, (int64(index)+1)*leafSize)
		if err := r.s.interrupted(r.ctx); err != nil || from >= to {
			return err
		}
		list, ok, err := r.bad(from, to-from)
		if err == nil && !ok {
			add(from, to-from)
		}
		for _, b := range list {
			for i := range format.UnitBlocks {
				if off := int64(b.first+uint64(i)) * format.BlockSize; b.mask&(1<<i) != 0 {
					add(off, min(format.BlockSize, r.size-off))
				}
			}
		}
		return err
	})
	if err == nil && len(behind) > 0 {
		err = fmt.Errorf("the volume has %d bytes and the content has %d, and the volume is damaged behind its end, in %d bytes: %s: %w",
			r.size, r.src.Size(), bytes, lostText(behind, false), ErrInvalid)
	}
	return err
}

// leaf repairs one leaf.
func (r *repairer) leaf(index uint32) error {
	off := int64(index) * leafSize
	length := min(leafSize, r.size-off)
	if err := r.s.interrupted(r.ctx); err != nil || length <= 0 {
		return err
	}
	list, ok, err := r.bad(off, length)
	if err != nil {
		return err
	}
	if !ok {
		addLost(&r.rep.Left, r.d.ref, off, length)
	}
	if len(list) == 0 {
		return r.keepUp(off + length)
	}
	if err := r.fill(off); err != nil {
		return err
	}
	for _, b := range list {
		healed, err := r.heal(b)
		if err != nil {
			return err
		}
		if healed {
			continue
		}
		for i := range format.UnitBlocks {
			if b.mask&(1<<i) == 0 {
				continue
			}
			if err := r.write(b.first+uint64(i), content{b.was.e.WithIndex(i), b.was.c}); err != nil {
				return err
			}
		}
	}
	return nil
}

// heal heals a record for all that share it, if the source is proved to have its content. It reports whether it did.
func (r *repairer) heal(b badRecord) (bool, error) {
	unit := healedRecord{content{b.was.e.WithIndex(0), b.was.c}, b.first}
	from, n := b.first%format.LeafBlocks*format.BlockSize, uint64(b.was.e.Blocks()*format.BlockSize)
	ok, err := r.healer.heal(unit.was, r.good[from:from+n])
	if !ok || err != nil {
		return false, err
	}
	if len(r.healed) < mostDamage {
		r.healed[unit] = struct{}{}
	}
	for i := range format.UnitBlocks {
		if b.mask&(1<<i) != 0 {
			r.wrote(b.first + uint64(i))
		}
	}
	return true, nil
}

// wrote notes that a block of the volume has the source's content.
func (r *repairer) wrote(block uint64) {
	off := int64(block) * format.BlockSize
	n := min(format.BlockSize, r.size-off)
	addLost(&r.rep.Written, r.d.ref, off, n)
	r.rep.Bytes += n
}

// write writes a block, unless it has changed since it was looked at.
func (r *repairer) write(block uint64, was content) error {
	sc := r.s.scratch.Get().(*scratch)
	defer r.s.scratch.Put(sc)
	sc.solid, sc.small = false, true
	from := block % format.LeafBlocks * format.BlockSize
	ex := expect{first: block, last: block, wasFirst: was, wasLast: was}
	err := r.d.putBlocks(sc, r.good[from:from+format.BlockSize], block, &ex)
	if errors.Is(err, errChanged) {
		return nil
	}
	if err == nil {
		r.wrote(block)
	}
	return err
}

// keepUp reads the source up to an offset, although nothing there is needed: a source from another process says only with
// its data that the process has given up.
func (r *repairer) keepUp(off int64) error {
	for !r.ended && (len(r.data) == 0 || r.at+int64(len(r.data)) <= off) {
		if err := r.next(); err != nil {
			return err
		}
	}
	return nil
}

// next reads the next data of the source.
func (r *repairer) next() error {
	n, at, err := r.src.Next(r.piece)
	if err == io.EOF {
		r.ended, r.data = true, nil
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the content: %w", err)
	}
	r.data, r.at = r.piece[:n], at
	return nil
}

// fill makes good the source's content of the leaf at an offset.
func (r *repairer) fill(off int64) error {
	clear(r.good)
	for {
		if end := r.at + int64(len(r.data)); len(r.data) > 0 && end > off {
			if r.at >= off+leafSize {
				return nil
			}
			skip := max(0, off-r.at)
			n := copy(r.good[r.at+skip-off:], r.data[skip:])
			if skip+int64(n) < int64(len(r.data)) {
				return nil // the rest is the next leaf's
			}
		}
		if r.ended {
			return nil
		}
		if err := r.next(); err != nil {
			return err
		}
	}
}
