package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// The cold pass: docs/reclaim.md, The cold pass. It writes leaves that have not changed for a while once more: in
// address order, in whole units, and compressed as well as possible. Like the cleaner, it changes no block's content:
// it uses compare and swap for data that only a head has, and moves records that snapshots hold.

const (
	// coldLevel is the zstd level, the best that there is. Its output is 5 % smaller than level 7's. It takes four
	// times as long (14 MB/s on a core), and 34 MiB of memory, which the pool gives back when a pass rests.
	coldLevel = 11
	// coldGain says by how much a leaf, or a record that a snapshot holds, has to get smaller: by 1/32 of its size.
	coldGain = 32
	// coldPlaces is how many times as many places as runs a leaf has to lie in to be rewritten for its order alone.
	// What the pass writes lies in at most one place for each run, even if others write meanwhile.
	coldPlaces = 4
	// coldSlice is how many blocks of a version that a point holds are worked on in one turn of the checkpoint lock. No
	// unit crosses the end of a slice.
	coldSlice = 4 * format.UnitBlocks
	// coldScan is how many leaves of the table are looked at in one transaction.
	coldScan = 128

	leafSize = format.LeafBlocks * format.BlockSize
	// hotBlocks is the most blocks that a write puts in one unit. Only the cold pass writes larger units.
	hotBlocks = hotUnit / format.BlockSize
)

// errBusy means that a checkpoint has to come before the cold pass goes on.
var errBusy = errors.New("too many leaves are dirty")

// place is a place in the log: a chunk's sequence number and an offset.
type place = format.ColdMark

func before(a, b place) bool {
	return a.ChunkSeq < b.ChunkSeq || a.ChunkSeq == b.ChunkSeq && a.Offset < b.Offset
}

// end returns the place where the log ends.
func (s *Store) end() (p place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.ChunkSeq, p.Offset = s.wal.Position()
	return p
}

// coldState is what is left of one cold pass for the next. Store.mu guards it.
type coldState struct {
	mark  place      // the cold pass has covered everything before it
	noted bool       // mark is not in the table yet
	codec *codecPool // codecs of cold passes; nil before the first pass
}

// coldPass goes once over all leaves of a store that were written between two places of its log, and not since. Only
// one goroutine at a time may use it.
type coldPass struct {
	s        *Store
	from, to place
	branches []*branch // still to go over; the first of them from leaf leafAt on
	leafAt   uint32
	due      []coldLeaf // found by scan, still to be worked on

	report ColdReport
	zstd   *codecPool
	mover  mover
	plan   ReadPlan
	leaf   format.Leaf
	chunks [format.LeafBlocks]*chunk // of leaf's entries
	data   []byte                    // content of a leaf
	comp   []byte                    // data, compressed
	alt    []byte                    // another compression of a unit
	quick  *format.Compressor
	units  []coldUnit
	next   int // index in units of the next to write
	was    int // stored size of the units before
	is     int // and after
}

type coldLeaf struct {
	b       *branch
	index   uint32
	ofHead  bool // the head's own blocks are to be looked at
	ofPoint bool // the own blocks of versions up to epoch are to be looked at
	epoch   uint32
	block   int  // where to go on in the version of that epoch
	moved   bool // some of that version has been moved
}

// ColdReport says what a cold pass did.
type ColdReport struct {
	Leaves  int64 `json:"leaves"`        // versions of leaves written
	Before  int64 `json:"before_bytes"`  // their stored size before
	Written int64 `json:"written_bytes"` // and after
}

func (s *Store) newColdPass(from, to place) (*coldPass, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cold.codec == nil {
		pool, err := newCodecPool(format.Zstd, coldLevel)
		if err != nil {
			return nil, err
		}
		s.cold.codec = pool
	}
	p := &coldPass{
		s: s, from: from, to: to, zstd: s.cold.codec, mover: mover{s: s},
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

// Cold makes a whole cold pass over everything that has been written so far. It returns when the pass is done, or when
// ctx ends.
func (s *Store) Cold(ctx context.Context) (ColdReport, error) {
	if err := s.beginTask(); err != nil {
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	defer s.tasks.Done()
	to := s.end()
	if err := s.Checkpoint(); err != nil { // then the table has everything before to
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	p, err := s.newColdPass(place{}, to)
	if err != nil {
		return ColdReport{}, fmt.Errorf("cold pass: %w", err)
	}
	for more, tries := true, 0; more && err == nil; {
		if err = errors.Join(context.Cause(ctx), s.live()); err != nil {
			break
		}
		more, err = p.step()
		switch {
		case errors.Is(err, errBusy):
			err = s.Checkpoint()
		case errors.Is(err, ErrNoSpace) && tries == 0:
			tries++ // removing dead chunks gives room
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

// coldDone notes that the pass has gone over everything before to.
func (s *Store) coldDone(to place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cold.mark, s.cold.noted, s.changes.catalog = to, true, true
}

// step works on one leaf, or looks for leaves to work on. more is false at the end of the pass. After errBusy or
// ErrNoSpace, step may be called again to go on.
func (p *coldPass) step() (more bool, err error) {
	s := p.s
	if len(p.due) == 0 {
		return p.scan()
	}
	s.mu.Lock()
	busy := s.cache.Unwritten() > s.dirtyLimit/4
	s.mu.Unlock()
	switch {
	case busy:
		return true, errBusy
	case !s.roomy():
		return true, ErrNoSpace
	}
	s.cleaner.mu.Lock()
	defer s.cleaner.mu.Unlock()
	l := &p.due[0]
	switch {
	case l.ofHead:
		err = p.head(l.b, l.index)
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

// scan looks at some leaves as they are in the table, and adds to p.due those that may be cold.
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

// look returns which versions of a leaf may be cold.
func (p *coldPass) look(tx *metadata.Tx, b *branch, index uint32) coldLeaf {
	l := coldLeaf{b: b, index: index, epoch: head}
	p.s.mu.Lock()
	epoch, written := b.Epoch, b.volume != nil
	p.s.mu.Unlock()
	for v := (metadata.Version{Branch: b.ID, Leaf: index, Epoch: head}); v.Epoch > 0; v.Epoch-- {
		var err error
		v.Epoch, err = tx.Leaf(v, &p.leaf)
		switch {
		case err != nil || v.Epoch == 0: // Check reports the damage
			return l
		case written && v.Epoch >= epoch:
			l.ofHead = p.isCold(&p.leaf, true) && !isOptimal(&p.leaf)
		default:
			l.ofPoint = l.ofPoint || p.isCold(&p.leaf, false)
		}
	}
	return l
}

// isCold reports whether one of a version's own blocks was written between the places from and to. If whole is set,
// none may have been written since.
func (p *coldPass) isCold(l *format.Leaf, whole bool) (cold bool) {
	for i, e := range l.Entries {
		if e.IsHole() || !l.IsChanged(i) {
			continue
		}
		c := p.s.slots.get(e.Slot())
		if c == nil {
			return false
		}
		at := place{ChunkSeq: c.Seq, Offset: e.Offset()}
		if !before(at, p.to) && whole {
			return false
		}
		cold = cold || before(at, p.to) && !before(at, p.from)
	}
	return cold
}
