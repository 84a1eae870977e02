package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// CopyNames are the names that files of the copy of the table can have. One is in use, and the next base goes to the
// other.
var CopyNames = [2]string{"meta.copy.1", "meta.copy.2"}

const (
	copyChanges    = 16 << 20 // changes of so many bytes beyond the size of the base call for a new base
	copyBatchLeast = 4 << 10  // what a batch counts for at least
	patchLeast     = 64       // smaller values are not patched
	copyAtOnce     = 2 << 20  // of a table up to this size, in bytes, the copy is made when the table is adopted
)

// copyBuckets are the buckets that a copy has. The number of a bucket in an item is its place here.
var copyBuckets = [][]byte{bucketStore, bucketVolumes, bucketSnapshots, bucketBranches, bucketLeaves, bucketChanges, bucketChunks, bucketForwarded, bucketForwards}

// tableCopy is the second copy of the table, from which the table can be made anew: docs/format.md, The copy of the
// table. An Update gives it every change. The batch is written before bbolt writes, and durable when the Update returns.
// DB.updating guards it.
type tableCopy struct {
	in    storage.FS // nil: no copy is kept
	store [16]byte
	lost  func(error)
	sync  func(storage.File) (wait func() error) // begins a sync
	wait  func() error                           // waits for the sync of the last batch; nil: none is under way

	inUse  *copyFile // nil: there is no copy
	making *newCopy  // nil: no new base is being made
	// stale: a file may be there, beside those above, that is not of this table any more. It goes before the next commit.
	stale bool
	why   error // why there is no copy, or no new base

	found   *copyFile // of a table that is only read: the copy, which is not open
	damaged error     // how the copy was damaged that was there when the table was opened, until a check has said so

	wrong func(error) // Options.WrongItem
	patch []byte
	state atomic.Pointer[CopyState]
}

// CopyState describes the copy of a table.
type CopyState struct {
	Bytes   int64  // 0: there is no copy
	Base    int64  // of them, in the base
	Batches int64  // of changes
	Number  uint64 // of the last batch
	Why     error  // why there is none, or no new one
}

// CopyState returns the state of the copy as of the last commit.
func (d *DB) CopyState() CopyState {
	if s := d.copy.state.Load(); s != nil {
		return *s
	}
	return CopyState{}
}

func (c *tableCopy) publish() {
	s := CopyState{Why: c.why}
	if f := c.inUse; f != nil {
		s = CopyState{f.end, f.base, f.batches, f.next - 1, c.why}
	}
	c.state.Store(&s)
}

// startSync begins the sync of a file, and returns a function that waits for it.
func startSync(f storage.File) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- f.Sync() }()
	return func() error { return <-done }
}

// begin begins the batch of an Update. If there are files of a copy that was given up, they go first.
func (c *tableCopy) begin() error {
	c.settle() // an Update that was undone, as for want of room
	if err := c.removeStale(); err != nil {
		return err
	}
	if c.inUse != nil {
		c.inUse.begin()
	}
	if c.making != nil {
		c.making.begin()
	}
	return nil
}

func bucketNumber(bucket []byte) uint8 {
	return uint8(slices.IndexFunc(copyBuckets, func(b []byte) bool { return bytes.Equal(b, bucket) }))
}

// write completes the batch, and begins to make it durable. The table has the sum after it. If it cannot be written, the
// copy is given up, and the commit can go on without one; write then returns an error only if the old copy cannot be
// removed.
func (c *tableCopy) write(sum sum) error {
	if m := c.making; m != nil {
		if m.dead = m.finish(format.CopyBase, 0); m.dead != nil {
			c.making = nil
		}
	}
	if c.inUse == nil {
		return nil
	}
	if err := c.inUse.finish(format.CopyChanges, sum); err != nil {
		c.lose(err)
	} else {
		c.wait = c.sync(c.inUse.f) // beside bbolt's own syncs, which take longer
	}
	return c.removeStale()
}

// settle waits until the batch that was written last is durable. If it does not become that, the copy is given up.
func (c *tableCopy) settle() {
	if c.wait == nil {
		return
	}
	err := c.wait()
	if c.wait = nil; err != nil {
		c.lose(err)
	}
}

// finish ends the batch. If the Update was undone, the batch is cut off. If bbolt failed, nobody knows whether the table
// has it, and the next owner finds out; nothing is committed before. If the Update is done, the batch is durable when
// finish returns, or the copy is durably gone. Otherwise finish returns an error: the copy is older than the table, and
// nothing may be removed that it refers to.
func (c *tableCopy) finish(done, undone bool) error {
	c.settle()
	if !done && !undone {
		return nil
	}
	if f := c.inUse; f != nil && done {
		f.took()
	} else if f != nil {
		if err := f.cut(); err != nil {
			c.lose(err)
		}
	}
	if m := c.making; m != nil && done {
		m.took()
		m.sum += m.change
	} else if m != nil {
		if m.dead = m.cut(); m.dead != nil {
			c.making = nil
		}
	}
	if !done {
		return nil
	}
	c.publish()
	return c.tryRemoveStale()
}

// lose gives the copy up. Its files go before bbolt commits, or before an Update that is done returns, since no copy is
// better than an old one.
func (c *tableCopy) lose(err error) {
	_ = c.inUse.f.Close() // what it has does not count any more
	c.inUse, c.stale = nil, true
	c.says(fmt.Errorf("the copy of the table is given up: %w", err))
}

// says notes why there is no copy, or no new base.
func (c *tableCopy) says(why error) {
	c.why = why
	c.publish()
	c.lost(why)
}

// removeStale removes the files of a copy that was given up, durably, before bbolt commits. After an error nothing has
// changed in the table.
func (c *tableCopy) removeStale() error {
	err := c.tryRemoveStale()
	if errors.Is(err, storage.ErrNoSpace) {
		err = fmt.Errorf("%w: %w", ErrUnwritten, err)
	}
	return err
}

func (c *tableCopy) tryRemoveStale() error {
	if !c.stale {
		return nil
	}
	for _, name := range CopyNames {
		if c.making != nil && c.making.name == name || c.inUse != nil && c.inUse.name == name {
			continue
		}
		if err := c.in.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove an old copy of the table: %w", err)
		}
	}
	if err := c.in.SyncDir(); err != nil {
		return fmt.Errorf("remove an old copy of the table: %w", err)
	}
	c.stale = false
	return nil
}

// close closes the files.
func (c *tableCopy) close() error {
	c.settle()
	if c.making != nil {
		c.remove(c.making)
	}
	if c.inUse == nil {
		return nil
	}
	return c.inUse.f.Close()
}

// findCopy finds the copy of the table, and makes one if there is none and the table is small. updating is held. The
// table is known to be the right one. A copy that cannot be used is no reason not to use the table.
func (d *DB) findCopy() error {
	c := &d.copy
	if c.in == nil {
		return nil
	}
	if c.lost == nil {
		c.lost = func(error) {}
	}
	why, err := d.openCopies()
	if err != nil {
		return err
	}
	c.damaged = c.damageOf(why)
	if c.inUse != nil {
		c.stale = c.exists(c.otherName()) // a base that was never completed, or an older copy
		c.publish()
		// A batch that is ahead goes before this owner makes a chunk: its replay position can be in a chunk that its owner
		// was going to make, and behind the number that this owner's next chunk gets.
		ahead := c.inUse.torn
		err := c.inUse.cut()
		if err == nil { // a process that was killed may not have come to it
			err = durable(c.in, c.inUse.f, c.inUse.last, c.inUse.end)
		}
		if err != nil {
			c.lose(err)
			// The next sync would not fail any more. If this fails, it is tried again before the next commit.
			if err := c.removeStale(); err != nil && ahead {
				return err
			}
		}
		return nil
	}
	c.stale = true // if a name cannot be looked up, its file may be there
	_ = c.removeStale()
	if why != nil {
		c.says(fmt.Errorf("the copy of the table is of no use: %w", why))
	}
	if _, used := d.Room(); used > copyAtOnce {
		return nil
	}
	if err := d.copyAtOnce(); err != nil {
		c.says(err)
	}
	return nil
}

// openCopies looks for a file of the copy that is of the table's state, and makes it the one in use. why says why others
// are not.
func (d *DB) openCopies() (why, err error) {
	c := &d.copy
	sum, err := d.sumNow()
	if err != nil {
		return nil, err
	}
	for _, name := range CopyNames {
		f, err := useCopy(c.in, name, c.store, sum)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if f != nil && (c.inUse == nil || f.next > c.inUse.next) {
			c.inUse, f = f, c.inUse
		}
		if f != nil {
			err = f.f.Close()
		}
		why = errors.Join(why, err)
	}
	return why, nil
}

// lookForCopy finds out whether there is a copy, for a table that is only read.
func (d *DB) lookForCopy() (err error) {
	c := &d.copy
	if c.in == nil {
		return nil
	}
	if c.why, err = d.openCopies(); err != nil {
		return err
	}
	c.damaged = c.damageOf(c.why)
	c.publish()
	err = c.close()
	c.found, c.inUse = c.inUse, nil
	return err
}

// damageOf returns why there is no copy that can be used, if that is damage. A crash may leave a base that was not completed,
// and a power cut a copy that is one commit behind the table.
func (c *tableCopy) damageOf(why error) error {
	if c.inUse != nil || errors.Is(why, errUncompleted) || errors.Is(why, errOtherState) {
		return nil
	}
	return why
}

// errOtherState is the error of a copy that is not as of the table's state, nor one commit ahead.
var errOtherState = errors.New("it is of another state of the table")

func (c *tableCopy) exists(name string) bool {
	f, err := c.in.Open(name)
	if err == nil {
		_ = f.Close()
	}
	return !errors.Is(err, fs.ErrNotExist)
}

// sumNow returns the sum of the table.
func (d *DB) sumNow() (sum sum, err error) {
	err = d.View(func(tx *Tx) error {
		err := tx.loadSum()
		sum = tx.sum
		return err
	})
	return sum, err
}

// otherName returns the name for the next base.
func (c *tableCopy) otherName() string {
	if c.inUse != nil && c.inUse.name == CopyNames[0] {
		return CopyNames[1]
	}
	return CopyNames[0]
}

// useCopy opens a file of the copy to go on with, if its state is that of a table with the given sum. The last batch may
// be of a commit that a crash took. Then it is cut off.
func useCopy(in storage.FS, name string, store [16]byte, sum sum) (*copyFile, error) {
	r, err := openCopy(in, name, store)
	if err != nil {
		return nil, err
	}
	if err := r.whole(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), r.f.Close())
	}
	over := r.over
	for i := len(r.last) - 1; i >= max(0, len(r.last)-2); i-- {
		if b := r.last[i]; b.Sum == uint64(sum) && b.end() >= r.base {
			return &copyFile{name: name, f: r.f, last: b.off, end: b.end(), base: r.base, batches: over, next: b.Number + 1, torn: r.size > b.end()}, nil
		}
		over--
	}
	return nil, errors.Join(fmt.Errorf("%s: %w", name, errOtherState), r.f.Close())
}
