package audit

import (
	"errors"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// CountHead returns how many bytes the head of a branch maps in a state of the table, and what those of its blocks take
// that were put after the branch's last point. A block counts as its entry says, even if its record has been moved.
// Leaves that are damaged count as empty. interrupted is called now and then; if it returns an error, CountHead ends with
// that.
func CountHead(tx *metadata.Tx, branch uint32, interrupted func() error) (mapped, own int64, err error) {
	tb, err := tx.Load()
	if err != nil {
		return 0, 0, err
	}
	h := headCount{tx: tx, rows: branchRowsOf(tb), branch: branch}
	for _, sn := range tb.Snapshots { // also those that have lost their name and wait for the reaper
		if sn.Branch == branch {
			h.last = max(h.last, sn.Epoch)
		}
	}
	for index := uint32(0); err == nil; index++ {
		if err = interrupted(); err != nil {
			break
		}
		var more bool
		if index, more, err = h.next(index); err != nil || !more {
			break
		}
		if err = h.leaf(index); errors.Is(err, format.ErrCorrupt) {
			err = nil
		}
	}
	return h.mapped, h.own, err
}

// headCount counts what the head of a branch holds.
type headCount struct {
	tx     *metadata.Tx
	rows   branchRows
	branch uint32
	last   uint32 // epoch of the last point
	lf     format.Leaf

	mapped, own int64
}

// next returns the first leaf at or after index that the branch or one of its origins has.
func (h *headCount) next(index uint32) (next uint32, more bool, err error) {
	for b := h.branch; b != 0; b = h.rows[b].OriginBranch {
		n, ok, err := h.tx.NextLeaf(b, index)
		if err != nil {
			return 0, false, err
		}
		if ok && (!more || n < next) {
			next, more = n, true
		}
	}
	return next, more, nil
}

// leaf counts a leaf.
func (h *headCount) leaf(index uint32) error {
	b := h.rows[h.branch]
	epoch, err := h.tx.Leaf(metadata.Version{Branch: b.ID, Leaf: index, Epoch: b.Epoch}, &h.lf)
	if err == nil && epoch == 0 {
		_, err = h.rows.leaf(h.tx, b.OriginBranch, b.OriginEpoch, index, &h.lf)
	}
	if err != nil {
		return err
	}
	for i, e := range h.lf.Entries {
		if e.IsHole() {
			continue
		}
		h.mapped += format.BlockSize
		if epoch > h.last && h.lf.IsChanged(i) {
			h.own += int64(e.Share())
		}
	}
	return nil
}
