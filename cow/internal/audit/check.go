package audit

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Kinds of problems. A leak wastes space. Unreadable data could not be looked at, because access was denied, or because
// the disk or the system failed; it may be sound. A bad copy of the table harms nobody as long as the table is there.
// Corrupt is everything else.
const (
	KindLeak       = "leak"
	KindCorrupt    = "corrupt"
	KindUnreadable = "unreadable"
	KindCopy       = "copy"
)

// Problem is one violation that a check found.
type Problem struct {
	Kind  string
	Where string
	What  string
	// Record is set if a record cannot be read, and Version if a version of a leaf does not decode.
	Record  Record
	Version metadata.Version
	// Mend is the row that is right. It is nil if the problem is more than a wrong count or list.
	Mend *Mend
}

// Mend is a row of the table as the rest of the table says that it should be, if the rest is sound.
type Mend struct {
	Chunk     *format.Chunk     // with the right number of live bytes,
	Forwarded *format.Forwarded // or with the right number of blocks; 0: there should be no row,
	Changes   bool              // or nothing of both: the list of changes is to be made of the versions
}

// Record is a record, as versions refer to it: the sequence number of its chunk, the entry of its first block, and that
// block.
type Record struct {
	Chunk uint64
	Entry format.Entry
	First uint64
}

// CheckOptions are the options of a check.
type CheckOptions struct {
	ReadData bool                    // also read, verify and decompress every record that is referred to
	Volume   string                  // check only the history and snapshots of this volume; "": all
	Progress func(done, total int64) // called now and then, counts versions of leaves; may be nil
}

// CheckReport says what a check looked at and found.
type CheckReport struct {
	Branches  int64
	Versions  int64 // versions of leaves
	Entries   int64 // blocks that the versions own
	Chunks    int64
	LiveBytes int64
	DataBytes int64 // bytes of records that were read and verified
	Leaks     int
	Corrupt   int // bad copies of the table among them
	// Unreadable is how many records and files could not be looked at.
	Unreadable int
}

// NewChecker returns a check that passes every violation to problem.
func NewChecker(e Engine, o CheckOptions, problem func(Problem)) *Checker {
	c := &Checker{
		engine: e, o: o, Slice: checkSlice,
		live: map[uint32]int64{}, chunks: map[uint32]format.Chunk{}, points: map[uint32][]uint32{},
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
	return c
}

// Run runs the check, and returns what it looked at and found. The error is the check's own.
func (c *Checker) Run() (CheckReport, error) {
	err := c.structure()
	if err == nil && c.o.ReadData {
		err = c.readData()
	}
	return c.report, err
}

// structure checks the table in one state of it.
func (c *Checker) structure() (err error) {
	st, err := c.engine.Checkpoint()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Tx.Close()) }()
	if err = st.Pages(); errors.Is(err, format.ErrCorrupt) {
		c.corrupt("table", "%v", err)
		err = nil
	}
	if err == nil {
		err = c.guard(func() error { return c.table(st.Tx) })
	}
	sound := err == nil && c.report.Corrupt+c.report.Unreadable == 0
	return errors.Join(err, c.guard(func() error { return c.copy(st, sound) }))
}

// copy checks the copy of the table.
func (c *Checker) copy(st State, sound bool) error {
	err := st.Copy(sound)
	if errors.Is(err, metadata.ErrBadCopy) {
		c.problem(Problem{Kind: KindCopy, Where: "copy of the table", What: err.Error()})
		return nil
	}
	return err
}

// guard calls fn. If damage to the table ends fn, guard passes that on as a problem, and returns nil.
func (c *Checker) guard(fn func() error) error {
	err := metadata.Guard(fn)
	if errors.Is(err, format.ErrCorrupt) {
		c.corrupt("table", "%v", err)
		return nil
	}
	return err
}

// Checker is one check.
type Checker struct {
	Slice time.Duration // for how long one state of the table is read; set by NewChecker

	engine   Engine
	o        CheckOptions
	problem  func(Problem)
	report   CheckReport
	branches branchRows
	points   map[uint32][]uint32 // by branch: epochs of the kept points, ascending
	chunks   map[uint32]format.Chunk
	live     map[uint32]int64 // by slot: recounted live bytes
	forwards forwardReader
	only     map[uint32]bool // branches to check; nil: all
	total    int64           // versions
	most     int64           // bytes of records to read in one slice; 0: no limit
	alone    bool            // only data is read, so what the structure's check would report is reported with it
	buf      []byte
	unit     []byte

	newer     metadata.Version // the version before this one in key order
	newerLeaf format.Leaf
}

// chunk names a chunk in a report.
func (c *Checker) chunk(slot uint32) string { return "chunk " + c.engine.ChunkName(slot) }

func (c *Checker) corrupt(where, text string, args ...any) {
	c.problem(Problem{Kind: KindCorrupt, Where: where, What: fmt.Sprintf(text, args...)})
}

// badLeaf reports a version that does not decode.
func (c *Checker) badLeaf(v metadata.Version, err error) {
	c.problem(Problem{Kind: KindCorrupt, Where: where(v), What: err.Error(), Version: v})
}

// failed reports a problem with a file: its content is wrong, or could not be read. If it is about a record, r says
// about which.
func (c *Checker) failed(where string, r Record, err error) {
	kind := KindCorrupt
	if fault.OutOfReach(err) || errors.Is(err, syscall.EIO) {
		kind = KindUnreadable
	}
	c.problem(Problem{Kind: kind, Where: where, What: err.Error(), Record: r})
}

// table checks the rows of the table, and the chunk files against them.
func (c *Checker) table(tx *metadata.Tx) error {
	tb, err := tx.Load()
	if err != nil {
		return err
	}
	c.index(tb)
	if err := c.choose(tb); err != nil {
		return err
	}
	total, changes, err := tx.Counts()
	c.total = int64(total)
	if err != nil {
		return err
	}
	if total != changes {
		c.miscounted(KindCorrupt, "table", Mend{Changes: true}, "%d versions of leaves, %d listed changes", total, changes)
	}
	err = tx.Versions(func(v metadata.Version, l *format.Leaf, bad error) error {
		if err := c.engine.Interrupted(); err != nil {
			return err
		}
		if c.only != nil && !c.only[v.Branch] {
			return nil
		}
		c.report.Versions++
		if c.report.Versions%64 == 0 {
			c.progress(c.report.Versions)
		}
		if bad != nil {
			c.badLeaf(v, bad)
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
	if c.only != nil { // the sums over all versions are not known
		c.files(tb)
		return nil
	}
	if err := c.checkForwards(tx); err != nil {
		return err
	}
	c.accounting(tb)
	return nil
}

// progress reports how many versions have been gone over. With ReadData, that is done twice.
func (c *Checker) progress(done int64) {
	if c.o.Progress == nil {
		return
	}
	total := c.total
	if c.o.ReadData {
		total *= 2
	}
	c.o.Progress(min(done, total), total)
}

func (c *Checker) index(tb *metadata.Tables) {
	c.branches = branchRowsOf(tb)
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
}

// choose finds the branches that the blocks of the volume and its snapshots are on.
func (c *Checker) choose(tb *metadata.Tables) error {
	if c.o.Volume == "" {
		return nil
	}
	i := slices.IndexFunc(tb.Volumes, func(v format.Volume) bool { return v.Name == c.o.Volume })
	if i < 0 {
		return fmt.Errorf("volume %q: %w", c.o.Volume, fault.ErrNotFound)
	}
	v := tb.Volumes[i]
	c.only = map[uint32]bool{}
	add := func(b uint32) {
		for ; b != 0 && !c.only[b]; b = c.branches[b].OriginBranch {
			c.only[b] = true
		}
	}
	add(v.Branch)
	for _, sn := range tb.Snapshots {
		if sn.Volume == v.ID {
			add(sn.Branch)
		}
	}
	c.report.Branches = int64(len(c.only))
	return nil
}

func where(v metadata.Version) string {
	return fmt.Sprintf("branch %d leaf %d epoch %d", v.Branch, v.Leaf, v.Epoch)
}

// version checks one version. Versions come by branch and leaf, the newest first. So the version before is either the
// next newer one of the same leaf, or the oldest one of another leaf.
func (c *Checker) version(tx *metadata.Tx, v metadata.Version, l *format.Leaf) error {
	b, ok := c.branches[v.Branch]
	if !ok || v.Epoch == 0 || v.Epoch > b.Epoch {
		c.corrupt(where(v), "no such branch or epoch")
	}
	if listed, err := tx.Changed(v); err != nil {
		return err
	} else if !listed {
		c.miscounted(KindCorrupt, where(v), Mend{Changes: true}, "is not listed as changed")
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

// interval returns the index of the first kept point at or after the version's epoch.
func (c *Checker) interval(v metadata.Version) int {
	i, _ := slices.BinarySearch(c.points[v.Branch], v.Epoch)
	return i
}

// unchanged checks that blocks which the newer version did not change are the same in the older one.
func (c *Checker) unchanged(older *format.Leaf) {
	for i, e := range c.newerLeaf.Entries {
		if !c.newerLeaf.IsChanged(i) && e != older.Entries[i] {
			c.corrupt(where(c.newer), "block %d did not change but is %v, and was %v", i, e, older.Entries[i])
		}
	}
}

// origin checks the oldest version of a leaf against what the branch began with.
func (c *Checker) origin(tx *metadata.Tx) error {
	if c.newer.Branch == 0 {
		return nil
	}
	var l format.Leaf
	b := c.branches[c.newer.Branch]
	_, err := c.branches.leaf(tx, b.OriginBranch, b.OriginEpoch, c.newer.Leaf, &l)
	if errors.Is(err, format.ErrCorrupt) {
		return nil // this is or was reported where it is
	}
	if err == nil {
		c.unchanged(&l)
	}
	return err
}

// entries counts the blocks that the version owns, and checks that their records lie in chunks.
func (c *Checker) entries(tx *metadata.Tx, v metadata.Version, l *format.Leaf) error {
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
		if ch, ok := c.chunks[e.Slot()]; !ok || !contains(ch, e) {
			c.corrupt(where(v), "block %d is %v, where there is no record", i, e)
		}
	}
	return nil
}

// contains reports whether an entry's record lies in a chunk.
func contains(ch format.Chunk, e format.Entry) bool {
	return e.Offset() >= format.ChunkHeaderSize && e.Offset()+uint32(e.Size()) <= ch.End
}

// accounting compares the live bytes in the rows with the recount, and the rows with the files.
func (c *Checker) accounting(tb *metadata.Tables) {
	for _, ch := range tb.Chunks {
		got := c.live[ch.Slot]
		c.report.LiveBytes += got
		if int64(ch.Live) != got {
			right := ch
			right.Live = uint32(got)
			c.miscounted(kindOf(int64(ch.Live), got), c.chunk(ch.Slot), Mend{Chunk: &right}, "%d live bytes are kept, %d are referred to", ch.Live, got)
		}
		c.file(ch)
	}
}

// kindOf is the kind of problem that a wrong count is. One that is too high wastes space.
func kindOf(kept, right int64) string {
	if kept > right {
		return KindLeak
	}
	return KindCorrupt
}

// miscounted reports a count or a list that the rest of the table says otherwise.
func (c *Checker) miscounted(kind, where string, m Mend, text string, args ...any) {
	c.problem(Problem{Kind: kind, Where: where, What: fmt.Sprintf(text, args...), Mend: &m})
}

// files checks the files of those chunks that were referred to.
func (c *Checker) files(tb *metadata.Tables) {
	c.report.Chunks = 0
	for _, row := range tb.Chunks {
		if got, ok := c.live[row.Slot]; ok {
			c.report.Chunks++
			c.report.LiveBytes += got
			c.file(row)
		}
	}
}

// file checks the file of a chunk.
func (c *Checker) file(row format.Chunk) {
	ch := c.engine.Hold(row)
	if ch == nil {
		return
	}
	defer ch.Release()
	h, err := ch.Header()
	if err == nil && h.Seq != row.Seq {
		err = fault.Corruptf("its header has the sequence %d, the table says %d", h.Seq, row.Seq)
	}
	if err == nil {
		err = longEnough(ch, row)
	}
	if err != nil && !ch.HasDied() {
		c.failed(c.chunk(row.Slot), Record{}, err)
	}
}

func longEnough(ch Chunk, row format.Chunk) error {
	size, err := ch.Size()
	if err == nil && size < int64(row.End) {
		err = fault.Corruptf("it has %d bytes, its records end at %d", size, row.End)
	}
	return err
}
