package cow

import (
	"errors"
	"math/bits"
	"slices"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// forwards say where records are now that the cleaner or the cold pass moved without changing the entries that name
// them: the records that snapshots hold. They are kept by the place that the entries name, one region of a chunk at a
// time. A region is in memory while it is used, or is not in the table yet.
//
// A change of a region takes both Store.mu and forwards.mu. Either of them is enough to read it.
type forwards struct {
	load func(metadata.Region) ([]format.Forward, error)

	mu      lockorder.Mutex[lockorder.Forwards]
	regions map[metadata.Region]*region
}

// region has one region's forwards, by offset.
type region struct {
	metadata.Region
	list  []format.Forward
	taken bool   // a checkpoint has list, so that it is not changed but replaced
	gen   uint64 // generation of the checkpoint that has to write it; 0: as in the table
}

// maxRegions bounds the regions in memory that no checkpoint needs.
const maxRegions = 4096

// region returns a region, and loads it first if needed. The caller holds mu.
func (f *forwards) region(k metadata.Region) (*region, error) {
	if r := f.regions[k]; r != nil {
		return r, nil
	}
	list, err := f.load(k)
	if err != nil {
		return nil, err
	}
	if f.regions == nil {
		f.regions = make(map[metadata.Region]*region)
	}
	n := 0
	for old, r := range f.regions { // the order is random
		if len(f.regions) < maxRegions || n == 16 {
			break
		}
		if n++; r.gen == 0 {
			delete(f.regions, old)
		}
	}
	r := &region{Region: k, list: list}
	f.regions[k] = r
	return r, nil
}

// find finds the forward of the record that e names: its region, and its index there. ok is false if there is none; i
// is then where it would be. The caller holds mu.
func (f *forwards) find(e format.Entry) (r *region, i int, ok bool, err error) {
	if r, err = f.region(metadata.RegionOf(e)); err != nil {
		return nil, 0, false, err
	}
	i, ok = format.SearchForwards(r.list, e.Offset())
	return r, i, ok, nil
}

// lookup returns where the record that e names has been moved to. ok is false if it has not been moved.
func (f *forwards) lookup(e format.Entry) (to format.Forward, ok bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, i, ok, err := f.find(e)
	if ok {
		to = r.list[i]
	}
	return to, ok, err
}

// follow returns the entry that e stands for, and its chunk with a reference taken. It takes the reference under mu:
// until the forward changes, the chunk has a live block.
func (f *forwards) follow(e format.Entry, slots *slotTable) (format.Entry, *chunk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r, i, ok, err := f.find(e)
	if err != nil {
		return 0, nil, err
	}
	if !ok || r.list[i].To.Blocks() != e.Blocks() {
		return 0, nil, fault.Corruptf("%v was moved, but not noted where to", e)
	}
	to := r.list[i].To.WithIndex(e.Index())
	c := slots.get(to.Slot())
	if c == nil || c.gone || !c.TryAcquire() {
		return 0, nil, fault.Corruptf("%v was moved to %v, where there is no chunk", e, to)
	}
	return to, c, nil
}

// putForward changes the list of a region. It inserts the forward at i, or replaces the one at i, or removes that one
// if the mask of f is 0. The caller holds Store.mu and forwards.mu.
func (s *Store) putForward(r *region, i int, insert bool, f format.Forward) {
	if r.taken {
		r.list, r.taken = slices.Clone(r.list), false
	}
	switch {
	case insert:
		r.list = slices.Insert(r.list, i, f)
	case f.Mask == 0:
		r.list = slices.Delete(r.list, i, i+1)
	default:
		r.list[i] = f
	}
	if r.gen != s.changes.gen {
		r.gen = s.changes.gen
		s.changes.regions = append(s.changes.regions, r)
	}
}

// forward notes that the record which from names is now at to, with the blocks of mask alive, and moves the live bytes.
// Both the cleaner and a replay use it. The caller holds mu.
func (s *Store) forward(from format.Entry, mask uint16, to format.Entry) error {
	old, target := s.slots.get(from.Slot()), s.slots.get(to.Slot())
	if old == nil || target == nil {
		return fault.Corruptf("a record was moved from %v to %v: there is no such chunk", from, to)
	}
	n := uint32(bits.OnesCount16(mask))
	s.forwards.mu.Lock()
	defer s.forwards.mu.Unlock()
	r, i, again, err := s.forwards.find(from)
	if err != nil {
		return err
	}
	if again {
		was := r.list[i]
		if was.Mask != mask {
			return fault.Corruptf("a record that was moved from %v has the blocks %#x, not %#x", from, was.Mask, mask)
		}
		if c := s.slots.get(was.To.Slot()); c != nil {
			c.die(n * was.To.Share())
			s.markRow(c)
		}
	} else {
		old.die(n * from.Share())
		old.moved += n
		s.markRow(old)
	}
	s.putForward(r, i, !again, format.Forward{Offset: from.Offset(), Mask: mask, To: to})
	target.live += n * to.Share()
	target.pinnedDead += (uint32(to.Blocks()) - n) * to.Share()
	s.markRow(target)
	return nil
}

// dieMoved accounts for the death of a block that was moved from c. It returns false if the block was not moved. The
// caller holds mu.
func (s *Store) dieMoved(c *chunk, e format.Entry) bool {
	s.forwards.mu.Lock()
	defer s.forwards.mu.Unlock()
	r, i, ok, err := s.forwards.find(e)
	if err != nil {
		// Space that a damaged row hides cannot be given back.
		s.log.Error("space of moved data stays in use; run check", "chunk", c.Name(), "err", err)
		return true
	}
	if !ok {
		return false
	}
	f := r.list[i]
	if f.Mask&(1<<e.Index()) == 0 {
		return true // the table is damaged, which Check reports
	}
	f.Mask &^= 1 << e.Index()
	s.putForward(r, i, false, f)
	c.moved--
	s.markRow(c)
	if target := s.slots.get(f.To.Slot()); target != nil {
		target.die(f.To.Share())
		s.markRow(target)
	}
	return true
}

// replayMoved repeats what the cleaner did when it wrote a moved record at (c, off).
func (s *Store) replayMoved(h *format.RecordHeader, payload []byte, c *chunk, off uint32) error {
	m, err := format.DecodeMoved(h, payload)
	if err != nil {
		return err
	}
	return s.forward(m.From, m.Mask, format.MakeEntry(c.Slot, off, h.Size(), h.Blocks, 0))
}

// frozenRegion is a region as a checkpoint writes it.
type frozenRegion struct {
	r    *region
	list []format.Forward
}

// beginRegions takes the regions that the checkpoint of the present generation writes. The caller holds mu.
func (s *Store) beginRegions() []frozenRegion {
	s.forwards.mu.Lock()
	defer s.forwards.mu.Unlock()
	frozen := make([]frozenRegion, len(s.changes.regions))
	for i, r := range s.changes.regions {
		r.taken = true
		frozen[i] = frozenRegion{r, r.list}
	}
	s.changes.regions = nil
	return frozen
}

func (g *generation) writeRegions(tx *metadata.Tx) error {
	var buf []byte
	var errs []error
	for _, f := range g.regions {
		if len(f.list) == 0 {
			errs = append(errs, tx.DropForwards(f.r.Region))
			continue
		}
		buf = format.AppendForwards(buf[:0:0], f.list) // bbolt keeps the value until the commit
		errs = append(errs, tx.PutForwards(f.r.Region, buf))
	}
	return errors.Join(errs...)
}

// finishRegions notes that the table has the regions of g now.
func (s *Store) finishRegions(g *generation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forwards.mu.Lock()
	defer s.forwards.mu.Unlock()
	for _, f := range g.regions {
		if f.r.gen == g.gen {
			f.r.gen = 0
		}
	}
}

// abortRegions makes the regions of g part of the next checkpoint. The caller holds mu.
func (s *Store) abortRegions(g *generation) {
	s.forwards.mu.Lock()
	defer s.forwards.mu.Unlock()
	for _, f := range g.regions {
		if f.r.gen == g.gen {
			f.r.gen = s.changes.gen
			s.changes.regions = append(s.changes.regions, f.r)
		}
	}
}

// keepUnproven takes those chunks out of g.dead whose moved records are not all named by the forwards that the table has
// after the commit: if a row is damaged, a record that it names can only be read from the old chunk. The caller holds
// checkpoints.mu.
func (s *Store) keepUnproven(g *generation) {
	moved := map[uint32]int{}
	for _, f := range g.forwarded {
		moved[f.Slot] = int(f.Blocks)
	}
	written := map[uint32]map[metadata.Region][]format.Forward{} // by slot
	for _, f := range g.regions {
		if written[f.r.Slot] == nil {
			written[f.r.Slot] = map[metadata.Region][]format.Forward{}
		}
		written[f.r.Slot][f.r.Region] = f.list
	}
	g.dead = slices.DeleteFunc(g.dead, func(c *chunk) bool {
		named, err := 0, error(nil)
		if moved[c.Slot] > 0 {
			named, err = s.namedBlocks(c.Slot, written[c.Slot])
		}
		if err == nil && named == moved[c.Slot] {
			return false
		}
		s.log.Error("a chunk stays, since the table does not say where all of its moved records are; 'vdisk check' says more",
			"chunk", c.Name(), "moved", moved[c.Slot], "named", named, "err", err)
		s.mu.Lock()
		defer s.mu.Unlock()
		c.dead, c.kept = false, true
		s.checkpoints.pendingFree -= int64(c.Size)
		s.slots.recount(c)
		g.chunks, g.rowsOf = append(g.chunks, c.row()), append(g.rowsOf, c)
		return true
	})
}

// namedBlocks counts the live blocks of the records that were moved from a slot, by the rows of the table and by those
// regions of it which are about to be written.
func (s *Store) namedBlocks(slot uint32, written map[metadata.Region][]format.Forward) (n int, err error) {
	count := func(fs []format.Forward) {
		for _, f := range fs {
			n += bits.OnesCount16(f.Mask)
		}
	}
	for _, fs := range written {
		count(fs)
	}
	err = s.meta.View(func(tx *metadata.Tx) error {
		return tx.RegionsOf(slot, func(r metadata.Region, fs []format.Forward, bad error) error {
			if _, ok := written[r]; ok {
				return nil
			}
			count(fs)
			return bad
		})
	})
	return n, err
}

func (s *Store) loadForwards(k metadata.Region) (list []format.Forward, err error) {
	err = s.meta.View(func(tx *metadata.Tx) (err error) { list, err = tx.Forwards(k); return err })
	return list, err
}
