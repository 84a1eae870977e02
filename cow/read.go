package cow

import (
	"cmp"
	"errors"
	"fmt"
	"io"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// maxPlan bounds how much of a read ReadAt plans at once.
const maxPlan = 1 << 20

// ReadPlan is one read, in three steps. PlanRead looks up the blocks. The caller then does the reads that Fetches
// lists, in any way it likes. Finish verifies, decompresses and copies. A plan is for one read at a time, and is reused
// without allocation.
type ReadPlan struct {
	d       *Device
	records []planned
	pieces  []piece
	fetches []Fetch
	arena   []byte // the records as stored
	unit    []byte // one unit, when only a part of it is wanted; its memory is swapped with the unit cache's
}

// planned is a record that the read needs.
type planned struct {
	c     *chunk // a reference is held
	e     format.Entry
	was   content // what the leaf says: another place than e, if the record has been moved
	first uint64  // the block at which the unit began
	at    int     // offset in arena
	piece int     // its first piece
	last  int     // its last piece
	done  bool    // the pieces are filled
	bad   error   // why the chunk's file cannot be read
}

// piece is a range of the caller's buffer that a record fills.
type piece struct {
	dst  []byte
	from int // offset in the unit, in bytes
	next int // the next piece of the same record; -1: none
}

// Fetch is a read of a chunk file that a plan asks for: len(Buf) bytes at Off.
type Fetch struct {
	Buf  []byte
	Off  int64
	file storage.File
	slot uint32
	fd   int
	held bool // fd is valid
}

// Fd returns the file descriptor to read from. It is valid after Hold, and until Finish.
func (f *Fetch) Fd() int { return f.fd }

// Read does the fetch in the calling goroutine.
func (f *Fetch) Read() error {
	n, err := f.file.ReadAt(f.Buf, f.Off)
	if n == len(f.Buf) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("it ends at %d: %w", f.Off+int64(n), io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("chunk %s: %w", wal.ChunkName(f.slot), err)
}

// PlanRead plans the read of len(p) bytes at off into p. The range may have any alignment, and must lie within the
// device. PlanRead clears holes in p at once. After an error there is nothing to finish.
func (d *Device) PlanRead(pl *ReadPlan, p []byte, off int64) error {
	if err := d.checkRange(off, int64(len(p))); err != nil {
		return fmt.Errorf("read %s: %w", d.ref, err)
	}
	d.s.reads.Add(1)
	return d.plan(pl, p, off)
}

// plan is PlanRead without the range check. Where the device ends within a block, the map still has all of that block.
func (d *Device) plan(pl *ReadPlan, p []byte, off int64) error {
	pl.begin(d)
	for len(p) > 0 {
		n := int(min(int64(len(p)), leafSize-off%leafSize))
		var bad error
		err := d.s.cache.View(d.b.leaf(uint32(off/leafSize), d.asOf), func(lf *leafcache.Leaf) {
			bad = pl.plan(lf, p[:n], off)
		})
		if err := errors.Join(err, bad); err != nil {
			pl.release()
			return fmt.Errorf("read %s at %d: %w", d.ref, off, err)
		}
		p, off = p[n:], off+int64(n)
	}
	if err := pl.locate(); err != nil {
		pl.release()
		return fmt.Errorf("read %s: %w", d.ref, err)
	}
	return nil
}

// begin makes pl an empty plan of d.
func (pl *ReadPlan) begin(d *Device) {
	pl.d = d
	pl.records, pl.pieces, pl.fetches = pl.records[:0], pl.pieces[:0], pl.fetches[:0]
}

// plan adds the pieces of a range within one leaf. The leaf's shard is locked, so that the chunk of an entry cannot go
// before plan has taken a reference to it.
func (pl *ReadPlan) plan(lf *leafcache.Leaf, p []byte, off int64) error {
	for len(p) > 0 {
		block, skip := uint64(off/format.BlockSize), int(off%format.BlockSize)
		i := int(block % format.LeafBlocks)
		e := lf.Entry(i)
		n := min(len(p), format.BlockSize-skip)
		for j := i + 1; n < len(p) && follows(e, lf.Entry(j), j-i); j++ {
			n = min(len(p), n+format.BlockSize)
		}
		if e.IsHole() {
			clear(p[:n])
		} else if err := pl.add(e, block, p[:n], skip); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// follows reports whether next, n blocks after e, continues e.
func follows(e, next format.Entry, n int) bool {
	if e.IsHole() {
		return next.IsHole()
	}
	return e.SameRecord(next) && next.Index() == e.Index()+n
}

func (pl *ReadPlan) add(e format.Entry, block uint64, dst []byte, skip int) error {
	pl.pieces = append(pl.pieces, piece{dst: dst, from: e.Index()*format.BlockSize + skip, next: -1})
	this := len(pl.pieces) - 1
	// Overwrites leave holes in a unit. The unit's other blocks come soon after, if at all.
	for i := len(pl.records) - 1; e.Blocks() > 1 && i >= max(0, len(pl.records)-format.UnitBlocks); i-- {
		if r := &pl.records[i]; r.was.e.SameRecord(e) && r.was.c == pl.d.s.slots.get(e.Slot()) {
			pl.pieces[r.last].next, r.last = this, this
			return nil
		}
	}
	r := planned{first: block - uint64(e.Index()), piece: this, last: this}
	var err error
	if r.was, r.c, r.e, err = pl.d.s.resolve(e); err != nil {
		return fmt.Errorf("block %d: %w", block, err)
	}
	pl.records = append(pl.records, r)
	return nil
}

// resolve finds the chunk that holds the record of entry e, and takes a reference to it. The caller holds the lock of a
// leaf that has e, so that the slot keeps its meaning.
func (s *Store) resolve(e format.Entry) (was content, c *chunk, to format.Entry, err error) {
	for {
		c = s.slots.get(e.Slot())
		switch {
		case c == nil:
			return was, nil, 0, fault.Corruptf("it is in chunk %s, which does not exist", wal.ChunkName(e.Slot()))
		case c.gone:
			to, held, err := s.forwards.follow(e, &s.slots)
			return content{e, c}, held, to, err
		case c.TryAcquire():
			return content{e, c}, c, e, nil
		}
	}
}

// locate gives each record its place in the arena. It copies the records that are still in the log's buffers, and makes
// fetches for the others, one for records that are neighbours in a chunk.
func (pl *ReadPlan) locate() error {
	size := 0
	for i := range pl.records {
		pl.records[i].at = size
		size += pl.records[i].e.Size()
	}
	if cap(pl.arena) < size {
		pl.arena = make([]byte, max(size, 2*cap(pl.arena), 64<<10))
	}
	pl.arena = pl.arena[:cap(pl.arena)]
	var before *planned // the last record of the last fetch
	for i := range pl.records {
		r := &pl.records[i]
		if r.e.Blocks() > 1 && !pl.whole(r) && pl.d.s.units.get(r.key(), pl.pieces, r.piece) {
			r.done, before = true, nil
			continue
		}
		buf := pl.arena[r.at : r.at+r.e.Size()]
		if pl.d.s.wal.Read(r.c.Chunk, r.e.Offset(), buf) {
			before = nil
			continue
		}
		if before != nil && before.c == r.c && before.e.Offset()+uint32(before.e.Size()) == r.e.Offset() {
			f := &pl.fetches[len(pl.fetches)-1]
			f.Buf = f.Buf[:len(f.Buf)+len(buf)]
		} else {
			file, err := r.c.Handle()
			if errors.Is(err, ErrCorrupt) { // the record may be elsewhere, too
				r.bad, before = err, nil
				continue
			}
			if err != nil {
				return err
			}
			pl.fetches = append(pl.fetches, Fetch{Buf: buf, Off: int64(r.e.Offset()), file: file, slot: r.c.Slot})
		}
		before = r
	}
	return nil
}

// Fetches returns the reads that have to be done before Finish. It is empty if memory had everything.
func (pl *ReadPlan) Fetches() []Fetch { return pl.fetches }

// Hold gets the file descriptors of all fetches and keeps them until Finish, for a caller that passes them on to be
// read elsewhere. It returns false, and keeps none, if that many descriptors are not free now. Fetch, by contrast,
// waits for them one by one.
func (pl *ReadPlan) Hold() bool {
	for i := range pl.fetches {
		f := &pl.fetches[i]
		if f.fd, f.held = f.file.Hold(); !f.held {
			pl.drop()
			return false
		}
	}
	return true
}

// drop releases the file descriptors that Hold got.
func (pl *ReadPlan) drop() {
	for i := range pl.fetches {
		if f := &pl.fetches[i]; f.held {
			f.file.Release()
			f.held = false
		}
	}
}

// Finish ends a read that PlanRead planned. If err, the error of the fetches, is not nil, Finish returns it. Otherwise
// it verifies the records and copies their blocks. It must be called once.
func (pl *ReadPlan) Finish(err error) error {
	defer pl.release()
	if err = fault.Lost(err); err != nil && !errors.Is(err, ErrCorrupt) && !(fault.IsUnreadable(err) && pl.haveCopies()) {
		if fault.IsUnreadable(err) {
			pl.metRecords(err)
		}
		return fmt.Errorf("read %s: %w", pl.d.ref, err)
	}
	for i := range pl.records {
		r := &pl.records[i]
		bad := cmp.Or(err, r.bad)
		if bad == nil {
			if bad = pl.finish(r); bad != nil {
				bad = fmt.Errorf("chunk %s offset %d: %w", r.c.Name(), r.e.Offset(), bad)
			}
		}
		if bad != nil && !pl.rescue(r, err != nil) {
			pl.d.s.damage.note(badPlace{record: r.key()}, bad)
			return fmt.Errorf("read %s: %w", pl.d.ref, bad)
		}
	}
	return nil
}

func (pl *ReadPlan) finish(r *planned) error {
	units := &pl.d.s.units
	whole := pl.whole(r)
	if r.done || !whole && r.e.Blocks() > 1 && units.get(r.key(), pl.pieces, r.piece) {
		return nil // a concurrent read of the unit's other blocks has put the unit into the cache
	}
	payload, codec, err := format.VerifyRecord(pl.arena[r.at:r.at+r.e.Size()], r.c.Seq, r.e, r.first)
	if err != nil {
		return err
	}
	if whole {
		return format.Decompress(codec, pl.pieces[r.piece].dst, payload)
	}
	size := r.e.Blocks() * format.BlockSize
	if cap(pl.unit) < size {
		pl.unit = make([]byte, size)
	}
	unit := pl.unit[:size]
	if err := format.Decompress(codec, unit, payload); err != nil {
		return err
	}
	copyPieces(unit, pl.pieces, r.piece)
	if r.e.Blocks() > 1 {
		pl.unit = units.put(r.key(), unit)
	}
	return nil
}

// whole reports whether the read wants all of the record's unit, in one piece.
func (pl *ReadPlan) whole(r *planned) bool {
	pc := &pl.pieces[r.piece]
	return pc.next < 0 && len(pc.dst) == r.e.Blocks()*format.BlockSize
}

// copyPieces copies a list of pieces, which begins at first, out of their unit.
func copyPieces(unit []byte, pieces []piece, first int) {
	for i := first; i >= 0; i = pieces[i].next {
		copy(pieces[i].dst, unit[pieces[i].from:])
	}
}

func (pl *ReadPlan) release() {
	pl.drop()
	for i := range pl.records {
		pl.records[i].c.Release()
	}
	clear(pl.pieces)
	pl.records, pl.pieces, pl.fetches = pl.records[:0], pl.pieces[:0], pl.fetches[:0]
}

// read does all three steps in the calling goroutine.
func (pl *ReadPlan) read(d *Device, p []byte, off int64) error {
	if err := d.PlanRead(pl, p, off); err != nil {
		return err
	}
	return pl.Fetch()
}

// Fetch does the second and the third step in the calling goroutine: all fetches, and Finish.
func (pl *ReadPlan) Fetch() (err error) {
	if len(pl.fetches) > 1 {
		pl.try()
	}
	for i := range pl.fetches {
		if err = pl.fetches[i].Read(); err != nil {
			break
		}
	}
	return pl.Finish(err)
}

// try does the fetches whose data is in the page cache. For all others it makes the disk begin to read, all at the same
// time. It reports whether there were no others.
func (pl *ReadPlan) try() (done bool) {
	missing := pl.fetches[:0]
	for _, f := range pl.fetches {
		if !f.file.TryReadAt(f.Buf, f.Off) {
			missing = append(missing, f)
		}
	}
	pl.fetches = missing
	return len(missing) == 0
}

// TryReadAt reads like ReadAt, but only if all of the data is in memory, and only a range within the device. Otherwise
// it starts reading the data from the disk and returns false; ReadAt then waits for the data.
func (d *Device) TryReadAt(p []byte, off int64) (done bool, err error) {
	sc := d.s.scratch.Get().(*scratch)
	defer d.s.scratch.Put(sc)
	pl := &sc.plan
	if err := d.PlanRead(pl, p, off); err != nil {
		return false, err
	}
	if !pl.try() {
		pl.release()
		return false, nil
	}
	return true, pl.Finish(nil)
}

// ReadAt reads len(p) bytes at off, both of any alignment. At the end of the device it returns io.EOF, as io.ReaderAt
// requires.
func (d *Device) ReadAt(p []byte, off int64) (n int, err error) {
	size := d.Size()
	if off < 0 || off > size {
		return 0, fmt.Errorf("read %s: offset %d of %d: %w", d.ref, off, size, ErrInvalid)
	}
	var eof error
	if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	sc := d.s.scratch.Get().(*scratch)
	defer d.s.scratch.Put(sc)
	for n < len(p) {
		part := p[n:min(len(p), n+maxPlan)]
		if err := sc.plan.read(d, part, off+int64(n)); err != nil {
			return n, err
		}
		n += len(part)
	}
	return n, eof
}

// content identifies what a block held: an entry, and the chunk that was in the entry's slot. The chunk is needed
// because a slot is reused, and so an equal entry may mean other content.
type content struct {
	e format.Entry
	c *chunk
}

// readBlock reads a whole block of a volume's head. It returns what the map said of the block.
func (d *Device) readBlock(sc *scratch, p []byte, block uint64) (was content, err error) {
	pl := &sc.plan
	if err := d.plan(pl, p, int64(block)*format.BlockSize); err != nil {
		return was, err
	}
	if len(pl.records) > 0 {
		was = pl.records[0].was
	}
	return was, pl.Fetch()
}
