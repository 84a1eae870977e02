package cow

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/ratelimit"
	"github.com/vdisk/vdisk/internal/size"
)

// Quotas: docs/reclaim.md, Quotas.

// Properties that are quotas. Their names begin with ratelimit.Prefix, as those of all limits do.
const (
	mappedQuota    = ratelimit.Prefix + "mapped"
	exclusiveQuota = ratelimit.Prefix + "exclusive"

	leastQuota, mostQuota = format.BlockSize, 1 << 50
)

// holding is how much the head of a volume holds: bytes that it maps, and bytes that those of its blocks take that were
// put after its last snapshot.
type holding struct{ mapped, exclusive int64 }

func (h *holding) add(o holding, sign int64) {
	h.mapped += sign * o.mapped
	h.exclusive += sign * o.exclusive
}

// quota is the most that the head of a volume may hold. 0 is no limit.
type quota holding

// quotaOf returns the quota that a volume's properties ask for. A value that checkLimit refuses limits nothing.
func quotaOf(properties map[string]string) (q quota) {
	q.mapped, _ = parseQuota(properties[mappedQuota])
	q.exclusive, _ = parseQuota(properties[exclusiveQuota])
	return q
}

func parseQuota(value string) (int64, error) {
	n, err := size.Parse(value)
	switch {
	case err != nil:
		return 0, err
	case n < leastQuota || n > mostQuota:
		return 0, fmt.Errorf("%q is less than 4K or more than 1024T", value)
	}
	return n, nil
}

// checkLimit returns why a property of a volume cannot have a value, which is not empty. Properties that are no limits
// may have any.
func checkLimit(key, value string) error {
	if key == mappedQuota || key == exclusiveQuota {
		_, err := parseQuota(value)
		return err
	}
	known, err := ratelimit.CheckProperty(key, value)
	if known || !strings.HasPrefix(key, ratelimit.Prefix) {
		return err
	}
	names := append(ratelimit.Properties(), mappedQuota, exclusiveQuota)
	slices.Sort(names)
	return fmt.Errorf("there is no such limit; there are %s", strings.Join(names, ", "))
}

// admit returns an error if a volume that holds h may not hold more. grows says that blocks become the head's own: what
// only writes over such blocks may take more than what was there.
func (q quota) admit(h, more holding, grows bool) error {
	name, what, has, most := "", "", int64(0), int64(0)
	switch {
	case q.mapped != 0 && more.mapped > 0 && h.mapped+more.mapped > q.mapped:
		name, what, has, most = mappedQuota, "are mapped", h.mapped, q.mapped
	case q.exclusive != 0 && grows && more.exclusive > 0 && h.exclusive+more.exclusive > q.exclusive:
		name, what, has, most = exclusiveQuota, "are exclusive", h.exclusive, q.exclusive
	default:
		return nil
	}
	return quotaError{fmt.Errorf("%w: %d KiB of the volume %s, and %s is %d KiB; discard some of it, or set another limit",
		fault.NoSpace(syscall.ENOSPC), has>>10, what, name, most>>10)}
}

// quotaError is an error that matches ErrQuota.
type quotaError struct{ error }

func (e quotaError) Unwrap() error      { return e.error }
func (quotaError) Is(target error) bool { return target == ErrQuota }

// overQuota returns an error if a record of size bytes with n blocks would take the volume over its quota. The caller
// holds mu and the leaf's lock.
func (d *Device) overQuota(size int, lf *leafcache.Leaf, first, n int) error {
	if d.v.quota == (quota{}) || d.noQuota || !d.b.count.isKnown() {
		return nil
	}
	g := growth{epoch: d.b.Epoch}
	g.add(lf, first, n)
	g.more.exclusive += int64(size)
	return d.v.quota.admit(d.b.count.holding, g.more, g.grows)
}

// growth adds up by how much the head of a branch grows when blocks of it are written. What is written does not count.
type growth struct {
	epoch uint32 // the branch's present one
	more  holding
	grows bool // blocks become the head's own
}

func (g *growth) add(lf *leafcache.Leaf, first, n int) {
	for i := first; i < first+n; i++ {
		e := lf.Entry(i)
		if e.IsHole() {
			g.more.mapped += format.BlockSize
		}
		if lf.Epoch() == g.epoch && lf.IsChanged(i) && !e.IsHole() {
			g.more.exclusive -= int64(e.Share())
		} else {
			g.grows = true
		}
	}
}

// mostOfBlock bounds what a block takes that is written.
const mostOfBlock = (format.RecordHeaderSize + format.BlockSize + format.RecordAlign - 1) / format.RecordAlign * format.RecordAlign

// fits returns an error if a write of n bytes at off would take the volume over its quota, before any of it is written.
// It takes for granted that nothing is compressed. p is what is written, or nil if all of it takes space, zeros too. Each
// record is looked at again when it is installed, since others may write meanwhile.
func (d *Device) fits(p []byte, off, n int64) error {
	if n == 0 || d.noQuota || !d.v.hasQuota.Load() {
		return nil
	}
	d.s.mu.Lock()
	q, g, known := d.v.quota, growth{epoch: d.b.Epoch}, d.b.count.isKnown()
	var has holding
	if known {
		has = d.b.count.holding
	}
	d.s.mu.Unlock()
	first, end := uint64(off/format.BlockSize), blocksOf(off+n)
	all := int64(end - first)
	if !known || q.admit(has, holding{all * format.BlockSize, all * mostOfBlock}, true) == nil {
		return nil
	}
	for first < end {
		from := first
		part := min(end, first-first%format.LeafBlocks+format.LeafBlocks)
		err := d.s.cache.View(d.b.leaf(uint32(first/format.LeafBlocks), head), func(lf *leafcache.Leaf) {
			for ; first < part; first++ {
				i := int(first % format.LeafBlocks)
				if p != nil && staysHole(p, int64(first)*format.BlockSize-off, lf.Entry(i)) {
					continue
				}
				g.add(lf, i, 1)
				g.more.exclusive += mostOfBlock
			}
		})
		if err != nil {
			return leafDamage(uint32(from/format.LeafBlocks), err)
		}
	}
	return q.admit(has, g.more, g.grows)
}

// fitsFlat returns an error if the blocks that a volume shares with its origin would take it over its quota, before any of
// them is copied: otherwise the copies would take all that the quota leaves to the volume's clients.
func (s *Store) fitsFlat(ctx context.Context, d *Device) error {
	if !d.v.hasQuota.Load() {
		return nil
	}
	var more holding
	err := s.leaves(d.b, 0, math.MaxUint32, func(index uint32) error {
		if err := s.interrupted(ctx); err != nil {
			return err
		}
		return s.cache.View(d.b.leaf(index, head), func(lf *leafcache.Leaf) {
			for i := range format.LeafBlocks {
				e := lf.Entry(i)
				if e.IsHole() || lf.Epoch() != 0 && lf.IsChanged(i) {
					continue
				}
				more.exclusive += int64(e.Share())
				if e.Blocks() > 1 {
					more.exclusive++ // shares are rounded down
				}
			}
		})
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !d.b.count.isKnown() {
		return nil
	}
	return d.v.quota.admit(d.b.count.holding, more, true)
}

// staysHole reports whether a block, which begins at at in p and now is e, is or becomes a hole when p is written: p has
// only zeros for it, and covers it whole, unless it is a hole already.
func staysHole(p []byte, at int64, e format.Entry) bool {
	from, to := max(at, 0), min(at+format.BlockSize, int64(len(p)))
	return (e.IsHole() || to-from == format.BlockSize) && format.IsZero(p[from:to])
}
