package metadata

import (
	"fmt"

	"github.com/vdisk/vdisk/format"
)

// sum is over every key and value of the table, whatever their order, so that an Update
// keeps it by what it changes. It is stored with them, and compared when the table is opened:
// a row that damage hides, or one of an older state that it brings back, shows only in it.
type sum uint64

// sumOf is the part of one key and value.
func sumOf(bucket, key, value []byte) sum {
	x := uint64(format.Checksum(append(append(make([]byte, 0, 32), bucket...), key...)))<<32 | uint64(format.Checksum(value))
	// Checksums are linear, and two changes could cancel out; the finalizer of
	// splitmix64 (Steele, Lea and Flood, 2014) is not.
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return sum(x ^ x>>31)
}

// set stores a value; every change goes through it or drop.
func (t *Tx) set(bucket, key, value []byte) error {
	b, err := t.bucket(bucket)
	if err != nil {
		return err
	}
	if old := b.Get(key); old != nil {
		t.sum -= sumOf(bucket, key, old)
	}
	t.sum += sumOf(bucket, key, value)
	return b.Put(key, value)
}

func (t *Tx) drop(bucket, key []byte) error {
	b, err := t.bucket(bucket)
	if err != nil {
		return err
	}
	if old := b.Get(key); old != nil {
		t.sum -= sumOf(bucket, key, old)
	}
	return b.Delete(key)
}

func (t *Tx) loadSum() error {
	b, err := t.bucket(bucketStore)
	if err != nil {
		return err
	}
	t.sum, err = decodeSum(b.Get(keySum))
	return err
}

// decodeSum reads the stored sum; a table that nothing was put in has none.
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
	b, err := t.bucket(bucketStore)
	if err != nil {
		return err
	}
	return b.Put(keySum, le.AppendUint64(nil, uint64(t.sum)))
}
