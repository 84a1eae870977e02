package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Kinds of problems. A leak wastes space; what is unreadable could not be looked at, and may be sound: access was
// denied, or the disk or the system failed. Corrupt is everything else.
const (
	KindLeak       = "leak"
	KindCorrupt    = "corrupt"
	KindUnreadable = "unreadable"
)

// Problem is one violation that Check found.
type Problem struct {
	Kind  string `json:"kind"`
	Where string `json:"where"`
	What  string `json:"what"`
}

// CheckOptions are for Check.
type CheckOptions struct {
	ReadData bool                    // also read, verify and decompress every record that is referred to
	Volume   string                  // read only the data of this volume's history; "": all
	Progress func(done, total int64) // called now and then with leaf versions; may be nil
}

// CheckReport is what Check went over and found.
type CheckReport struct {
	Branches  int64 `json:"branches"`
	Versions  int64 `json:"versions"` // of leaves
	Entries   int64 `json:"entries"`  // blocks that the versions own
	Chunks    int64 `json:"chunks"`
	LiveBytes int64 `json:"live_bytes"`
	DataBytes int64 `json:"data_bytes"` // read and verified
	Leaks     int   `json:"leaks"`
	Corrupt   int   `json:"corrupt"`
	// Unreadable is how many records and files could not be looked at.
	Unreadable int `json:"unreadable"`
}

// Check proves the table against itself and the chunk files, as of a checkpoint that
// it begins with; the store may be in use. It checks the invariants 4 to 6 of DESIGN.md with a
// full recount of the live bytes, that entries lie in chunks that exist, the
// chunks' headers, and bbolt's pages. Every violation is passed to problem; the error is
// of the check itself.
func (s *Store) Check(ctx context.Context, o CheckOptions, problem func(Problem)) (CheckReport, error) {
	c := &checker{
		s: s, ctx: ctx, o: o, live: map[uint32]int64{}, chunks: map[uint32]format.Chunk{}, branches: map[uint32]format.Branch{},
		points: map[uint32][]uint32{},
	}
	c.problem = func(p Problem) {
		switch p.Kind {
		case KindLeak:
			c.report.Leaks++
		case KindUnreadable:
			c.report.Unreadable++
		default:
			c.report.Corrupt++
		}
		problem(p)
	}
	if err := s.beginTask(); err != nil {
		return c.report, fmt.Errorf("check: %w", err)
	}
	defer s.tasks.Done()
	tx, pages, err := s.pinTable()
	if err != nil {
		return c.report, fmt.Errorf("check: %w", err)
	}
	defer s.unpinTable(tx)
	if err := pages(); errors.Is(err, ErrCorrupt) {
		c.corrupt("table", "%v", err)
	} else if err != nil {
		return c.report, fmt.Errorf("check: %w", err)
	}
	if err := metadata.Guard(func() error { return c.run(tx) }); err != nil {
		if !errors.Is(err, ErrCorrupt) {
			return c.report, fmt.Errorf("check: %w", err)
		}
		c.corrupt("table", "%v", err)
	}
	return c.report, nil
}

// beginTask lets Close know of a check or the like, which then waits for it; after Close there is none.
func (s *Store) beginTask() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.tasks.Add(1)
	return nil
}

// pinTable checkpoints, and holds on to the table as it then is: no chunk file that it names is
// removed. pages checks the table's pages, which may take long; others go on meanwhile.
func (s *Store) pinTable() (tx *metadata.Tx, pages func() error, err error) {
	s.ckptMu.Lock()
	defer s.ckptMu.Unlock()
	s.mu.Lock()
	err = s.usable()
	s.mu.Unlock()
	if err == nil {
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
	s.pins++
	return tx, pages, nil
}

func (s *Store) unpinTable(tx *metadata.Tx) {
	if err := tx.Close(); err != nil {
		s.log.Error("end of a check's transaction", "err", err)
	}
	s.ckptMu.Lock()
	s.pins--
	s.ckptMu.Unlock()
}

// checker is one run of Check.
type checker struct {
	s        *Store
	ctx      context.Context
	o        CheckOptions
	problem  func(Problem)
	report   CheckReport
	branches map[uint32]format.Branch
	points   map[uint32][]uint32 // by branch: epochs that are kept, ascending
	chunks   map[uint32]format.Chunk
	live     map[uint32]int64 // by slot: the recount
	forwards checkForwards
	data     map[uint32]bool // branches whose data to read; nil: all
	buf      []byte
	unit     []byte

	newer     metadata.Version // the version before this one in key order
	newerLeaf format.Leaf
}

func (c *checker) corrupt(where, text string, args ...any) {
	c.problem(Problem{KindCorrupt, where, fmt.Sprintf(text, args...)})
}

// failed is a problem with a file: its content is wrong, or could not be read.
func (c *checker) failed(where string, err error) {
	kind := KindCorrupt
	if outOfReach(err) || errors.Is(err, syscall.EIO) {
		kind = KindUnreadable
	}
	c.problem(Problem{kind, where, err.Error()})
}

func (c *checker) run(tx *metadata.Tx) error {
	tb, err := tx.Load()
	if err != nil {
		return err
	}
	c.index(tb)
	total, changes, err := tx.Counts()
	if err != nil {
		return err
	}
	if total != changes {
		c.corrupt("table", "%d versions of leaves, %d listed changes", total, changes)
	}
	err = tx.Versions(func(v metadata.Version, l *format.Leaf, bad error) error {
		if err := c.interrupted(); err != nil {
			return err
		}
		c.report.Versions++
		if c.o.Progress != nil && c.report.Versions%64 == 0 {
			c.o.Progress(c.report.Versions, int64(total))
		}
		if bad != nil {
			c.corrupt(where(v), "%v", bad)
			c.newer = metadata.Version{}
			return nil
		}
		return c.version(tx, v, l)
	})
	if err == nil {
		err = c.origin(tx)
	}
	if err != nil {
		return err
	}
	if err := c.checkForwards(tx); err != nil {
		return err
	}
	c.accounting(tb)
	return nil
}

// interrupted says whether the caller, or the store's Close, wants the check to end.
func (c *checker) interrupted() error { return c.s.interrupted(c.ctx) }

func (c *checker) index(tb *metadata.Tables) {
	for _, b := range tb.Branches {
		c.branches[b.ID] = b
	}
	for _, sn := range tb.Snapshots {
		c.points[sn.Branch] = append(c.points[sn.Branch], sn.Epoch)
	}
	for _, p := range c.points {
		slices.Sort(p)
	}
	for _, ch := range tb.Chunks {
		c.chunks[ch.Slot] = ch
	}
	c.forwards.index(tb.Forwarded)
	c.report.Branches, c.report.Chunks = int64(len(tb.Branches)), int64(len(tb.Chunks))
	for _, v := range tb.Volumes {
		if c.o.Volume != "" && v.Name == c.o.Volume {
			c.data = map[uint32]bool{}
			for b := v.Branch; b != 0; b = c.branches[b].OriginBranch {
				c.data[b] = true
			}
		}
	}
}

func where(v metadata.Version) string {
	return fmt.Sprintf("branch %d leaf %d epoch %d", v.Branch, v.Leaf, v.Epoch)
}

// version checks one version. They come by branch and leaf, the newest first, so that the one before
// is either the next newer of the same leaf, or the oldest of another.
func (c *checker) version(tx *metadata.Tx, v metadata.Version, l *format.Leaf) error {
	b, ok := c.branches[v.Branch]
	if !ok || v.Epoch == 0 || v.Epoch > b.Epoch {
		c.corrupt(where(v), "no such branch or epoch")
	}
	if listed, err := tx.Changed(v); err != nil {
		return err
	} else if !listed {
		c.corrupt(where(v), "is not listed as changed")
	}
	if v.Branch == c.newer.Branch && v.Leaf == c.newer.Leaf {
		c.unchanged(l)
		if c.interval(v) == c.interval(c.newer) {
			c.corrupt(where(v), "epoch %d has a version for the same point", c.newer.Epoch)
		}
	} else if err := c.origin(tx); err != nil {
		return err
	}
	c.newer, c.newerLeaf = v, *l
	return c.entries(tx, v, l)
}

// interval is the index of the first kept point at or after the version's epoch.
func (c *checker) interval(v metadata.Version) int {
	i, _ := slices.BinarySearch(c.points[v.Branch], v.Epoch)
	return i
}

// unchanged checks that the blocks which the newer version did not change are as in the older.
func (c *checker) unchanged(older *format.Leaf) {
	for i, e := range c.newerLeaf.Entries {
		if !c.newerLeaf.IsChanged(i) && e != older.Entries[i] {
			c.corrupt(where(c.newer), "block %d did not change but is %v, and was %v", i, e, older.Entries[i])
		}
	}
}

// origin checks the oldest version of a leaf against what the branch began with.
func (c *checker) origin(tx *metadata.Tx) error {
	if c.newer.Branch == 0 {
		return nil
	}
	var l format.Leaf
	b := c.branches[c.newer.Branch]
	for b.OriginBranch != 0 {
		epoch, err := tx.Leaf(metadata.Version{Branch: b.OriginBranch, Leaf: c.newer.Leaf, Epoch: b.OriginEpoch}, &l)
		if errors.Is(err, ErrCorrupt) {
			return nil // is or was reported where it is
		}
		if err != nil {
			return err
		}
		if epoch != 0 {
			break
		}
		b = c.branches[b.OriginBranch]
	}
	c.unchanged(&l)
	return nil
}

// entries counts what the version owns, and reads it if wanted.
func (c *checker) entries(tx *metadata.Tx, v metadata.Version, l *format.Leaf) error {
	var last format.Entry
	for i, name := range l.Entries {
		if name.IsHole() || !l.IsChanged(i) {
			continue
		}
		c.report.Entries++
		e, err := c.forwards.follow(tx, name)
		if err != nil {
			c.corrupt(where(v), "block %d: %v", i, err)
			continue
		}
		c.live[e.Slot()] += int64(e.Share())
		ch, ok := c.chunks[e.Slot()]
		if !ok || e.Offset() < format.ChunkHeaderSize || e.Offset()+uint32(e.Size()) > ch.End {
			c.corrupt(where(v), "block %d is %v, where there is no record", i, e)
			continue
		}
		if c.o.ReadData && (c.o.Volume == "" || c.data[v.Branch]) && !(last != 0 && e.SameRecord(last)) {
			block := uint64(v.Leaf)*format.LeafBlocks + uint64(i) - uint64(e.Index())
			if err := c.read(e, block); err != nil {
				c.failed(where(v), fmt.Errorf("block %d: chunk %s offset %d: %w", i, chunkName(e.Slot()), e.Offset(), err))
			}
		}
		last = e
	}
	return nil
}

// read reads and verifies a record from its file.
func (c *checker) read(e format.Entry, first uint64) error {
	if c.buf == nil {
		c.buf, c.unit = make([]byte, format.MaxDataRecord), make([]byte, unitSize)
	}
	ch := c.s.slots.get(e.Slot())
	if ch == nil {
		return corruptf("the chunk does not exist")
	}
	f, err := ch.handle()
	if err != nil {
		return err
	}
	stored := c.buf[:min(e.Size(), len(c.buf))]
	if n, err := readFull(f, stored, int64(e.Offset())); err != nil {
		return err
	} else if n < len(stored) {
		return corruptf("the file ends at %d", int64(e.Offset())+int64(n))
	}
	payload, codec, err := verify(stored, ch.seq, e, first)
	if err != nil {
		return err
	}
	c.report.DataBytes += int64(e.Size())
	return format.Decompress(codec, c.unit[:e.Blocks()*format.BlockSize], payload)
}

// accounting compares the kept live bytes with the recount, and the rows with the files.
func (c *checker) accounting(tb *metadata.Tables) {
	for _, ch := range tb.Chunks {
		got := c.live[ch.Slot]
		c.report.LiveBytes += got
		switch {
		case int64(ch.Live) > got:
			c.problem(Problem{KindLeak, "chunk " + chunkName(ch.Slot), fmt.Sprintf("%d live bytes are kept, %d are referred to", ch.Live, got)})
		case int64(ch.Live) < got:
			c.corrupt("chunk "+chunkName(ch.Slot), "%d live bytes are kept, %d are referred to", ch.Live, got)
		}
		c.file(ch)
	}
}

func (c *checker) file(ch format.Chunk) {
	where := "chunk " + chunkName(ch.Slot)
	h, err := c.s.chunkHeader(chunkName(ch.Slot), ch.Slot)
	switch {
	case err != nil:
		c.failed(where, err)
	case h.Seq != ch.Seq:
		c.corrupt(where, "its header has the sequence %d, the table says %d", h.Seq, ch.Seq)
	default:
		f, err := c.s.slots.get(ch.Slot).handle()
		if err == nil {
			var size int64
			if size, err = f.Size(); err == nil && size < int64(ch.End) {
				err = corruptf("it has %d bytes, its records end at %d", size, ch.End)
			}
		}
		if err != nil {
			c.failed(where, err)
		}
	}
}
