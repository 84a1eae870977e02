package metadata

import (
	"bytes"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/vdisk/vdisk/format"
)

// sum is the sum of a hash of every key and value of the table. It does not depend on their order, so an Update can
// keep it up by its own changes. It is stored in the table, and compared when the table is opened. A row that damage
// hides, or an older row that damage brings back, shows only in the sum.
type sum uint64

// valueSums returns the checksum that a value begins with, and the one that it should begin with. They differ if the
// value is damaged. Both are 0 for an empty value.
func valueSums(value []byte) (field, body uint32) {
	if len(value) < 4 {
		return 0, 0
	}
	return le.Uint32(value), format.Checksum(value[4:])
}

// sumOf returns what one key and the checksum of its value add to the sum.
func sumOf(bucket, key []byte, value uint32) sum {
	x := uint64(format.Checksum(append(append(make([]byte, 0, 32), bucket...), key...)))<<32 | uint64(value)
	// Checksums are linear, so two changes could cancel out. The finalizer of splitmix64 (Steele, Lea and Flood, 2014)
	// is not linear.
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return sum(x ^ x>>31)
}

// set stores a value. Every change of the table goes through set or drop.
func (t *Tx) set(bucket, key, value []byte) error { return t.setChanged(bucket, key, value, nil) }

// setChanged is set, with what Tx.PutChanged may know.
func (t *Tx) setChanged(bucket, key, value, puts []byte) error {
	b, err := t.bucket(bucket)
	if err != nil {
		return err
	}
	old := b.Get(key)
	intact := t.forget(bucket, key, old)
	field, _ := valueSums(value)
	t.sum += sumOf(bucket, key, field)
	t.db.copy.record(change{bucket, key, old, value, puts, intact})
	return b.Put(key, value)
}

func (t *Tx) drop(bucket, key []byte) error {
	b, err := t.bucket(bucket)
	if err != nil {
		return err
	}
	old := b.Get(key)
	intact := t.forget(bucket, key, old)
	t.db.copy.record(change{bucket: bucket, key: key, old: old, intact: intact})
	return b.Delete(key)
}

// forget takes a value that is replaced or removed out of the sum, and reports whether it is intact. If it is damaged,
// nobody knows what it had added, so the sum is recomputed when the transaction ends.
func (t *Tx) forget(bucket, key, value []byte) (intact bool) {
	if value == nil {
		return true
	}
	field, body := valueSums(value)
	t.sum -= sumOf(bucket, key, field)
	t.recount = t.recount || field != body
	return field == body
}

// isSum reports whether a key is that of the sum, which is in no sum.
func isSum(bucket, key []byte) bool {
	return bytes.Equal(bucket, bucketStore) && bytes.Equal(key, keySum)
}

// recountSum adds up the whole table.
func (t *Tx) recountSum() error {
	t.sum = 0
	return t.tx.ForEach(func(bucket []byte, b *bbolt.Bucket) error {
		return b.ForEach(func(key, value []byte) error {
			if !isSum(bucket, key) {
				field, _ := valueSums(value)
				t.sum += sumOf(bucket, key, field)
			}
			return nil
		})
	})
}

func (t *Tx) loadSum() error {
	b, err := t.bucket(bucketStore)
	if err != nil {
		return err
	}
	t.sum, err = decodeSum(b.Get(keySum))
	return err
}

// decodeSum decodes the stored sum. A table in which nothing was ever put has none.
func decodeSum(v []byte) (sum, error) {
	switch len(v) {
	case 0:
		return 0, nil
	case 8:
		return sum(le.Uint64(v)), nil
	default:
		return 0, fmt.Errorf("sum of %d bytes: %w", len(v), format.ErrCorrupt)
	}
}

func (t *Tx) storeSum() error {
	if t.recount {
		if err := t.recountSum(); err != nil {
			return err
		}
	}
	b, err := t.bucket(bucketStore)
	if err != nil {
		return err
	}
	return b.Put(keySum, le.AppendUint64(nil, uint64(t.sum)))
}
