package metadata

import "github.com/vdisk/vdisk/format"

// History calls fn for every version of the leaves of a branch: by leaf, and then the newest first. It stops at the
// first error, of fn or of a version that does not decode. fn may use the leaf only until it returns.
func (t *Tx) History(branch uint32, fn func(v Version, l *format.Leaf) error) error {
	b, err := t.bucket(bucketLeaves)
	if err != nil {
		return err
	}
	var l format.Leaf
	start := Version{Branch: branch, Epoch: ^uint32(0)}.key()
	c := b.Cursor()
	for k, val := c.Seek(start[:]); k != nil; k, val = c.Next() {
		t.read(1)
		v, err := parseKey(k)
		if err != nil {
			return err
		}
		if v.Branch != branch {
			return nil
		}
		if err := format.DecodeLeaf(val, &l); err != nil {
			return t.leafDamaged(v, err)
		}
		if err := fn(v, &l); err != nil {
			return err
		}
	}
	return nil
}
