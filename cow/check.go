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
// the disk or the system failed; it may be sound. Corrupt is everything else.
const (
	KindLeak       = audit.KindLeak
	KindCorrupt    = audit.KindCorrupt
	KindUnreadable = audit.KindUnreadable
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
// in chunks that exist, the chunks' headers, and bbolt's pages. After that it reads data, if asked to, as far as the
// data is still there.
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

// beginCheck makes a checkpoint, and returns the table as it then is. pages checks the table's pages. That may take
// long, and other work goes on meanwhile.
func (s *Store) beginCheck() (tx *metadata.Tx, pages func() error, err error) {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	if err = s.live(); err == nil {
		err = s.checkpointLocked()
	}
	if err != nil && s.readOnly == nil && !errors.Is(err, ErrFailed) {
		return nil, nil, err
	}
	if tx, err = s.meta.Begin(); err != nil {
		return nil, nil, err
	}
	pages, bad := s.meta.Pages()
	switch {
	case errors.Is(bad, ErrCorrupt):
		pages = func() error { return bad }
	case bad != nil:
		return nil, nil, errors.Join(bad, tx.Close())
	}
	return tx, pages, nil
}

// checkedStore is the store as a check sees it.
type checkedStore struct {
	s   *Store
	ctx context.Context
}

func (c checkedStore) Checkpoint() (*metadata.Tx, func() error, error) { return c.s.beginCheck() }
func (c checkedStore) Begin() (*metadata.Tx, error)                    { return c.s.meta.Begin() }
func (c checkedStore) Interrupted() error                              { return c.s.interrupted(c.ctx) }

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
