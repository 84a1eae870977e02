package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Kinds of problems. A leak wastes space. Unreadable data could not be looked at, because access was denied, or because
// the disk or the system failed; it may be sound. A bad copy of the table harms nobody as long as the table is there.
// Corrupt is everything else.
const (
	KindLeak       = audit.KindLeak
	KindCorrupt    = audit.KindCorrupt
	KindUnreadable = audit.KindUnreadable
	KindCopy       = audit.KindCopy
)

// Problem is one violation that Check found.
type Problem struct {
	Kind  string `json:"kind"`
	Where string `json:"where"`
	What  string `json:"what"`
	// Lost is what volumes and snapshots lose by it, in the order of their names, if it is about data or a leaf.
	Lost []Lost `json:"lost,omitempty"`
}

// CheckOptions are the options of Check.
type CheckOptions struct {
	ReadData bool                    // also read, verify and decompress every record that is referred to
	Volume   string                  // check only the history and snapshots of this volume; "": all
	Progress func(done, total int64) // called now and then, counts versions of leaves; may be nil
}

// CheckReport says what Check looked at and found.
type CheckReport struct {
	Branches  int64 `json:"branches"`
	Versions  int64 `json:"versions"` // versions of leaves
	Entries   int64 `json:"entries"`  // blocks that the versions own
	Chunks    int64 `json:"chunks"`
	LiveBytes int64 `json:"live_bytes"`
	DataBytes int64 `json:"data_bytes"` // bytes of records that were read and verified
	Leaks     int   `json:"leaks"`
	Corrupt   int   `json:"corrupt"`
	// Unreadable is how many records and files could not be looked at.
	Unreadable int `json:"unreadable"`
}

// Check checks the table against itself and against the chunk files, as of a checkpoint that it begins with. The store
// may be in use. Check verifies invariants 4 to 6 of DESIGN.md with a full recount of the live bytes, that entries lie
// in chunks that exist, the chunks' headers, and bbolt's pages. It verifies the copy of the table, and compares it with the
// table. After that it reads data, if asked to, as far as the data is still there.
//
// If nothing but the copy of the table is wrong with the table, and the store can be written to, it makes a new copy.
//
// Check passes every violation to problem. The error that it returns is its own. Nothing waits for a check, and it
// keeps no space from being given back.
func (s *Store) Check(ctx context.Context, o CheckOptions, problem func(Problem)) (CheckReport, error) {
	if err := s.beginTask(); err != nil {
		return CheckReport{}, fmt.Errorf("check: %w", err)
	}
	defer s.tasks.Done()
	n := problemNamer{s: s, ctx: ctx, problem: problem}
	report, err := audit.NewChecker(checkedStore{s, ctx}, audit.CheckOptions(o), n.add).Run()
	n.flush()
	return CheckReport(report), wrapIf(errors.Join(err, n.err), "check")
}

// problemNamer adds to problems what volumes and snapshots lose by them, and notes the damage. It keeps those of one
// leaf back, so that the leaf is looked at once. flush passes on what it has kept.
type problemNamer struct {
	s       *Store
	ctx     context.Context
	problem func(Problem)

	kept   []Problem
	places []badPlace // of kept; no leaf: it is about none
	err    error      // the first that a search for names met
}

func (n *problemNamer) add(p audit.Problem) {
	at := n.s.metProblem(p)
	if len(n.places) > 0 && n.places[0].leafIndex() != at.leafIndex() {
		n.flush()
	}
	n.kept = append(n.kept, Problem{Kind: p.Kind, Where: p.Where, What: p.What})
	n.places = append(n.places, at)
	if at == (badPlace{}) || len(n.kept) == format.LeafBlocks {
		n.flush()
	}
}

func (n *problemNamer) flush() {
	bad := map[badPlace]*[]Lost{}
	for _, at := range n.places {
		if at != (badPlace{}) {
			bad[at] = new([]Lost)
		}
	}
	if len(bad) > 0 {
		n.err = cmp.Or(n.err, n.s.lostTo(n.ctx, bad, n.s.points()))
	}
	for i, p := range n.kept {
		if lost := bad[n.places[i]]; lost != nil {
			p.Lost = *lost
		}
		n.problem(p)
	}
	n.kept, n.places = n.kept[:0], n.places[:0]
}

// beginCheck makes a checkpoint, and returns the table as it then is. What checks it may take long, and other work goes on
// meanwhile.
func (s *Store) beginCheck(interrupted func() error) (st audit.State, err error) {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	if err = s.live(); err == nil {
		err = s.checkpointLocked()
	}
	if err != nil && s.readOnly == nil && !errors.Is(err, ErrFailed) {
		return st, err
	}
	if st.Tx, err = s.meta.Begin(); err != nil {
		return st, err
	}
	pages, bad := s.meta.Pages()
	if st.Pages = pages; errors.Is(bad, ErrCorrupt) {
		st.Pages, bad = func() error { return bad }, nil
	}
	check, err := s.meta.CheckCopy()
	if err := errors.Join(bad, err); err != nil {
		return st, errors.Join(err, st.Tx.Close())
	}
	st.Copy = func(sound bool) error {
		tx := st.Tx
		if !sound {
			tx = nil
		}
		return s.copyChecked(check(tx, interrupted), sound)
	}
	return st, nil
}

// copyChecked adds to what a check of the copy has returned what becomes of a bad copy. It makes a new one, if the table is
// sound.
func (s *Store) copyChecked(err error, sound bool) error {
	if !errors.Is(err, metadata.ErrBadCopy) {
		return err
	}
	switch _, used := s.meta.Room(); {
	case !sound:
		return fmt.Errorf("%w; when the table is right again, 'vdisk check' makes a new one", err)
	case s.readOnly != nil:
		return fmt.Errorf("%w; where the store can be written to, 'vdisk check' makes a new one", err)
	case s.lowDiskWith(used):
		return fmt.Errorf("%w; when there is more room, 'vdisk check' makes a new one", err)
	}
	if rerr := s.renewCopy(); rerr != nil {
		return fmt.Errorf("%w; %v; 'vdisk check' tries again", err, rerr)
	}
	return fmt.Errorf("%w; a new one has been made", err)
}

// checkedStore is the store as a check sees it.
type checkedStore struct {
	s   *Store
	ctx context.Context
}

func (c checkedStore) Checkpoint() (audit.State, error) { return c.s.beginCheck(c.Interrupted) }
func (c checkedStore) Begin() (*metadata.Tx, error)     { return c.s.meta.Begin() }
func (c checkedStore) Interrupted() error               { return c.s.interrupted(c.ctx) }

func (c checkedStore) Sound(r audit.Record) {
	c.s.damage.sound(badPlace{record: unitKey{r.Chunk, r.Entry, r.First}})
}

func (c checkedStore) ChunkName(slot uint32) string { return wal.ChunkName(slot) }

func (c checkedStore) Hold(row format.Chunk) audit.Chunk {
	if h, ok := c.hold(row); ok {
		return h
	}
	return nil
}

func (c checkedStore) hold(row format.Chunk) (h heldChunk, ok bool) {
	ch := c.s.slots.get(row.Slot)
	if ch == nil || ch.Seq != row.Seq || ch.gone || !ch.TryAcquire() {
		return h, false
	}
	return heldChunk{c.s, ch}, true
}

// heldChunk is a chunk to which the check holds a reference.
type heldChunk struct {
	s  *Store
	ch *chunk
}

func (c heldChunk) Release() { c.ch.Release() }

func (c heldChunk) Header() (format.ChunkHeader, error) {
	return c.s.wal.Header(c.ch.Name(), c.ch.Slot)
}

func (c heldChunk) Size() (int64, error) {
	f, err := c.ch.Handle()
	if err != nil {
		return 0, err
	}
	return f.Size()
}

func (c heldChunk) ReadFull(p []byte, off int64) (int, error) {
	f, err := c.ch.Handle()
	if err != nil {
		return 0, err
	}
	return wal.ReadFull(f, p, off)
}

func (c heldChunk) HasDied() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.ch.dead
}
