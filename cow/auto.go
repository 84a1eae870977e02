package cow

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Snapshots that are taken by a schedule: docs/retention.md.

// autoLayout is the name of an automatic snapshot, as a layout of package time.
const autoLayout = "auto-20060102T150405Z"

var autoPattern = regexp.MustCompile(`^auto-\d{8}T\d{6}Z$`) // time.Parse alone would take fractions of a second

// AutoName returns the name of an automatic snapshot that is taken at t.
func AutoName(t time.Time) string { return t.UTC().Format(autoLayout) }

// IsAutoName reports whether a name is one that AutoName gives.
func IsAutoName(name string) bool {
	_, err := time.Parse(autoLayout, name)
	return err == nil && autoPattern.MatchString(name)
}

// AutoReport is what SnapshotAuto has done.
type AutoReport struct {
	Taken     []Ref `json:"taken"`
	Unchanged []Ref `json:"unchanged"` // the newest snapshots of volumes that are the same as those
}

// SnapshotAuto takes a snapshot, with the name of AutoName, of each volume that is not the same as its newest snapshot,
// all at one moment. It takes either all of them or none. It returns ErrExists if a volume has a snapshot of this
// second. It takes none once ctx has ended.
func (s *Store) SnapshotAuto(ctx context.Context, volumes ...string) (r AutoReport, err error) {
	known, err := s.sameInTable(volumes)
	if err != nil {
		return r, fmt.Errorf("snapshot: %w", err)
	}
	err = s.transact(func() (*format.Event, error) {
		r = AutoReport{Taken: []Ref{}, Unchanged: []Ref{}}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		now := s.opts.now()
		for _, name := range volumes {
			v, _, err := s.lookup(Ref{Volume: name})
			if err != nil {
				return nil, err
			}
			if p := s.newestSnapshot(v); p.sn != nil && known[p] && v.branch.written <= p.after {
				r.Unchanged = append(r.Unchanged, Ref{v.Name, p.sn.Name})
				continue
			}
			r.Taken = append(r.Taken, Ref{name, AutoName(now)})
		}
		if len(r.Taken) == 0 {
			return nil, nil
		}
		return s.snapshotEvent(now, r.Taken)
	})
	return r, wrapIf(err, "snapshot")
}

// sameness is what SnapshotAuto asks of the table: whether branch has versions of leaves with an epoch above after. If
// not, and it has none in memory, the volume whose head it is has the content of the snapshot sn.
type sameness struct {
	sn     *snapshot
	branch *branch
	after  uint32
}

// newestSnapshot returns what has to be known of the volume's newest snapshot: the one that was taken last, whatever
// its time. sn is nil if there is none, or if the volume cannot be the same. The caller holds mu.
func (s *Store) newestSnapshot(v *volume) sameness {
	var newest *snapshot
	for _, sn := range v.snapshots {
		if newest == nil || sn.ID > newest.ID {
			newest = sn
		}
	}
	if newest == nil {
		return sameness{}
	}
	after, ok := v.since(newest)
	if !ok {
		return sameness{}
	}
	return sameness{newest, v.branch, after}
}

// since returns the epoch above which the branch of the volume has no version of a leaf if the volume is as its snapshot
// sn, or one of another volume, is. ok reports whether it can be. The caller holds mu.
func (v *volume) since(sn *snapshot) (after uint32, ok bool) {
	b := v.branch
	switch {
	case v.Size != sn.Size:
		return 0, false
	case b == sn.branch:
		return sn.Epoch, true
	}
	return 0, b.origin == sn.branch && b.OriginEpoch == sn.Epoch // it was cloned from it, or rolled back to it
}

// sameInTable asks the table which volumes may be the same as their newest snapshots. Names that do not exist are left
// to the caller.
//
// The answer stays true for what it was asked of, but for changes that this process makes later: those are in
// branch.written. A later snapshot of the volume, or a rollback, is another question, to which there is no answer here.
func (s *Store) sameInTable(volumes []string) (same map[sameness]bool, err error) {
	same = map[sameness]bool{}
	s.mu.Lock()
	for _, name := range volumes {
		if v := s.catalog.byName[name]; v != nil {
			if p := s.newestSnapshot(v); p.sn != nil && v.branch.written <= p.after {
				same[p] = true
			}
		}
	}
	s.mu.Unlock()
	if len(same) == 0 {
		return same, nil
	}
	return same, s.meta.View(func(tx *metadata.Tx) error {
		for p := range same {
			err := tx.Changes(metadata.Version{Branch: p.branch.ID, Epoch: p.after + 1}, head, func(metadata.Version) bool {
				same[p] = false
				return false
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}
