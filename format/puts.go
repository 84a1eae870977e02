package format

import "math/bits"

// What has changed in a leaf since an earlier state of it is a sequence of runs, as in a leaf, each behind a byte with its
// first block. The changed bits of all these blocks are set.

// MaxPutsSize bounds the size in bytes of what AppendPuts appends.
const MaxPutsSize = LeafBlocks * (1 + 1 + 1 + 4 + maxSlotVarint)

// AppendPuts appends the entries of some blocks of a leaf, whose changed bits are set. blocks has a bit for each block of
// the leaf, the lowest of the first word for block 0.
func AppendPuts(dst []byte, l *Leaf, blocks [LeafBlocks / 64]uint64) []byte {
	var slot uint32
	for from := nextBit(&blocks, 0, 0); from < LeafBlocks; {
		to := nextBit(&blocks, from, ^uint64(0))
		for from < to {
			kind, n := nextRun(l.Entries[from:to])
			dst = appendRunHead(append(dst, byte(from)), kind, n)
			dst, slot = appendRun(dst, kind, l.Entries[from:from+n], slot)
			from += n
		}
		from = nextBit(&blocks, to, 0)
	}
	return dst
}

// nextBit returns the first block at or after i whose bit is set, or with invert all ones, is not set. It returns
// LeafBlocks if there is none.
func nextBit(set *[LeafBlocks / 64]uint64, i int, invert uint64) int {
	for i < LeafBlocks {
		if w := (set[i/64] ^ invert) >> (i % 64); w != 0 {
			return i + bits.TrailingZeros64(w)
		}
		i = (i/64 + 1) * 64
	}
	return LeafBlocks
}

// applyPuts changes a leaf by what AppendPuts has made. The error matches ErrCorrupt.
func applyPuts(l *Leaf, src []byte) error {
	var slot uint32
	for at := 0; len(src) > 0; {
		first := int(src[0])
		kind, n, tail := decodeRunHead(src[1:])
		if n == 0 || first < at || first+n > LeafBlocks {
			return corrupt("changes of a leaf", "invalid run at block %d", first)
		}
		at = first + n
		if src = decodeRun(tail, kind, &slot, l.Entries[first:at]); src == nil {
			return corrupt("changes of a leaf", "invalid run at block %d", first)
		}
		for i := first; i < at; i++ {
			l.SetChanged(i)
		}
	}
	return nil
}
