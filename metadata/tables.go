package metadata

import (
	"encoding/binary"
	"errors"

	"github.com/vdisk/vdisk/format"
)

// Tables is everything in the table but the leaves and the forwards. The rows are in the order of their ids or slots.
type Tables struct {
	Checkpoint format.Checkpoint
	Volumes    []format.Volume
	Snapshots  []format.Snapshot
	Branches   []format.Branch
	Chunks     []format.Chunk
	Forwarded  []format.Forwarded
	Cold       format.ColdMark // zero: no cold pass has come to its end
}

// Load reads the tables. If no checkpoint has been put in yet, Checkpoint is the zero value.
func (t *Tx) Load() (*Tables, error) {
	var tb Tables
	b, err := t.bucket(bucketStore)
	if err != nil {
		return nil, err
	}
	if tb.Checkpoint, err = t.checkpoint(); err != nil {
		return nil, err
	}
	if v := b.Get(keyCold); v != nil {
		if err := format.DecodeRow(v, &tb.Cold); err != nil {
			return nil, t.damaged(err, "cold row")
		}
	}
	err = errors.Join(
		rows(t, bucketVolumes, &tb.Volumes, func(v *format.Volume) uint32 { return v.ID }),
		rows(t, bucketSnapshots, &tb.Snapshots, func(v *format.Snapshot) uint32 { return v.ID }),
		rows(t, bucketBranches, &tb.Branches, func(v *format.Branch) uint32 { return v.ID }),
		t.chunks(&tb.Chunks),
		t.forwarded(&tb.Forwarded),
	)
	if err != nil {
		return nil, err
	}
	return &tb, nil
}

// rows appends the rows of a bucket to *out. The keys of the bucket are ids.
func rows[T any](t *Tx, bucket []byte, out *[]T, idOf func(*T) uint32) error {
	b, err := t.bucket(bucket)
	if err != nil {
		return err
	}
	return b.ForEach(func(k, v []byte) error {
		var row T
		if err := format.DecodeRow(v, &row); err != nil {
			return t.damaged(err, "%s row %x", bucket, k)
		}
		if len(k) != 4 || binary.BigEndian.Uint32(k) != idOf(&row) {
			return t.damaged(format.ErrCorrupt, "%s row %x holds id %d", bucket, k, idOf(&row))
		}
		*out = append(*out, row)
		return nil
	})
}

func (t *Tx) chunks(out *[]format.Chunk) error {
	b, err := t.bucket(bucketChunks)
	if err != nil {
		return err
	}
	return b.ForEach(func(k, v []byte) error {
		if len(k) != 4 {
			return t.damaged(format.ErrCorrupt, "chunk row %x", k)
		}
		c, err := format.DecodeChunk(binary.BigEndian.Uint32(k), v)
		if err != nil {
			return t.damaged(err, "chunk row %x", k)
		}
		*out = append(*out, c)
		return nil
	})
}

// Chunk reads the accounting of the chunk in a slot. ok is false if there is none.
func (t *Tx) Chunk(slot uint32) (c format.Chunk, ok bool, err error) {
	b, err := t.bucket(bucketChunks)
	if err != nil {
		return c, false, err
	}
	v := b.Get(id(slot))
	if v == nil {
		return c, false, nil
	}
	if c, err = format.DecodeChunk(slot, v); err != nil {
		return c, false, t.damaged(err, "chunk row %08x", slot)
	}
	return c, true, nil
}

func (t *Tx) checkpoint() (cp format.Checkpoint, err error) {
	b, err := t.bucket(bucketStore)
	if err != nil {
		return cp, err
	}
	if v := b.Get(keyCheckpoint); v != nil {
		if err := format.DecodeRow(v, &cp); err != nil {
			return cp, t.damaged(err, "checkpoint row")
		}
	}
	return cp, nil
}

// PutCheckpoint stores the checkpoint row.
func (t *Tx) PutCheckpoint(c *format.Checkpoint) error {
	t.seq = c.Seq
	return t.put(bucketStore, keyCheckpoint, c)
}

// storeID returns the id of the store that the table belongs to, or zero if the table does not say.
func (t *Tx) storeID() (id [16]byte, err error) {
	b, err := t.bucket(bucketStore)
	if err != nil {
		return id, err
	}
	v := b.Get(keyStore)
	if v == nil {
		return id, nil
	}
	if field, body := valueSums(v); len(v) != 4+len(id) || field != body {
		return id, t.damaged(format.ErrCorrupt, "the store's id")
	}
	copy(id[:], v[4:])
	return id, nil
}

func (t *Tx) putStoreID(id [16]byte) error {
	return t.set(bucketStore, keyStore, append(le.AppendUint32(nil, format.Checksum(id[:])), id[:]...))
}

// PutCold stores how far the cold pass has come.
func (t *Tx) PutCold(c *format.ColdMark) error { return t.put(bucketStore, keyCold, c) }

// PutVolume stores the row of a volume under its id.
func (t *Tx) PutVolume(v *format.Volume) error { return t.put(bucketVolumes, id(v.ID), v) }

// PutSnapshot stores the row of a snapshot under its id.
func (t *Tx) PutSnapshot(v *format.Snapshot) error { return t.put(bucketSnapshots, id(v.ID), v) }

// PutBranch stores the row of a branch under its id.
func (t *Tx) PutBranch(v *format.Branch) error { return t.put(bucketBranches, id(v.ID), v) }

// DropVolume removes the row of the volume with id n. It is no error if there is none.
func (t *Tx) DropVolume(n uint32) error { return t.drop(bucketVolumes, id(n)) }

// DropSnapshot removes the row of the snapshot with id n. It is no error if there is none.
func (t *Tx) DropSnapshot(n uint32) error { return t.drop(bucketSnapshots, id(n)) }

// DropBranch removes the row of the branch with id n. It is no error if there is none.
func (t *Tx) DropBranch(n uint32) error { return t.drop(bucketBranches, id(n)) }

// PutChunk stores the accounting of a chunk under its slot.
func (t *Tx) PutChunk(c *format.Chunk) error {
	v := c.Encode()
	return t.set(bucketChunks, id(c.Slot), v[:])
}

// DropChunk removes the row of a slot. It is no error if there is none.
func (t *Tx) DropChunk(slot uint32) error { return t.drop(bucketChunks, id(slot)) }

func (t *Tx) put(bucket, key []byte, v any) error {
	row, err := format.AppendRow(nil, v)
	if err != nil {
		return err
	}
	return t.set(bucket, key, row)
}
