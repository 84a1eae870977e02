package audit

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// branchRows are the rows of branches, by id.
type branchRows map[uint32]format.Branch

func branchRowsOf(tb *metadata.Tables) branchRows {
	rows := branchRows{}
	for _, b := range tb.Branches {
		rows[b.ID] = b
	}
	return rows
}

// leaf reads a leaf as the branch, or else its origins, had it at an epoch. If none had it, or branch is 0, the leaf is
// empty, and found is false.
func (rows branchRows) leaf(tx *metadata.Tx, branch, asOf, index uint32, lf *format.Leaf) (found bool, err error) {
	for branch != 0 {
		epoch, err := tx.Leaf(metadata.Version{Branch: branch, Leaf: index, Epoch: asOf}, lf)
		if err != nil || epoch != 0 {
			return err == nil, err
		}
		b := rows[branch]
		branch, asOf = b.OriginBranch, b.OriginEpoch
	}
	*lf = format.Leaf{}
	return false, nil
}
