package cow

import (
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// Extents calls fn for the runs of data and holes in a range, in order and without gaps, until fn returns false.
func (d *Device) Extents(off, length int64, fn func(off, length int64, hole bool) bool) error {
	if err := d.checkRange(off, length); err != nil {
		return fmt.Errorf("extents of %s: %w", d.ref, err)
	}
	if length == 0 {
		return nil
	}
	run := extentRun[bool]{fn: fn, start: off, end: off + length, kind: true}
	first, last := uint64(off)/format.BlockSize, uint64(off+length-1)/format.BlockSize
	err := d.s.leaves(d.b, uint32(first/format.LeafBlocks), uint32(last/format.LeafBlocks)+1, func(index uint32) error {
		var l format.Leaf
		if err := d.s.cache.View(d.b.leaf(index, d.asOf), func(lf *leafcache.Leaf) { lf.CopyTo(&l) }); err != nil {
			return err
		}
		for i, e := range l.Entries {
			if !run.to((int64(index)*format.LeafBlocks+int64(i))*format.BlockSize, e.IsHole()) {
				return errStop
			}
		}
		if !run.to((int64(index)+1)*format.LeafBlocks*format.BlockSize, true) {
			return errStop
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("extents of %s: %w", d.ref, err)
	}
	if run.start < run.end {
		fn(run.start, run.end-run.start, run.kind)
	}
	return nil
}

var errStop = errors.New("stop")

// extentRun joins neighbouring blocks of one kind into runs.
type extentRun[K comparable] struct {
	fn         func(off, length int64, kind K) bool
	start, end int64 // the part of the range that is not reported yet
	kind       K     // of the run that begins at start
}

// to sets the kind of the blocks from off on. It returns false if fn wants no more.
func (r *extentRun[K]) to(off int64, kind K) bool {
	off = max(r.start, min(off, r.end))
	if kind == r.kind {
		return true
	}
	more := off == r.start || r.fn(r.start, off-r.start, r.kind)
	r.start, r.kind = off, kind
	return more
}
