package metadata

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"

	"github.com/vdisk/vdisk/format"
)

// ErrBadCopy is matched by the error of a check that finds the copy of the table damaged, unreadable or wrong.
var ErrBadCopy = errors.New("the copy of the table is no copy of it")

func badCopy(err error) error { return fmt.Errorf("%w: %w", ErrBadCopy, err) }

// copyCheckBytes is about how many bytes of rows a check of the copy keeps in memory. If there are more, it reads the copy
// and the table several times, each time for a part of the keys.
var copyCheckBytes int64 = 64 << 20 // tests make it smaller

// CheckCopy returns a function that verifies the copy as it now is: that all of it is whole, and that a table made from it
// has just the rows that tx sees, a transaction begun in the same state. If it is not, the error matches ErrBadCopy. Once,
// that is so if the copy that this process found was damaged, although there may be a new one by now. No copy is no error.
// After a commit that failed there is nothing to compare: the copy may have what the table does not have, and the next
// Open takes that back. Without a tx it verifies only that the copy is whole.
//
// No Update may run during the call of CheckCopy. check may run beside Updates and RenewCopy, and has to be called, once.
func (d *DB) CheckCopy() (check func(tx *Tx, interrupted func() error) error, err error) {
	d.updating.Lock()
	defer d.updating.Unlock()
	c := &d.copy
	if d.failed != nil {
		return func(*Tx, func() error) error { return nil }, nil
	}
	if bad := c.damaged; bad != nil {
		c.damaged = nil
		return func(*Tx, func() error) error { return badCopy(bad) }, nil
	}
	f := cmp.Or(c.inUse, c.found)
	if f == nil {
		return func(*Tx, func() error) error { return nil }, nil
	}
	r, err := openCopy(c.in, f.name, c.store)
	switch {
	case errors.Is(err, format.ErrCorrupt), errors.Is(err, format.ErrVersion), errors.Is(err, fs.ErrNotExist):
		return func(*Tx, func() error) error { return badCopy(err) }, nil
	case err != nil:
		return nil, err
	}
	r.size = f.end // commits go on behind it
	return func(tx *Tx, interrupted func() error) error {
		k := copyChecker{tx: tx, interrupted: interrupted, seed: maphash.MakeSeed()}
		return errors.Join(k.check(*r), r.f.Close())
	}, nil
}

// copyChecker compares a copy with the table.
type copyChecker struct {
	tx          *Tx
	interrupted func() error
	seed        maphash.Seed

	part, parts uint64
	rows        map[string][]byte // of the part, by bucket number and key
	seen        int
}

func (k *copyChecker) check(r copyReader) error {
	if k.tx == nil {
		return k.read(r)
	}
	if err := k.tx.loadSum(); err != nil {
		return err
	}
	_, used := k.tx.db.Room()
	k.parts = 1 + uint64(max(used, r.size)/copyCheckBytes)
	for ; k.part < k.parts; k.part++ {
		k.rows = map[string][]byte{}
		if err := k.read(r); err != nil {
			return err
		}
		if err := k.compare(); err != nil {
			return err
		}
	}
	return nil
}

// mine reports whether a key is of this part.
func (k *copyChecker) mine(bucket uint8, key []byte) bool {
	return k.parts == 1 || (maphash.Bytes(k.seed, key)+uint64(bucket))%k.parts == k.part
}

func rowKey(bucket uint8, key []byte) string { return string(append([]byte{bucket}, key...)) }

// pause returns an error if the check has to end.
func (k *copyChecker) pause() error {
	if k.seen++; k.seen%256 == 0 {
		return k.interrupted()
	}
	return nil
}

// read makes the rows of the part from the copy.
func (k *copyChecker) read(r copyReader) error {
	var stopped error
	for r.off < r.size {
		b, ok, err := r.next()
		if err == nil && ok && k.part == 0 {
			ok, err = r.verify(b)
		}
		if err == nil && !ok {
			err = fmt.Errorf("%s: the batch at %d is damaged", r.name, r.off)
		}
		if err == nil {
			err = r.items(b, func(it *format.CopyItem) error {
				if stopped = k.pause(); stopped != nil {
					return stopped
				}
				return k.take(&r, it)
			})
		}
		if stopped != nil {
			return stopped
		}
		if err != nil {
			return badCopy(err)
		}
		r.pass(b)
	}
	if n := len(r.last); r.base == 0 || k.tx != nil && r.last[n-1].Sum != uint64(k.tx.sum) {
		return badCopy(fmt.Errorf("%s: it is of another state of the table", r.name))
	}
	return nil
}

func (k *copyChecker) take(r *copyReader, it *format.CopyItem) error {
	if k.tx == nil || !k.mine(it.Bucket, it.Key) {
		return nil
	}
	key := rowKey(it.Bucket, it.Key)
	value, err := it.Apply(k.rows[key])
	if err != nil {
		return fmt.Errorf("%s: bucket %d, key %x: %w", r.name, it.Bucket, it.Key, err)
	}
	if it.Op == format.CopyRemove {
		delete(k.rows, key)
	} else {
		k.rows[key] = value
	}
	return nil
}

// compare compares the rows of the part with the table.
func (k *copyChecker) compare() error {
	for n, name := range copyBuckets {
		b, err := k.tx.bucket(name)
		if err != nil {
			return err
		}
		bucket := uint8(n)
		err = b.ForEach(func(key, value []byte) error {
			k.tx.read(1)
			if err := k.pause(); err != nil {
				return err
			}
			if !k.mine(bucket, key) || bucket == 0 && bytes.Equal(key, keySum) {
				return nil
			}
			at := rowKey(bucket, key)
			if has, ok := k.rows[at]; !ok || !bytes.Equal(has, value) {
				return badCopy(fmt.Errorf("it has another row %q %x than the table", name, key))
			}
			delete(k.rows, at)
			return nil
		})
		if err != nil {
			return err
		}
	}
	if len(k.rows) > 0 {
		return badCopy(fmt.Errorf("it has %d rows that the table does not have", len(k.rows)))
	}
	return nil
}
