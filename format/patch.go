package format

import (
	"encoding/binary"
	"math/bits"
)

// A patch makes a new value of an old one. It is a sequence of steps, each three uvarints and bytes:
//
//	copy n bytes of the old value; skip m bytes of it; insert k bytes, which follow
//
// It suits the values of the table, in which few places change at a time: an entry of a leaf takes 4 bytes or 5, and
// the distance to the slot of the next one may change with it.

const (
	patchMatch = 8  // so many equal bytes end a difference
	patchAhead = 16 // bytes of each value that are searched for the end of a difference,
	patchShift = 5  // and by how many less the one may go on after it than after the other
	patchStep  = 16 // bytes that are replaced where the end of a difference is not found
)

// AppendPatch appends a patch that makes value of old. It returns false, and dst with anything behind it, if the patch
// would take more than most bytes.
func AppendPatch(dst, old, value []byte, most int) ([]byte, bool) {
	end := len(dst) + most
	for i, j := 0, 0; j < len(value); {
		n := commonPrefix(old[i:], value[j:])
		i, j = i+n, j+n
		skip, insert := difference(old[i:], value[j:])
		dst = binary.AppendUvarint(dst, uint64(n))
		dst = binary.AppendUvarint(dst, uint64(skip))
		dst = binary.AppendUvarint(dst, uint64(insert))
		dst = append(dst, value[j:j+insert]...)
		i, j = i+skip, j+insert
		if len(dst) > end {
			return dst, false
		}
	}
	return dst, true
}

func commonPrefix(a, b []byte) (n int) {
	for len(a)-n >= 8 && len(b)-n >= 8 {
		if x := le.Uint64(a[n:]) ^ le.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)/8
		}
		n += 8
	}
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return n
}

// difference returns how many bytes of the old value to skip, and how many of the new one to insert, so that both go on
// equal.
func difference(old, value []byte) (skip, insert int) {
	if len(value) < patchMatch || len(old) < patchMatch {
		return len(old), len(value)
	}
	// Most differences replace bytes by as many, or by a few more or less.
	for shift := range patchShift {
		for n := range patchAhead {
			if equalAt(old, value, n, n+shift) {
				return n, n + shift
			}
			if equalAt(old, value, n+shift, n) {
				return n + shift, n
			}
		}
	}
	return min(patchStep, len(old)), min(patchStep, len(value))
}

func equalAt(old, value []byte, i, j int) bool {
	return i+patchMatch <= len(old) && j+patchMatch <= len(value) && le.Uint64(old[i:]) == le.Uint64(value[j:])
}

// ApplyPatch appends to dst what a patch makes of old. The error matches ErrCorrupt.
func ApplyPatch(dst, old, patch []byte) ([]byte, error) {
	for len(patch) > 0 {
		var n [3]uint64
		for i := range n {
			v, size := binary.Uvarint(patch)
			if size <= 0 {
				return dst, corrupt("patch", "it ends in a number")
			}
			n[i], patch = v, patch[size:]
		}
		left := uint64(len(old))
		if n[0] > left || n[1] > left-n[0] || n[2] > uint64(len(patch)) {
			return dst, corrupt("patch", "%d, %d and %d bytes of %d and %d", n[0], n[1], n[2], left, len(patch))
		}
		dst = append(append(dst, old[:n[0]]...), patch[:n[2]]...)
		old, patch = old[n[0]+n[1]:], patch[n[2]:]
	}
	return dst, nil
}
