package audit

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// A check keeps nothing in use: no chunk, and no state of the table for long, since the table's file grows while a
// state is kept. So data is read in slices, each from the table as it is by then. Every record is read that existed at
// the beginning and still exists. Data that was given up meanwhile does not matter any more. Data that the cleaner or
// the cold pass moved was verified when it was moved.

const (
	// checkSlice is for how long one state of the table is read.
	checkSlice = time.Second
	// checkLook is after how many versions of leaves the clock is looked at.
	checkLook = 16
)

// errSliced ends a slice.
var errSliced = errors.New("the slice has ended")

// readData reads all records that are referred to.
func (c *Checker) readData() error {
	next := metadata.Version{Epoch: ^uint32(0)}
	var done int64
	var err error
	for more := true; more && err == nil; {
		next, more, err = c.slice(next, &done)
	}
	return err
}

// slice is readSlice in a state of the table of its own. Damage to the table ends the data.
func (c *Checker) slice(from metadata.Version, done *int64) (next metadata.Version, more bool, err error) {
	err = c.guard(func() (err error) {
		tx, err := c.engine.Begin()
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, tx.Close()) }()
		next, more, err = c.readSlice(tx, from, done)
		return err
	})
	return next, more, err
}

// readSlice reads the records that the versions from version from on refer to, until the slice has lasted long enough,
// or has read enough. It returns the version to go on with, and whether there is one.
func (c *Checker) readSlice(tx *metadata.Tx, from metadata.Version, done *int64) (next metadata.Version, more bool, err error) {
	start, n, before := time.Now(), 0, c.report.DataBytes
	rows := map[uint32]format.Chunk{}
	forwards := forwardReader{all: true}
	err = tx.VersionsFrom(from, func(v metadata.Version, l *format.Leaf, bad error) error {
		if n++; n > 1 && (n%checkLook == 0 && time.Since(start) > c.Slice || c.most > 0 && c.report.DataBytes-before >= c.most) {
			next = v
			return errSliced
		}
		if *done++; *done%64 == 0 {
			c.progress(c.total + *done)
		}
		if err := c.engine.Interrupted(); err != nil {
			return err
		}
		if bad != nil && c.alone {
			c.badLeaf(v, bad)
		}
		if bad != nil || c.only != nil && !c.only[v.Branch] {
			return nil // damage was reported before
		}
		return c.readVersion(tx, v, l, rows, &forwards)
	})
	if errors.Is(err, errSliced) {
		return next, true, nil
	}
	return next, false, err
}

// readVersion reads the records with blocks that a version owns.
func (c *Checker) readVersion(tx *metadata.Tx, v metadata.Version, l *format.Leaf, rows map[uint32]format.Chunk, forwards *forwardReader) error {
	var last format.Entry
	var failed []format.Entry // overwrites leave holes in a unit, and a record that cannot be read is one problem
	for i, name := range l.Entries {
		if name.IsHole() || !l.IsChanged(i) {
			continue
		}
		e, _, err := forwards.find(tx, name)
		if err != nil && c.alone {
			c.corrupt(where(v), "block %d: %v", i, err)
		}
		if err != nil {
			continue // this was reported before
		}
		row, ok := rows[e.Slot()]
		if !ok {
			if row, _, err = tx.Chunk(e.Slot()); err != nil {
				return err
			}
			rows[e.Slot()] = row
		}
		if row.Seq == 0 || !contains(row, e) || last != 0 && e.SameRecord(last) {
			continue
		}
		last = e
		if slices.ContainsFunc(failed, e.SameRecord) {
			continue
		}
		r := Record{row.Seq, e.WithIndex(0), uint64(v.Leaf)*format.LeafBlocks + uint64(i) - uint64(e.Index())}
		if err := c.readRecord(row, e, r.First); err != nil {
			failed = append(failed, e)
			c.failed(where(v), r, fmt.Errorf("block %d: %s offset %d: %w", i, c.chunk(e.Slot()), e.Offset(), err))
		}
	}
	return nil
}

// readRecord reads the record that e names from its chunk, and verifies it. It returns nil if the chunk has gone since
// that state of the table.
func (c *Checker) readRecord(row format.Chunk, e format.Entry, first uint64) error {
	ch := c.engine.Hold(row)
	if ch == nil {
		return nil
	}
	defer ch.Release()
	err := c.read(ch, row.Seq, e, first)
	if err != nil && ch.HasDied() {
		return nil
	}
	return err
}

func (c *Checker) read(ch Chunk, seq uint64, e format.Entry, first uint64) error {
	if c.buf == nil {
		c.buf, c.unit = make([]byte, format.MaxDataRecord), make([]byte, format.UnitSize)
	}
	stored := c.buf[:min(e.Size(), len(c.buf))]
	if n, err := ch.ReadFull(stored, int64(e.Offset())); err != nil {
		return err
	} else if n < len(stored) {
		return fault.Corruptf("the file ends at %d", int64(e.Offset())+int64(n))
	}
	payload, codec, err := format.VerifyRecord(stored, seq, e, first)
	if err != nil {
		return err
	}
	c.report.DataBytes += int64(e.Size())
	if err := format.Decompress(codec, c.unit[:e.Blocks()*format.BlockSize], payload); err != nil {
		return err
	}
	c.engine.Sound(Record{seq, e.WithIndex(0), first})
	return nil
}
