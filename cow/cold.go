package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// The cold pass: docs/reclaim.md, The cold pass. It writes leaves that have not changed for a while once more: in address
// order, in whole units, compressed as well as can be. Like the cleaner it changes no block's content, and like the
// cleaner it compares and swaps what a head has, and moves what snapshots hold.

const (
	// coldLevel is zstd's, the best that there is: 5 % smaller than level 7 for four times the time, 14 MB/s on a
	// core, and 34 MiB of memory, which the pool gives back when a pass rests.
	coldLevel = 11
	// coldGain is the part of its size by which a leaf, or a record that a snapshot holds, has to get smaller: 1/32.
	coldGain = 32
	// coldPlaces is how many times more places than it needs a leaf has to be in to be rewritten for its order. What
	// the pass writes is in one a run at most, whoever writes beside it.
	coldPlaces = 4
	// coldSlice is how many blocks of a version that a point holds are worked on with the checkpoint lock held. Units
	// do not cross it.
	coldSlice = 4 * format.UnitBlocks
	// coldScan is how many leaves of the table are looked at in one transaction.
	coldScan = 128

	leafSize = format.LeafBlocks * format.BlockSize
	// hotBlocks is what a write puts in one unit at most: a larger one is the cold pass's.
	hotBlocks = hotUnit / format.BlockSize
)

// errBusy says that a checkpoint has to come before the cold pass goes on.
var errBusy = errors.New("too many leaves are dirty")

// place is a place in the log: a chunk's sequence number and an offset.
type place = format.ColdMark

func before(a, b place) bool {
	return a.ChunkSeq < b.ChunkSeq || a.ChunkSeq == b.ChunkSeq && a.Offset < b.Offset
}

// end is where the log ends.
func (s *Store) end() (p place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.ChunkSeq, p.Offset = s.wal.position()
	return p
}

// coldPass goes once over all leaves of a store that were written between two places of its log, and not since. One
// goroutine at a time uses it.
type coldPass struct {
	s        *Store
	from, to place
	branches []*branch // still to go over; in the first from leaf leafAt on
	leafAt   uint32
	due      []coldLeaf // found to be looked at

	report ColdReport
	zstd   *codecPool
	mover  mover
	plan   ReadPlan
	leaf   format.Leaf
	chunks [format.LeafBlocks]*chunk // of leaf's entries
	data   []byte                    // a leaf's
	comp   []byte                    // of it, compressed
	alt    []byte                    // another compression of a unit
	quick  *format.Compressor
	units  []coldUnit
	next   int // of units, to be written
	was    int // what the units take, before
	is     int // and after
}

type coldLeaf struct {
	b       *branch
	index   uint32
	ofHead  bool // the head's own blocks are to be looked at
	ofPoint bool // those of versions that points have, as of
	epoch   uint32
	block   int  // where to go on in that epoch's version
	moved   bool // some of it has been
}

// ColdReport is what a cold pass did.
type ColdReport struct {
	Leaves  int64 `json:"leaves"`        // that were written, by version
	Before  int64 `json:"before_bytes"`  // what they took
	Written int64 `json:"written_bytes"` // what they take now
}

func (s *Store) newColdPass(from, to place) (*coldPass, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.coldCodec == nil {
		pool, err := newCodecPool(format.Zstd, coldLevel)
		if err != nil {
			return nil, err
		}
		s.coldCodec = pool
	}
	p := &coldPass{
		s: s, from: from, to: to, zstd: s.coldCodec, mover: mover{s: s},
		data: make([]byte, leafSize), comp: make([]byte, 0, leafSize*5/4), alt: make([]byte, 0, format.MaxCompressed),
	}
	var err error
	if p.quick, err = format.NewCompressor(format.S2, 0); err != nil {
		return nil, err
	}
	for _, b := range s.catalog.branches {
		p.branches = append(p.branches, b)
	}
	slices.SortFunc(p.branches, func(a, b *branch) int { return int(int64(a.ID) - int64(b.ID)) })
	return p, nil
}

// Cold makes a whole cold pass, over everything that has been written so far.
func (s *Store) Cold(ctx context.Context) (ColdReport, error) {
	if err := s.beginTask(); err != nil {
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	defer s.tasks.Done()
	to := s.end()
	if err := s.Checkpoint(); err != nil { // the table has everything before to
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	p, err := s.newColdPass(place{}, to)
	if err != nil {
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	for more, tries := true, 0; more && err == nil; {
		if err = errors.Join(ctx.Err(), s.live()); err != nil {
			break
		}
		more, err = p.step()
		switch {
		case errors.Is(err, errBusy):
			err = s.Checkpoint()
		case errors.Is(err, ErrNoSpace) && tries == 0:
			tries++ // what has died gives room
			err = s.Checkpoint()
		case err == nil:
			tries = 0
		}
	}
	if err == nil {
		s.coldDone(to)
		err = s.Checkpoint()
	}
	return p.report, wrapIf(err, "cold pass")
}

// coldDone notes that everything before a place has been gone over.
func (s *Store) coldDone(to place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.coldMark, s.coldNoted, s.catalogDirty = to, true, true
}

// step works on one leaf, or looks for some. more is false at the end of the pass. After errBusy and ErrNoSpace it
// can be gone on with.
func (p *coldPass) step() (more bool, err error) {
	s := p.s
	if len(p.due) == 0 {
		return p.scan()
	}
	s.mu.Lock()
	busy := s.unwritten > s.dirtyLimit/4
	s.mu.Unlock()
	switch {
	case busy:
		return true, errBusy
	case !s.roomy():
		return true, ErrNoSpace
	}
	s.cleanMu.Lock()
	defer s.cleanMu.Unlock()
	l := &p.due[0]
	switch {
	case l.ofHead:
		err = p.head(leafKey{l.b, l.index, head})
		l.ofHead = err != nil
	case l.ofPoint:
		err = p.points(l)
	}
	switch {
	case errors.Is(err, errFull):
		if err := s.growToMove(); err != nil {
			return true, err
		}
		return true, errBusy
	case errors.Is(err, ErrCorrupt):
		s.log.Error("a leaf is left as it is; run check", "branch", l.b.ID, "leaf", l.index, "err", err)
		l.ofHead, l.ofPoint, p.next = false, false, 0
	case err != nil:
		return true, err
	}
	if !l.ofHead && !l.ofPoint {
		p.due = p.due[1:]
	}
	return true, nil
}

// scan looks at some leaves as they are in the table.
func (p *coldPass) scan() (more bool, err error) {
	p.due = p.due[:0]
	err = p.s.meta.View(func(tx *metadata.Tx) error {
		for n := 0; n < coldScan && len(p.branches) > 0; n++ {
			b := p.branches[0]
			index, ok, err := tx.NextLeaf(b.ID, p.leafAt)
			if err != nil {
				return err
			}
			if !ok {
				p.branches, p.leafAt = p.branches[1:], 0
				continue
			}
			if l := p.look(tx, b, index); l.ofHead || l.ofPoint {
				p.due = append(p.due, l)
			}
			if p.leafAt = index + 1; p.leafAt == 0 {
				p.branches = p.branches[1:]
			}
		}
		return nil
	})
	return len(p.due) > 0 || len(p.branches) > 0, err
}

// look says what of a leaf may be cold.
func (p *coldPass) look(tx *metadata.Tx, b *branch, index uint32) coldLeaf {
	l := coldLeaf{b: b, index: index, epoch: head}
	p.s.mu.Lock()
	epoch, written := b.Epoch, b.volume != nil
	p.s.mu.Unlock()
	for v := (metadata.Version{Branch: b.ID, Leaf: index, Epoch: head}); v.Epoch > 0; v.Epoch-- {
		var err error
		v.Epoch, err = tx.Leaf(v, &p.leaf)
		switch {
		case err != nil || v.Epoch == 0: // Check names what is damaged
			return l
		case written && v.Epoch >= epoch:
			l.ofHead = p.isCold(&p.leaf, true) && !settled(&p.leaf)
		default:
			l.ofPoint = l.ofPoint || p.isCold(&p.leaf, false)
		}
	}
	return l
}

// isCold reports whether one of a version's own blocks was written between the pass's places, and (whole) none since.
func (p *coldPass) isCold(l *format.Leaf, whole bool) (cold bool) {
	for i, e := range l.Entries {
		if e.IsHole() || !l.IsChanged(i) {
			continue
		}
		c := p.s.slots.get(e.Slot())
		if c == nil {
			return false
		}
		at := place{ChunkSeq: c.seq, Offset: e.Offset()}
		if !before(at, p.to) && whole {
			return false
		}
		cold = cold || before(at, p.to) && !before(at, p.from)
	}
	return cold
}
