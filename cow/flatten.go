package cow

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// FlattenReport says what Flatten has done.
type FlattenReport struct {
	Origin string `json:"origin"` // VOL@SNAP, as VolumeInfo has it; empty: there was none
	Blocks uint64 `json:"blocks"` // copied
	Bytes  int64  `json:"bytes"`  // that they take
}

// Flatten copies all blocks that a volume shares with its origin, and then cuts it from its origin, in one event. The
// volume may be in use. If Flatten ends early, the volume still has its origin, and the next call goes on: a block that
// was copied is the volume's own. A volume without an origin is left as it is. Flatten returns ErrBusy if snapshots of
// the volume share blocks with the origin, too: docs/engine.md, Flattening.
func (s *Store) Flatten(ctx context.Context, name string) (FlattenReport, error) {
	rep, err := s.flatten(ctx, name)
	return rep, wrapIf(err, "flatten %s", name)
}

func (s *Store) flatten(ctx context.Context, name string) (rep FlattenReport, err error) {
	if err := s.beginTask(); err != nil {
		return rep, err
	}
	defer s.tasks.Done()
	if s.readOnly != nil {
		return rep, s.readOnly
	}
	if err := s.reapPoints(ctx, name); err != nil {
		return rep, err
	}
	d, err := s.beginFlatten(name)
	if err != nil {
		return rep, err
	}
	if d == nil {
		return rep, s.wal.Sync() // another call may just have cut it off
	}
	defer s.endFlatten(d)
	s.counted(d.v)
	f := &flattener{s: s, d: d, rep: &rep}
	s.mu.Lock()
	rep.Origin = s.pointName(d.b.origin, d.b.OriginEpoch)
	s.mu.Unlock()
	if err := s.fitsFlat(ctx, d); err != nil {
		return rep, err
	}
	err = s.leaves(d.b, 0, math.MaxUint32, func(index uint32) error {
		if err := s.interrupted(ctx); err != nil {
			return err
		}
		return f.flattenLeaf(index)
	})
	if err != nil {
		return rep, err
	}
	err = s.transact(func() (*format.Event, error) {
		if err := s.flattenable(d.v); err != nil {
			return nil, err
		}
		row := d.b.Branch
		row.OriginBranch, row.OriginEpoch = 0, 0
		return &format.Event{Op: "flatten", Branches: []format.Branch{row}}, nil
	})
	if err == nil {
		wal.Poke(s.checkpoints.work) // the origin may have no name any more
	}
	return rep, err
}

// reapPoints lets the reaper finish with deleted snapshots of a volume.
func (s *Store) reapPoints(ctx context.Context, name string) error {
	s.mu.Lock()
	v, _, err := s.lookup(Ref{Volume: name})
	waits := err == nil && slices.ContainsFunc(v.branch.points, func(sn *snapshot) bool { return sn.Volume == 0 && len(v.branch.forks[sn.Epoch]) == 0 })
	s.mu.Unlock()
	if err != nil || !waits {
		return err
	}
	return s.reclaimDeleted(ctx)
}

// beginFlatten opens the volume. As long as it is open, it keeps its branch, and that keeps the origin. It returns nil
// if the volume has no origin.
func (s *Store) beginFlatten(name string) (*Device, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, _, err := s.lookup(Ref{Volume: name})
	if err == nil {
		err = v.received()
	}
	if err != nil || v.branch.origin == nil {
		return nil, err
	}
	if v.flattening {
		return nil, fmt.Errorf("it is being flattened: %w", ErrBusy)
	}
	if err := s.flattenable(v); err != nil {
		return nil, err
	}
	v.flattening = true
	v.readers++
	return &Device{s: s, ref: Ref{Volume: name}, v: v, b: v.branch, asOf: head, readOnly: true, block: v.LogicalBlock}, nil
}

func (s *Store) endFlatten(d *Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d.v.flattening = false
	d.v.readers--
}

// flattenable returns an error if the branch of a volume has points. They share blocks with the origin, too, and what
// they hold never changes. The caller holds mu.
func (s *Store) flattenable(v *volume) error {
	var names []string
	for _, sn := range v.branch.points {
		if sn.Volume != 0 {
			names = append(names, s.pointName(v.branch, sn.Epoch))
		}
	}
	switch n := len(names); {
	case n > 5:
		names = append(names[:5], fmt.Sprintf("and %d more", n-5))
		fallthrough
	case n > 0:
		return fmt.Errorf("its snapshots (%s) share blocks with its origin, too; remove them first, or clone the last one and flatten the clone: %w", strings.Join(names, ", "), ErrBusy)
	case len(v.branch.points) > 0:
		return fmt.Errorf("clones of deleted snapshots of it share blocks with its origin, too; flatten or remove them first: %w", ErrBusy)
	}
	return nil
}

// flattener copies the blocks of one volume.
type flattener struct {
	s    *Store
	d    *Device
	rep  *FlattenReport
	leaf sendLeaf
	now  format.Leaf // of the head
	own  format.Leaf // now, without what is the branch's own
	ex   expect
}

// flattenLeaf makes all blocks of a leaf the branch's own. If others write to it meanwhile, it looks again; what they
// have written is the branch's own, so that ends.
func (f *flattener) flattenLeaf(index uint32) error {
	for {
		wanted, err := f.look(index)
		if err != nil || !wanted {
			return err
		}
		if err := f.copyLeaf(index); !errors.Is(err, errChanged) {
			return err
		}
	}
}

// look finds the blocks of a leaf that are to be copied: it makes the two leaves differ in these. It reports whether
// there is anything to do.
func (f *flattener) look(index uint32) (wanted bool, err error) {
	var epoch uint32
	err = f.s.cache.View(f.d.b.leaf(index, head), func(lf *leafcache.Leaf) {
		lf.CopyTo(&f.now)
		epoch = lf.Epoch()
	})
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err == nil {
		err = f.s.flattenable(f.d.v) // with points, a clear bit would not mean that the block is the origin's
	}
	if err != nil {
		return false, err
	}
	f.own = f.now
	for i, e := range f.now.Entries {
		if !e.IsHole() && (epoch == 0 || !f.now.IsChanged(i)) {
			f.own.Entries[i], wanted = 0, true
		}
	}
	// A leaf of holes, too, becomes one of the branch: then nobody who reads it needs the origin, even if he began to read
	// before the cut and ends after the origin is gone.
	return wanted || epoch == 0 && uint64(index)*format.LeafBlocks < blocksOf(f.d.v.Size), nil
}

// copyLeaf copies the blocks that look has found.
func (f *flattener) copyLeaf(index uint32) error {
	first := uint64(index) * format.LeafBlocks
	l := &f.leaf
	l.split(&f.own, &f.now, first, 0, math.MaxUint64)
	if len(l.parts) == 0 {
		f.ex = expect{first: none, last: none, inherited: f.now.Entries[:1]}
		return f.s.putHole(f.d, first, 1, &f.ex)
	}
	defer l.release()
	if _, err := l.read(f.s); err != nil {
		return fmt.Errorf("bytes %d to %d: %w", first*format.BlockSize, (first+format.LeafBlocks)*format.BlockSize, err)
	}
	for i := range l.parts {
		if err := f.copyPart(&l.parts[i]); err != nil {
			return err
		}
	}
	return nil
}

// copyPart writes blocks of a unit.
func (f *flattener) copyPart(p *sendPart) error {
	payload, codec, err := f.leaf.encoded(p, f.d.v.codec)
	if err != nil {
		return err
	}
	h := f.d.dataHeader(p.first, p.blocks, codec, payload)
	from := int(p.first % format.LeafBlocks)
	f.ex = expect{first: none, last: none, inherited: f.now.Entries[from : from+p.blocks]}
	if err := f.s.writeRecord(f.d, &h, payload, p.blocks, &f.ex, false); err != nil {
		return err
	}
	f.rep.Blocks += uint64(p.blocks)
	f.rep.Bytes += int64(h.Size())
	return nil
}
