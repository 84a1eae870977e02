package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/format"
)

// Version names one version of one leaf: the leaf of a branch as of the end of an epoch. Leaf is the number of the
// leaf: block / format.LeafBlocks.
type Version struct {
	Branch, Leaf, Epoch uint32
}

// key returns the key of the version in the leaves bucket. It inverts the epoch, so that a seek to (branch, leaf,
// epoch) lands on the newest version at or before that epoch.
func (v Version) key() (k [12]byte) {
	binary.BigEndian.PutUint32(k[0:], v.Branch)
	binary.BigEndian.PutUint32(k[4:], v.Leaf)
	binary.BigEndian.PutUint32(k[8:], ^v.Epoch)
	return k
}

func (v Version) changeKey() (k [12]byte) {
	binary.BigEndian.PutUint32(k[0:], v.Branch)
	binary.BigEndian.PutUint32(k[4:], v.Epoch)
	binary.BigEndian.PutUint32(k[8:], v.Leaf)
	return k
}

func parseKey(k []byte) (Version, error) {
	if len(k) != 12 {
		return Version{}, fmt.Errorf("leaf key %x: %w", k, format.ErrCorrupt)
	}
	return Version{binary.BigEndian.Uint32(k), binary.BigEndian.Uint32(k[4:]), ^binary.BigEndian.Uint32(k[8:])}, nil
}

// Leaf decodes into l the newest version of the leaf v.Leaf at or before v.Epoch that v.Branch itself has. It returns
// the epoch of that version, or 0 if there is none. It does not look at the origins of the branch.
func (t *Tx) Leaf(v Version, l *format.Leaf) (epoch uint32, err error) {
	if t.leaves == nil { // callers look for one leaf in many branches
		b, err := t.bucket(bucketLeaves)
		if err != nil {
			return 0, err
		}
		t.leaves = b.Cursor()
	}
	t.read(1)
	want := v.key()
	k, val := t.leaves.Seek(want[:])
	if len(k) != 12 || !bytes.Equal(k[:8], want[:8]) {
		return 0, nil
	}
	if err := format.DecodeLeaf(val, l); err != nil {
		v.Epoch = ^binary.BigEndian.Uint32(k[8:])
		return 0, t.leafDamaged(v, err)
	}
	return ^binary.BigEndian.Uint32(k[8:]), nil
}

func (t *Tx) leafDamaged(v Version, err error) error {
	return &LeafDamage{v, t.damaged(err, "branch %d leaf %d epoch %d", v.Branch, v.Leaf, v.Epoch)}
}

// LeafDamage is the error about a version of a leaf that does not decode.
type LeafDamage struct {
	Version Version
	err     error
}

func (d *LeafDamage) Error() string { return d.err.Error() }

// Unwrap makes a LeafDamage match format.ErrCorrupt.
func (d *LeafDamage) Unwrap() error { return d.err }

// NextLeaf returns the first leaf at or after from that the branch itself has a version of. ok is false if there is
// none.
func (t *Tx) NextLeaf(branch, from uint32) (leaf uint32, ok bool, err error) {
	b, err := t.bucket(bucketLeaves)
	if err != nil {
		return 0, false, err
	}
	want := Version{branch, from, ^uint32(0)}.key()
	k, _ := b.Cursor().Seek(want[:])
	if len(k) != 12 || !bytes.Equal(k[:4], want[:4]) {
		return 0, false, nil
	}
	return binary.BigEndian.Uint32(k[4:]), true, nil
}

// PutLeaf stores a version, and notes that the leaf changed in that epoch. value is the encoding of the leaf
// (format.AppendLeaf).
func (t *Tx) PutLeaf(v Version, value []byte) error { return t.PutChanged(v, value, nil) }

// PutChanged is PutLeaf, and makes less work for the copy of the table: puts is what format.AppendPuts returns for all
// blocks that have changed in the version since the value that the table has. If the table has no such value, or puts is
// nil, it does not count.
func (t *Tx) PutChanged(v Version, value, puts []byte) error {
	k, c := v.key(), v.changeKey()
	t.read(1)
	if err := t.setChanged(bucketLeaves, k[:], value, puts); err != nil {
		return err
	}
	changes, err := t.bucket(bucketChanges)
	if err != nil {
		return err
	}
	if changes.Get(c[:]) != nil {
		return nil // most leaves of a checkpoint were in the one before it, too
	}
	return t.set(bucketChanges, c[:], []byte{})
}

// DropLeaf removes a version. It is no error if there is none.
func (t *Tx) DropLeaf(v Version) error {
	k, c := v.key(), v.changeKey()
	if err := t.drop(bucketLeaves, k[:]); err != nil {
		return err
	}
	return t.drop(bucketChanges, c[:])
}

// Changes calls fn for the versions of the branch from.Branch with an epoch in [from.Epoch, to], in the order of epoch
// and leaf, until fn returns false. It starts at from.Leaf in the first epoch.
func (t *Tx) Changes(from Version, to uint32, fn func(Version) bool) error {
	b, err := t.bucket(bucketChanges)
	if err != nil {
		return err
	}
	start := from.changeKey()
	c := b.Cursor()
	for k, _ := c.Seek(start[:]); k != nil; k, _ = c.Next() {
		if len(k) != 12 {
			return t.damaged(format.ErrCorrupt, "change key %x", k)
		}
		v := Version{Branch: binary.BigEndian.Uint32(k), Epoch: binary.BigEndian.Uint32(k[4:]), Leaf: binary.BigEndian.Uint32(k[8:])}
		if v.Branch != from.Branch || v.Epoch > to || !fn(v) {
			return nil
		}
	}
	return nil
}

// Versions calls fn for every version of every leaf: by branch and leaf, and then the newest first. It stops at the
// first error that fn returns, and returns it. fn may use the leaf only until it returns. For a version that does not
// decode, fn gets a nil leaf, and the error as bad.
func (t *Tx) Versions(fn func(v Version, l *format.Leaf, bad error) error) error {
	return t.VersionsFrom(Version{Epoch: ^uint32(0)}, fn)
}

// VersionsFrom is Versions, but begins with the first version that is not before from.
func (t *Tx) VersionsFrom(from Version, fn func(v Version, l *format.Leaf, bad error) error) error {
	b, err := t.bucket(bucketLeaves)
	if err != nil {
		return err
	}
	var l format.Leaf
	c := b.Cursor()
	start := from.key()
	for k, val := c.Seek(start[:]); k != nil; k, val = c.Next() {
		t.read(1)
		v, err := parseKey(k)
		switch {
		case err != nil:
			err = fn(v, nil, err)
		default:
			if bad := format.DecodeLeaf(val, &l); bad != nil {
				err = fn(v, nil, bad)
			} else {
				err = fn(v, &l, nil)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Changed reports whether the changes bucket names v. Check compares that bucket with the leaves.
func (t *Tx) Changed(v Version) (bool, error) {
	b, err := t.bucket(bucketChanges)
	if err != nil {
		return false, err
	}
	k := v.changeKey()
	return b.Get(k[:]) != nil, nil
}

// MendChanges makes the list of changes name the versions that there are, and no others.
func (t *Tx) MendChanges() error {
	leaves, err := t.bucket(bucketLeaves)
	if err != nil {
		return err
	}
	changes, err := t.bucket(bucketChanges)
	if err != nil {
		return err
	}
	listed := map[Version]bool{}
	var none [][]byte // of no version
	err = changes.ForEach(func(k, _ []byte) error {
		if len(k) == 12 {
			v := Version{Branch: binary.BigEndian.Uint32(k), Epoch: binary.BigEndian.Uint32(k[4:]), Leaf: binary.BigEndian.Uint32(k[8:])}
			if key := v.key(); leaves.Get(key[:]) != nil {
				listed[v] = true
				return nil
			}
		}
		none = append(none, bytes.Clone(k))
		return nil
	})
	var unlisted []Version
	err = errors.Join(err, leaves.ForEach(func(k, _ []byte) error {
		v, err := parseKey(k)
		if err == nil && !listed[v] {
			unlisted = append(unlisted, v)
		}
		return err
	}))
	for _, k := range none {
		err = errors.Join(err, t.drop(bucketChanges, k))
	}
	for _, v := range unlisted {
		k := v.changeKey()
		err = errors.Join(err, t.set(bucketChanges, k[:], []byte{}))
	}
	return err
}

// Counts returns the number of versions, and the number of entries in the changes bucket. It reads all pages of both.
func (t *Tx) Counts() (versions, changes int, err error) {
	l, err := t.bucket(bucketLeaves)
	if err != nil {
		return 0, 0, err
	}
	c, err := t.bucket(bucketChanges)
	if err != nil {
		return 0, 0, err
	}
	return l.Stats().KeyN, c.Stats().KeyN, nil
}
