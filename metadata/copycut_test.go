package metadata

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"

	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
)

// syncCopy syncs the copy at once, or when bbolt has written all. Of a sync beside bbolt's writes, a power cut leaves what it
// leaves of one or the other.
func (c *cutter) syncCopy(f storage.File) func() error {
	if c.late {
		return f.Sync
	}
	err := f.Sync()
	return func() error { return err }
}

// beforeSync takes what a power cut can leave of the copy at a sync of one of its files.
func (c *cutter) beforeSync(string) {
	for _, choice := range c.copies.Choices(uint64(len(c.left)), 6) {
		c.left = append(c.left, c.copies.Crash(choice))
	}
}

// beforeStep takes what a power cut leaves at least of the copy when a step of the table's commit begins.
func (c *cutter) beforeStep(crashtable.Step) {
	c.ahead = append(c.ahead, c.copies.Crash(crashfs.Choice{}))
}

// copyCuts makes tables from all that a power cut can leave of the copy, in a commit from the table old to the table
// now. Until the sync has returned, the copy is the old table or the new one. From then on it is the new one. Of most
// commits it tries only a few, since each is a table.
func (c *cutter) copyCuts(all bool, old, now uint64) {
	c.t.Helper()
	if !all {
		c.left = c.left[max(0, len(c.left)-3):]
	}
	for _, disk := range c.left {
		c.fromCopy(disk, old, now)
	}
	least := now
	if c.late { // a commit that runs once more, for want of room, has synced its batch before
		least = old
	}
	for i, disk := range c.ahead {
		if i == 0 || i == len(c.ahead)-1 || c.copied%perState == 0 {
			c.fromCopy(disk, least, now)
		}
	}
	c.left, c.ahead = nil, nil
	// Every prefix of the batch, and all of it but for one sector.
	name, whole := copyNow(c.t, c.copies)
	for at := len(c.copyWas); at < len(whole) && all; at = at/sector*sector + sector {
		c.fromCopy(copiesOf(c.t, name, whole[:at]), old)
		hole := bytes.Clone(whole)
		clear(hole[at:min(at/sector*sector+sector, len(hole))])
		c.fromCopy(copiesOf(c.t, name, hole), old)
	}
	c.copyWas = whole
}

func (c *cutter) fromCopy(copies *crashfs.FS, want ...uint64) {
	c.t.Helper()
	c.copied++
	got, err := built(c.in, copies)
	if err != nil {
		c.t.Fatalf("commit to record %d, copy %d: %v", c.db.seq, c.copied, err)
	}
	if got != want[0] && got != want[len(want)-1] {
		c.t.Fatalf("commit to record %d, copy %d: it makes neither table", c.db.seq, c.copied)
	}
}

// workWithCopy commits to the table that a power cut has left, with the copy that is ahead of it, behind it, or neither. A
// copy that is ahead is cut off. One that is behind is made anew.
func (c *cutter) workWithCopy(table uint64, committed bool) {
	c.t.Helper()
	copies := c.copies.Clone()
	if n := len(c.ahead); n > 0 {
		copies = c.ahead[n-1].Clone()
	}
	has, err := built(c.in, copies.Clone())
	must(c.t, err)
	behind, lost := committed && has != table, false
	db, err := Open(c.cut, Options{NoSync: true, Copy: copies, CopyLost: func(error) { lost = true }})
	must(c.t, err)
	must(c.t, db.Update(func(tx *Tx) error { return scripted(tx, 1000+7, rand.New(rand.NewPCG(2, uint64(c.states)))) }))
	want, err := content(db)
	must(c.t, errors.Join(err, db.Close(), os.Remove(c.cut+VerifiedSuffix)))
	if lost != behind {
		c.t.Fatalf("commit to record %d: the copy is behind: %v; it is made anew: %v", c.db.seq, behind, lost)
	}
	c.fromCopy(copies.Crash(crashfs.Choice{}), want)
}
