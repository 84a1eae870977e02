package cow

import (
	"context"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/metadata"
)

// Mended says what MendTable did.
type Mended struct {
	Problems []Problem // that are mended now
	Aside    string    // the old table's new name; empty: nothing was changed
}

// MendTable makes the counts and lists in the table of the store in dir right that a check finds wrong, and nothing else:
// live bytes of chunks, numbers of moved blocks, the list of changes. If the check finds anything else, nothing is changed,
// and the error matches ErrNotMended. The new table is checked in the same way before it takes the old one's place, and the
// old one stays beside it. The store must have no owner (ErrBusy).
func MendTable(ctx context.Context, dir string, o Options) (m *Mended, err error) {
	m = &Mended{}
	return m, repairTable(dir, true, o, "vdisk check", func(t *tableRepair) error {
		bad, err := t.problems(ctx, tableFile)
		if err != nil || len(bad) == 0 {
			return err
		}
		for _, p := range bad {
			if p.Mend == nil {
				return fmt.Errorf("%w: %s: %s", ErrNotMended, p.Where, p.What)
			}
		}
		if _, err := metadata.Mended(t.in, tableFile, newTableFile, func(tx *metadata.Tx) error { return mend(tx, bad) }); err != nil {
			return err
		}
		left, err := t.problems(ctx, newTableFile)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%w: afterwards, %s: %s", ErrNotMended, left[0].Where, left[0].What)
		}
		if err != nil {
			return errors.Join(err, t.in.Remove(newTableFile))
		}
		if err := t.swap(); err != nil {
			return err
		}
		for _, p := range bad {
			m.Problems = append(m.Problems, Problem{Kind: p.Kind, Where: p.Where, What: p.What})
		}
		m.Aside = t.done.Aside
		return nil
	})
}

// problems returns what a check finds wrong in the table of the given name. It changes nothing.
func (t *tableRepair) problems(ctx context.Context, name string) (bad []audit.Problem, err error) {
	err = t.with(name, func(s *Store) error {
		_, err := audit.NewChecker(checkedStore{s, ctx}, audit.CheckOptions{}, func(p audit.Problem) {
			if p.Kind != audit.KindCopy { // a new copy is made of the new table
				bad = append(bad, p)
			}
		}).Run()
		return err
	})
	return bad, err
}

// mend puts the rows that are right.
func mend(tx *metadata.Tx, bad []audit.Problem) error {
	var changes bool
	for _, p := range bad {
		var err error
		switch m := p.Mend; {
		case m.Chunk != nil:
			err = tx.PutChunk(m.Chunk)
		case m.Forwarded != nil && m.Forwarded.Blocks == 0:
			err = tx.DropForwarded(m.Forwarded.Slot)
		case m.Forwarded != nil:
			err = tx.PutForwarded(m.Forwarded)
		default:
			changes = changes || m.Changes
		}
		if err != nil {
			return err
		}
	}
	if changes {
		return tx.MendChanges()
	}
	return nil
}
