package cow

import (
	"errors"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// Extents calls fn for the runs of data and holes in a range, in order and without gaps, until fn returns false. A damaged
// leaf is an error, in which there is a LeafDamage; fn has been called for all that lies before it.
func (d *Device) Extents(off, length int64, fn func(off, length int64, hole bool) bool) error {
	var l format.Leaf
	err := extentRuns(d, off, length, true, fn, func(index uint32, holes *[format.LeafBlocks]bool) error {
		err := d.s.cache.View(d.b.leaf(index, d.asOf), func(lf *leafcache.Leaf) { lf.CopyTo(&l) })
		for i, e := range l.Entries {
			holes[i] = e.IsHole()
		}
		return err
	})
	return wrapIf(err, "extents of %s", d.ref)
}

// extentRuns calls fn for the runs of blocks of one kind in a range, in order and without gaps, until fn returns false.
// load loads a leaf and sets the kinds of its blocks. The blocks of a leaf that does not exist have the kind none.
func extentRuns[K comparable](d *Device, off, length int64, none K, fn func(off, length int64, kind K) bool,
	load func(index uint32, kinds *[format.LeafBlocks]K) error,
) error {
	if err := d.checkRange(off, length); err != nil || length == 0 {
		return err
	}
	var kinds [format.LeafBlocks]K
	run := extentRun[K]{fn: fn, start: off, end: off + length, kind: none}
	err := d.s.leaves(d.b, uint32(off/leafSize), uint32((off+length-1)/leafSize)+1, func(index uint32) error {
		if err := load(index, &kinds); err != nil {
			return err
		}
		for i, kind := range kinds {
			if !run.to(int64(index)*leafSize+int64(i)*format.BlockSize, kind) {
				return errStop
			}
		}
		if !run.to((int64(index)+1)*leafSize, none) {
			return errStop
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	if err == nil && run.start < run.end {
		fn(run.start, run.end-run.start, run.kind)
	}
	return err
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
