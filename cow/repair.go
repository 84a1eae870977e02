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
	Others  []Lost `json:"others"`  // what the records take from other volumes and snapshots, which stays damaged
	Bytes   int64  `json:"bytes"`   // in Written
}

// Repair writes the content of src over those blocks of a volume that cannot be read or do not verify, and over no
// others. The volume may be in use: what others write meanwhile stays. A source that is shorter than the volume is
// refused if the volume is damaged behind its end. Other volumes and snapshots that refer to the damaged records still
// do.
func (s *Store) Repair(ctx context.Context, name string, src RepairSource) (RepairReport, error) {
	rep, err := s.repairVolume(ctx, name, src)
	return rep, wrapIf(err, "repair %s", name)
}

func (s *Store) repairVolume(ctx context.Context, name string, src RepairSource) (rep RepairReport, err error) {
	rep = RepairReport{Written: []Lost{}, Left: []Lost{}, Others: []Lost{}}
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
	defer func() { err = errors.Join(err, d.Close()) }()
	r := &repairer{s: s, ctx: ctx, d: d, src: src, rep: &rep, size: d.Size(), records: map[badPlace]*[]Lost{}}
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
	err = s.lostTo(ctx, r.records, s.points())
	for _, lost := range r.records {
		for _, l := range *lost {
			if l.Ref != d.ref {
				rep.Others = append(rep.Others, l)
			}
		}
	}
	slices.SortFunc(rep.Others, Lost.compare)
	return rep, err
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

// refuseBehind returns an error if the volume is damaged at or behind an offset.
func (r *repairer) refuseBehind(end int64) error {
	return r.s.leaves(r.d.b, uint32(end/leafSize), math.MaxUint32, func(index uint32) error {
		from := max(end, int64(index)*leafSize)
		to := min(r.size, (int64(index)+1)*leafSize)
		if err := r.s.interrupted(r.ctx); err != nil || from >= to {
			return err
		}
		list, ok, err := r.bad(from, to-from)
		if err == nil && (!ok || len(list) > 0) {
			at := from
			if len(list) > 0 {
				at = max(from, int64(list[0].first)*format.BlockSize)
			}
			err = fmt.Errorf("the volume has %d bytes and the content has %d, and the volume is damaged at %d, behind its end: %w", r.size, r.src.Size(), at, ErrInvalid)
		}
		return err
	})
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
		return nil
	}
	if err := r.fill(off); err != nil {
		return err
	}
	for _, b := range list {
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
		off := int64(block) * format.BlockSize
		n := min(format.BlockSize, r.size-off)
		addLost(&r.rep.Written, r.d.ref, off, n)
		r.rep.Bytes += n
	}
	return err
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
		n, at, err := r.src.Next(r.piece)
		if err == io.EOF {
			r.ended, r.data = true, nil
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the content: %w", err)
		}
		r.data, r.at = r.piece[:n], at
	}
}
