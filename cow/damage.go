package cow

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// LogDamage is Open's error if the log is known to have been longer than what can be read now, or may have been.
// Nothing was changed. Options.Repair is the way out. It matches ErrDamagedLog and ErrCorrupt.
type LogDamage struct {
	Chunk  string   // name of the chunk file; "": there is none
	Offset uint32   // offset of the damage in the file; 0: the header
	Seq    uint64   // number of the record there; 0: not known
	Lost   uint64   // number of records from there on that are known to have been durable
	Bytes  int64    // bytes of the records that lie behind the damage
	Files  int      // further chunk files that hold such records
	ByMark bool     // only the file durable says that they were
	NoHead []string // chunk files without a header, which may be a part of the log
	Err    error    // what is wrong there
}

func (d *LogDamage) Error() string {
	text := fmt.Sprintf("the log is damaged: chunk file %s at %d, record %d: %v", d.Chunk, d.Offset, d.Seq, d.Err)
	switch {
	case d.Chunk == "":
		text = fmt.Sprintf("the log is damaged at record %d: %v", d.Seq, d.Err)
	case d.Offset == 0:
		text = fmt.Sprintf("the log is damaged: the header of chunk file %s: %v", d.Chunk, d.Err)
	}
	if d.Lost > 0 {
		text += fmt.Sprintf("; %d records from there on had been made durable", d.Lost)
	}
	if d.ByMark {
		text += fmt.Sprintf(", by the file %s alone; if older copies of other files were put back, restore the whole folder from one backup", wal.MarkName)
	}
	if len(d.NoHead) > 0 {
		text += fmt.Sprintf("; chunk file %s has no header", strings.Join(firstOf(d.NoHead), ", "))
	}
	if d.Bytes > 0 {
		text += fmt.Sprintf("; %d bytes of records lie behind, in this and %d further files", d.Bytes, d.Files)
	}
	return text
}

// Unwrap makes a LogDamage match ErrDamagedLog and ErrCorrupt.
func (d *LogDamage) Unwrap() []error { return []error{ErrDamagedLog, ErrCorrupt, d.Err} }

// repair asks Options.Repair whether to go on without the damaged part. It returns nil to go on, and otherwise the
// damage or the error of Options.Repair. Nothing has been changed yet.
func (s *Store) repair(d *LogDamage) error {
	if s.opts.Repair == nil || s.readOnly != nil {
		return d
	}
	if err := s.opts.Repair(d); err != nil {
		return err
	}
	s.recovery.unsettled = true
	return nil
}

// logEnd is the end of the log that a replay has found.
type logEnd struct {
	c       *chunk // the last chunk of the log; nil: there is none
	r       chunkReplay
	behind  []chunkBehind // chunks in which the log does not go on
	headers uint64        // records before are durable, as the chunks' headers say
}

type chunkBehind struct {
	c *chunk
	r chunkReplay
}

// add notes what was found in the next chunk. If the log goes on in that chunk, the bytes behind the records of the
// chunks before it were not part of the log. The chunks between have no records: room was made in them that was not
// used in the end.
func (e *logEnd) add(c *chunk, r chunkReplay, goesOn bool) {
	if goesOn {
		*e = logEnd{c: c, r: r, headers: e.headers}
	} else {
		e.behind = append(e.behind, chunkBehind{c, r})
	}
}

// endLog decides whether the log ends where replay stopped. It refuses if that is known to be wrong or cannot be known:
// if records behind the end had been durable, or if the disk does not give back what is there. Then the error is a
// LogDamage, unless Options.Repair agrees to go on. endLog returns what to do with the files behind the end. others are
// files that are not in the log.
func (s *Store) endLog(e *logEnd, cp format.Checkpoint, others []leaving) (left []leaving, err error) {
	rec := &s.recovery
	rec.DroppedBytes = e.r.dropped
	for _, b := range e.behind {
		rec.DroppedBytes += b.r.dropped
		if b.r.dropped > 0 {
			rec.DroppedFiles++
		}
	}
	as := wal.AsDropped
	if d := s.damageAt(e, cp); d != nil {
		for _, f := range others {
			if f.seq == 0 {
				d.NoHead = append(d.NoHead, f.name)
			}
		}
		if cp.Seq == 1 && s.wal.NextSeq() == 1 { // it is not a new store, either: there was a log
			return nil, fault.Corruptf("the table is empty, and the log is not: %v", d)
		}
		if err := s.repair(d); err != nil {
			return nil, err
		}
		as, rec.Lost = wal.AsDamaged, int64(d.Lost)
		if e.c != nil && e.r.dropped > 0 {
			if err := s.copyAside(e.c); err != nil {
				return nil, err
			}
		}
	}
	s.wal.EndReplay(cp.Seq)
	for _, b := range e.behind {
		if b.c.inTable {
			continue
		}
		f := leaving{name: b.c.Name(), seq: b.c.Seq}
		if b.r.dropped > 0 || b.r.lost {
			f.as = as
		}
		left = append(left, f)
		s.slots.remove(b.c.Slot)
		b.c.Release()
	}
	return left, nil
}

// upToRecords returns the names of the chunk files behind the end up to the first that has records.
func (e *logEnd) upToRecords() (names []string) {
	for _, b := range e.behind {
		names = append(names, b.c.Name())
		if b.r.dropped > 0 {
			break
		}
	}
	return names
}

// damageAt returns what is wrong with the end of the log, or nil if nothing is known to be wrong.
func (s *Store) damageAt(e *logEnd, cp format.Checkpoint) *LogDamage {
	d := &LogDamage{Seq: s.wal.NextSeq(), Lost: max(s.wal.Durable(), s.wal.NextSeq()) - s.wal.NextSeq(), Bytes: s.recovery.DroppedBytes, Files: s.recovery.DroppedFiles}
	d.ByMark = d.Lost > 0 && e.headers <= s.wal.NextSeq()
	at := func(c *chunk, off uint32, why error) *LogDamage {
		if why == nil {
			why = fault.Corruptf("no chunk file goes on with it")
		}
		d.Chunk, d.Offset, d.Err = c.Name(), off, why
		return d
	}
	if e.c != nil && e.r.lost {
		return at(e.c, e.c.End, e.r.why)
	}
	for _, b := range e.behind {
		if b.r.lost {
			return at(b.c, b.c.End, b.r.why)
		}
	}
	switch {
	case cp.Offset > format.ChunkHeaderSize && (e.c == nil || e.c.Seq < cp.ChunkSeq):
		d.Err = fault.Corruptf("no chunk file has the sequence %d, with which the log goes on", cp.ChunkSeq)
	case d.Lost == 0:
		return nil
	case len(e.behind) > 0 && e.c != nil && e.r.dropped == 0:
		d = at(e.behind[0].c, format.ChunkHeaderSize, e.behind[0].r.why)
		d.Err = fmt.Errorf("%w; or at the end of chunk file %s, which has %d bytes, or in %s or a file between that is missing",
			d.Err, e.c.Name(), e.c.Size, strings.Join(e.upToRecords(), ", "))
		return d
	case len(e.behind) > 0 && e.c == nil:
		return at(e.behind[0].c, format.ChunkHeaderSize, e.behind[0].r.why)
	case e.c != nil:
		return at(e.c, e.c.End, e.r.why)
	default:
		d.Err = fault.Corruptf("no chunk file has it")
	}
	return d
}

// asideFile is the name of a copy that is made to be set aside.
const asideFile = "aside.tmp"

// copyAside sets a copy of a chunk's file aside. The log ends in this chunk, and what lies behind the end may be
// overwritten later.
func (s *Store) copyAside(c *chunk) (err error) {
	from, err := c.Handle()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep a copy of chunk file %s: %w", c.Name(), fault.NoSpace(err))
		}
	}()
	if err := s.fs.Remove(asideFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	to, err := s.fs.Create(asideFile, int64(c.Size))
	if err != nil {
		return err
	}
	p := make([]byte, 4096) // one page, so that the pages beside one that cannot be read are still copied
	for off := int64(0); off < int64(c.Size) && err == nil; off += int64(len(p)) {
		var n int
		if n, err = wal.ReadFull(from, p, off); fault.IgnoreUnreadable(err) == nil { // bytes that cannot be read become zeros
			_, err = to.WriteAt(p[:n], off)
		}
	}
	err = errors.Join(err, to.Sync(), to.Close())
	if err != nil {
		return errors.Join(err, s.fs.Remove(asideFile))
	}
	return s.setAside(asideFile, leaving{name: c.Name(), seq: c.Seq, as: wal.AsDamaged})
}
