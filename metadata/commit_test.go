package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
)

const (
	sector   = 512
	metaEnd  = 2 * 4096 // where the pages begin that are not meta pages
	perState = 23       // of so many states, one is worked with
)

// cutter makes commits, and opens all that a power cut could leave of each.
type cutter struct {
	t      *testing.T
	path   string // of the table in use
	cut    string // of the table that a power cut has left
	db     *DB
	disk   *crashfs.FS
	table  *crashtable.Table
	was    []byte   // the file after the last commit
	steps  [][]byte // the file at each step of the present commit
	states int
	worked int

	in      *storage.Folder
	copies  *crashfs.FS   // has the copy of the table
	left    []*crashfs.FS // what a power cut can leave of the copy, before the table is written
	ahead   []*crashfs.FS // what it leaves at least of it, from then on
	late    bool          // the copy is synced after the table in this commit, and otherwise before it
	copied  int           // tables that were made from those
	copyWas []byte        // the file of the copy after the last commit
}

// TestEveryCutInACommit runs a script of commits. Of each it makes what a power cut can leave: every prefix of what it
// writes, down to the sector; everything without one page; everything without one sector; and the meta page with each
// subset of its sectors; each with the file grown and not grown. All of these open without damage as the table before
// the commit, or, with the meta page, as the one after it, and can be committed to. The same for the copy of the table,
// which is synced before bbolt writes, or when bbolt has written all: its last whole batch is one of the two states, and the
// new one when the commit has ended.
func TestEveryCutInACommit(t *testing.T) {
	dir := memoryDir(t)
	c := &cutter{t: t, path: filepath.Join(dir, "t"), cut: filepath.Join(dir, "cut"), in: folderOf(t, dir), copies: crashfs.New()}
	filled(t, c.path)
	must(t, os.Remove(c.path+VerifiedSuffix))
	c.attach()
	old, err := content(c.db)
	must(t, err)
	commits, meta, grown, pages := 36, 0, 0, 0
	if testing.Short() {
		commits = 9
	}
	for i := range commits {
		c.steps, c.late = nil, i%2 == 1
		// The function may run more than once, and must do the same each time.
		must(t, c.db.Update(func(tx *Tx) error { return scripted(tx, i, rand.New(rand.NewPCG(5, uint64(i)))) }))
		now, err := content(c.db)
		must(t, err)
		c.fromCopy(c.copies.Crash(crashfs.Choice{}), now)
		if old == now || len(c.steps) < 3 {
			t.Fatalf("commit %d changes nothing, in %d steps", i, len(c.steps))
		}
		n := len(c.steps) - 3 // the last three are the sync of the pages, the write of the meta page, and its sync
		c.prefixes(c.steps[:n+1], old)
		c.holes(c.steps[:n+1], old)
		c.copyCuts(i%4 == 0 || i%8 == 7, old, now)
		meta += c.metas(c.steps[n], c.steps[n+2], old, now)
		pages += n
		if len(c.steps[n]) > len(c.was) {
			grown++
		}
		c.was, old = c.steps[n+2], now
		c.sameAsFile()
	}
	must(t, c.db.Close())
	if meta != commits || grown == 0 {
		t.Errorf("%d of %d commits have a meta page that makes them, and %d made the file grow", meta, commits, grown)
	}
	t.Logf("%d states of %d commits, which wrote %d pages and made the file grow %d times; %d were worked with; %d tables were made from the copy", c.states, commits, pages, grown, c.worked, c.copied)
}

// attach opens the table, and copies it to a disk.
func (c *cutter) attach() {
	c.t.Helper()
	var err error
	c.was, err = os.ReadFile(c.path)
	must(c.t, err)
	c.disk, err = crashtable.NewDisk(c.was)
	must(c.t, err)
	c.db, err = Open(c.path, Options{NoSync: true, Copy: c.copies, SyncCopy: c.syncCopy, Allocate: func(f *os.File, from, to int64) error {
		return errors.Join(c.table.Grow(to-from), Allocate(f, from, to))
	}})
	must(c.t, err)
	must(c.t, c.db.Adopt())
	_, c.copyWas = copyNow(c.t, c.copies)
	c.copies.OnSync(c.beforeSync)
	c.table, err = crashtable.Attach(c.db, c.disk, func(s crashtable.Step) error {
		c.beforeStep(s)
		p, err := crashtable.Content(c.disk)
		c.steps = append(c.steps, p)
		return err
	})
	must(c.t, err)
}

// sameAsFile holds the copy to be the file: no write of bbolt's went past it.
func (c *cutter) sameAsFile() {
	c.t.Helper()
	p, err := os.ReadFile(c.path)
	must(c.t, err)
	if !bytes.Equal(p, c.was) {
		c.t.Fatal("the file is not what was written to it")
	}
}

// scripted makes the changes of commit i: rows, leaves that are new, replaced and removed, and now and then enough of
// them to make the file grow or pages free.
func scripted(tx *Tx, i int, rng *rand.Rand) error {
	err := tx.PutCheckpoint(&format.Checkpoint{Seq: uint64(11 + i), ChunkSeq: 3, Offset: 8192, NextID: 50, NextChunkSeq: 9})
	n := uint32(1 + i%4)
	if i%8 == 7 {
		n = 30
	}
	for range n {
		v := Version{1 + rng.Uint32N(12), rng.Uint32N(24), 1 + rng.Uint32N(3)}
		if i%8 != 7 && rng.IntN(3) == 0 {
			err = errors.Join(err, tx.DropLeaf(v))
			continue
		}
		var l format.Leaf
		if epoch, lerr := tx.Leaf(v, &l); lerr == nil && epoch == v.Epoch && rng.IntN(2) == 0 {
			blocks := [4]uint64{1 << rng.IntN(64), 0, 7 << rng.IntN(64)}
			for j := range l.Entries {
				if blocks[j/64]>>(j%64)&1 != 0 {
					l.Entries[j] = format.MakeEntry(rng.Uint32N(65536), 8192, 48, 1, 0)
					l.SetChanged(j)
				}
			}
			err = errors.Join(err, tx.PutChanged(v, format.AppendLeaf(nil, &l), format.AppendPuts([]byte{}, &l, blocks)))
			continue
		}
		l = format.Leaf{}
		for j := range 80 {
			l.Entries[j] = format.MakeEntry(rng.Uint32N(65536), 4096, 48, 1, 0)
		}
		err = errors.Join(err, tx.PutLeaf(v, format.AppendLeaf(nil, &l)))
	}
	if i%5 == 0 {
		err = errors.Join(err, tx.PutVolume(&format.Volume{ID: uint32(60 + i), Name: fmt.Sprint("n", i), Size: 1 << 20, Codec: format.S2, LogicalBlock: 512, Branch: 1, Created: time.Unix(1e9, 0).UTC()}))
	}
	if i%9 == 3 {
		for leaf := range uint32(24) {
			for epoch := range uint32(3) {
				err = errors.Join(err, tx.DropLeaf(Version{1 + uint32(i)%12, leaf, 1 + epoch}))
			}
		}
	}
	return err
}

// prefixes opens what was written in order, up to each sector.
func (c *cutter) prefixes(steps [][]byte, old uint64) {
	c.t.Helper()
	before := c.was
	for _, after := range steps {
		for _, at := range changed(before, after) {
			state := append(bytes.Clone(after[:at]), before[min(at, len(before)):]...)
			c.opens(state, len(after), old)
		}
		c.opens(bytes.Clone(after), len(after), old)
		before = after
	}
}

// holes opens everything that was written but for one page, and but for one sector.
func (c *cutter) holes(steps [][]byte, old uint64) {
	c.t.Helper()
	all := steps[len(steps)-1]
	before := steps[0] // it has all of the file's size
	lose := func(state []byte, at int) {
		copy(state[at:at+sector], before[at:])
	}
	for _, after := range steps[1:] {
		page := bytes.Clone(all)
		for _, at := range changed(before, after) {
			state := bytes.Clone(all)
			lose(state, at)
			lose(page, at)
			c.opens(state, len(all), old)
		}
		c.opens(page, len(all), old)
		before = after
	}
}

// metas opens the pages with each subset of the sectors of the meta page that the commit writes. It returns how many of
// the subsets are the new table, 1 at most.
func (c *cutter) metas(pages, all []byte, old, now uint64) (made int) {
	c.t.Helper()
	sectors := changed(pages, all)
	for subset := range 1 << len(sectors) {
		state := bytes.Clone(pages)
		for i, at := range sectors {
			if at >= metaEnd {
				c.t.Fatalf("the last write is at %d", at)
			}
			if subset>>i&1 != 0 {
				copy(state[at:at+sector], all[at:])
			}
		}
		if c.one(state, old, now) == now { // with the size, since that was synced with the pages
			made++
		}
	}
	return made
}

// changed returns where the sectors are that differ. What is behind the end of before counts as zeros.
func changed(before, after []byte) (at []int) {
	before = append(bytes.Clone(before), make([]byte, max(0, len(after)-len(before)))...)
	for i := 0; i < len(after); i += sector {
		if !bytes.Equal(before[i:i+sector], after[i:i+sector]) {
			at = append(at, i)
		}
	}
	return at
}

// opens opens a state with the file grown to a size, and also with the file as large as before or as what was written
// needs.
func (c *cutter) opens(state []byte, size int, want uint64) {
	c.t.Helper()
	state = append(state, make([]byte, max(0, size-len(state)))...)
	c.one(state, want)
	short := (len(bytes.TrimRight(state, "\x00")) + sector - 1) / sector * sector
	if short = max(short, len(c.was)); short < len(state) {
		c.one(state[:short], want)
	}
}

// one opens a state. It must be one of the tables that are wanted. one returns which.
func (c *cutter) one(state []byte, want ...uint64) uint64 {
	c.t.Helper()
	must(c.t, os.WriteFile(c.cut, state, 0o600))
	got, err := contentOf(c.cut)
	if err != nil {
		c.t.Fatalf("commit to record %d, state %d: %v", c.db.seq, c.states, err)
	}
	if got != want[0] && got != want[len(want)-1] {
		c.t.Fatalf("commit to record %d, state %d: it opens as neither table", c.db.seq, c.states)
	}
	if c.states++; c.states%perState == 0 {
		c.worked++
		c.work(got)
		must(c.t, os.WriteFile(c.cut, state, 0o600))
		c.workWithCopy(got, len(want) > 1 && got == want[1])
	}
	return got
}

// work commits to the table that a power cut has left, and opens it once more.
func (c *cutter) work(was uint64) {
	c.t.Helper()
	db, err := Open(c.cut, Options{NoSync: true})
	must(c.t, err)
	must(c.t, db.Update(func(tx *Tx) error { return scripted(tx, 1000+7, rand.New(rand.NewPCG(1, uint64(c.states)))) }))
	want, err := content(db)
	must(c.t, errors.Join(err, db.Close(), os.Remove(c.cut+VerifiedSuffix)))
	if got, err := contentOf(c.cut); err != nil || got != want || got == was {
		c.t.Fatalf("commit to record %d, state %d: after another commit: %v", c.db.seq, c.states, err)
	}
}

// content returns a hash of all keys and values of a table.
func content(db *DB) (sum uint64, err error) {
	var h maphash.Hash
	h.SetSeed(contentSeed)
	err = db.View(func(tx *Tx) error {
		return tx.tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(key, value []byte) error {
				fmt.Fprintf(&h, "%s %d %d ", name, len(key), len(value))
				h.Write(key)
				h.Write(value)
				return nil
			})
		})
	})
	return h.Sum64(), err
}

func contentOf(path string) (sum uint64, err error) {
	db, err := Open(path, Options{NoSync: true})
	if err != nil {
		return 0, err
	}
	sum, err = content(db)
	return sum, errors.Join(err, db.Close())
}

var contentSeed = maphash.MakeSeed()
