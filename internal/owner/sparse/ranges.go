package sparse

import (
	"cmp"
	"slices"
)

// Range is a part of a disk, in bytes.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

func (r Range) end() int64 { return r.Offset + r.Length }

// Ranges are ranges in order. No two of them touch.
type Ranges []Range

// Add adds a range.
func (rs *Ranges) Add(off, length int64) {
	from, _ := slices.BinarySearchFunc(*rs, off, func(r Range, off int64) int { return cmp.Compare(r.end(), off) })
	to := from
	r := Range{off, length}
	for to < len(*rs) && (*rs)[to].Offset <= off+length {
		old := (*rs)[to]
		r.Offset = min(r.Offset, old.Offset)
		r.Length = max(off+length, old.end()) - r.Offset
		to++
	}
	*rs = slices.Replace(*rs, from, to, r)
}

// After returns the first offset from off on that is in no range.
func (rs Ranges) After(off int64) int64 {
	i, _ := slices.BinarySearchFunc(rs, off+1, func(r Range, off int64) int { return cmp.Compare(r.end(), off) })
	if i < len(rs) && rs[i].Offset <= off {
		return rs[i].end()
	}
	return off
}

// Bytes returns how many bytes are in the ranges.
func (rs Ranges) Bytes() (n int64) {
	for _, r := range rs {
		n += r.Length
	}
	return n
}
