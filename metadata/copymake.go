package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"

	"go.etcd.io/bbolt"

	"github.com/vdisk/vdisk/format"
)

// copySlice is about how many bytes of keys and values are read under the lock of the commits at a time.
var copySlice = 256 << 10 // tests make it smaller

// newCopy is a copy that is being made beside the one in use. It is a file of slices of the table, each as of its time,
// with the changes of every commit since between them. A slice has all keys behind those of the slice before it, so a
// change of a key that no slice has had yet is left out.
type newCopy struct {
	*copyFile
	bucket uint8  // the slices have had all buckets before this one,
	key    []byte // and its keys up to this one; nil: none
	sum    sum    // of the keys that the slices have had
	change sum    // of the batch
	dead   error  // why a commit has given it up
}

// has reports whether a slice has had the key.
func (m *newCopy) has(bucket uint8, key []byte) bool {
	return bucket < m.bucket || bucket == m.bucket && m.key != nil && bytes.Compare(key, m.key) <= 0
}

func (m *newCopy) begin() {
	m.copyFile.begin()
	m.change = 0
}

// count keeps up the sum of what the file has. A damaged value is not taken over.
func (m *newCopy) count(bucket, key, old, value []byte, intact bool) {
	if !intact {
		m.err = errors.Join(m.err, damaged("a value of %q was replaced", bucket))
		return
	}
	if old != nil {
		field, _ := valueSums(old)
		m.change -= sumOf(bucket, key, field)
	}
	if value != nil {
		field, _ := valueSums(value)
		m.change += sumOf(bucket, key, field)
	}
}

// errStopped is the error of a RenewCopy that was told to stop.
var errStopped = errors.New("it was stopped")

// CopyDue reports whether RenewCopy has something to do, and about how many bytes it will write.
func (d *DB) CopyDue() (bytes int64, due bool) {
	d.updating.Lock()
	defer d.updating.Unlock()
	c := &d.copy
	if c.in == nil || !d.adopted || d.failed != nil || c.inUse != nil && !c.inUse.due() {
		return 0, false
	}
	_, used := d.Room()
	return used, true
}

// RenewCopy makes a new base of the copy beside Updates, in slices. Before each it asks stop whether to give up. One
// RenewCopy may run at a time. After an error the copy is as before.
func (d *DB) RenewCopy(stop func() bool) error {
	m, err := d.beginCopy()
	if err != nil {
		return err
	}
	for done := false; !done; {
		if stop() {
			err = errStopped
		} else {
			done, err = d.copyNext(m)
		}
		if err != nil {
			return d.endCopy(m, err)
		}
	}
	// Most of the file becomes durable beside the commits.
	return d.endCopy(m, m.f.Sync())
}

func (d *DB) beginCopy() (*newCopy, error) {
	d.updating.Lock()
	defer d.updating.Unlock()
	return d.copy.create()
}

// create makes the file of a new copy. updating is held.
func (c *tableCopy) create() (*newCopy, error) {
	if err := c.removeStale(); err != nil {
		return nil, err
	}
	name, first := c.otherName(), uint64(1)
	if err := c.in.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if c.inUse != nil {
		first = c.inUse.next // it rises as fast here as there, so the newer file has the higher one
	}
	f, err := createCopy(c.in, name, c.store, first)
	if err != nil {
		return nil, fmt.Errorf("make a copy of the table: %w", err)
	}
	c.making = &newCopy{copyFile: f}
	return c.making, nil
}

// copyNext adds the next slice.
func (d *DB) copyNext(m *newCopy) (done bool, err error) {
	d.updating.Lock()
	defer d.updating.Unlock()
	if err := d.mayCopy(m); err != nil {
		return false, err
	}
	return d.slice(m)
}

// mayCopy returns why the file that is being made cannot go on.
func (d *DB) mayCopy(m *newCopy) error {
	if d.failed != nil {
		return d.failed
	}
	return m.dead
}

// slice adds the next slice, and returns true if it is the last one. updating is held.
func (d *DB) slice(m *newCopy) (done bool, err error) {
	m.begin()
	bucket, key := m.bucket, m.key
	err = d.View(func(tx *Tx) error {
		for n := 0; ; bucket, key = bucket+1, nil {
			if done = int(bucket) == len(copyBuckets); done {
				return nil
			}
			name := copyBuckets[bucket]
			b := tx.tx.Bucket(name)
			if b == nil {
				continue
			}
			c := b.Cursor()
			k, v := firstAfter(c, key)
			for ; k != nil; k, v = c.Next() {
				if n >= copySlice {
					return nil
				}
				n += len(k) + len(v)
				tx.read(1)
				key = append(key[:0:0], k...)
				if isSum(name, k) {
					continue
				}
				m.add(&format.CopyItem{Op: format.CopyPut, Bucket: bucket, Key: k, Value: v})
				m.count(name, k, nil, v, intact(v))
			}
		}
	})
	if err = errors.Join(err, m.err); err != nil {
		return false, err
	}
	if err := m.finish(format.CopyBase, 0); err != nil {
		return false, err
	}
	m.took()
	m.sum, m.bucket, m.key = m.sum+m.change, bucket, key
	return done, nil
}

func firstAfter(c *bbolt.Cursor, key []byte) (k, v []byte) {
	if key == nil {
		return c.First()
	}
	if k, v = c.Seek(key); bytes.Equal(k, key) {
		return c.Next()
	}
	return k, v
}

func intact(value []byte) bool {
	field, body := valueSums(value)
	return field == body
}

// endCopy puts the new copy in the place of the old one, if nothing has failed.
func (d *DB) endCopy(m *newCopy, err error) error {
	d.updating.Lock()
	defer d.updating.Unlock()
	if err == nil {
		err = d.mayCopy(m)
	}
	if err == nil {
		err = d.install(m)
	}
	if err != nil {
		err = fmt.Errorf("no new copy of the table was made: %w", err)
		d.copy.remove(m)
		if !errors.Is(err, errStopped) {
			d.copy.says(err)
		}
	}
	return err
}

// install completes the new copy and goes on with it. The end of the base is written when everything before it is
// durable, so that a crash leaves no file with an end but without its beginning. updating is held.
func (d *DB) install(m *newCopy) error {
	c := &d.copy
	sum, err := d.sumNow()
	if err != nil {
		return err
	}
	if sum != m.sum {
		return damaged("its rows sum up to %016x, not to %016x as they should", uint64(m.sum), uint64(sum))
	}
	if err := m.f.Sync(); err != nil {
		return err
	}
	m.begin()
	if err := m.finish(format.CopyBaseEnd, sum); err != nil {
		return err
	}
	if err := errors.Join(m.f.Sync(), c.in.SyncDir()); err != nil {
		return err
	}
	m.took()
	m.base, m.batches = m.end, 0
	old := c.inUse
	c.inUse, c.making, c.why = m.copyFile, nil, nil
	c.publish()
	if old != nil {
		_, c.stale = old.f.Close(), true // it would be known to be older by its numbers, too
	}
	return nil
}

// copyAtOnce makes the copy in one go. updating is held.
func (d *DB) copyAtOnce() error {
	m, err := d.copy.create()
	for done := false; err == nil && !done; {
		done, err = d.slice(m)
	}
	if err == nil {
		err = d.install(m)
	}
	if err != nil {
		err = fmt.Errorf("no copy of the table was made: %w", err)
		if m != nil {
			d.copy.remove(m)
		}
	}
	return err
}

// remove removes the file of a copy that was being made. If it was complete, it must not come back, since it would be
// an old copy with a high number. Nor may the next owner find it, since nothing tells that owner that a sync has failed.
func (c *tableCopy) remove(m *newCopy) {
	_ = m.f.Close()
	c.making, c.stale = nil, true
	_ = c.removeStale() // it is tried again before the next commit
}
