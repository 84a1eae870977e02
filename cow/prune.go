package cow

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// PruneReport is what Prune has removed, and what it has not.
type PruneReport struct {
	Removed []Ref          `json:"removed"`
	Kept    []KeptSnapshot `json:"kept"`
}

// KeptSnapshot is a snapshot that Prune left, and why.
type KeptSnapshot struct {
	Ref Ref    `json:"ref"`
	Why string `json:"why"`
}

// PruneTarget is a snapshot that Prune is to remove. A GUID other than zero is what the name had when that was decided.
type PruneTarget struct {
	Ref  Ref
	GUID format.GUID `json:",omitzero"`
}

// another is why Prune leaves a snapshot that has another GUID than the target.
const another = "it is another one by now"

// Prune removes snapshots, in one step. It leaves those that something needs: a hold, a clone, a user, or a reception
// whose base it is. It also leaves a snapshot that got its name after the removal was decided, and so has another GUID.
// It says why it leaves one. Snapshots that do not exist are not mentioned. With dry set, it removes nothing, and reports
// what it would do. With an error, the report says what was to be removed.
func (s *Store) Prune(dry bool, targets ...PruneTarget) (r PruneReport, err error) {
	if dry {
		s.mu.Lock()
		defer s.mu.Unlock()
		r, _, err = s.pruning(targets)
		return r, wrapIf(err, "prune")
	}
	err = s.transact(func() (ev *format.Event, err error) {
		r, ev, err = s.pruning(targets)
		if len(r.Removed) == 0 {
			return nil, err
		}
		return ev, err
	})
	if err == nil && len(r.Removed) > 0 {
		wal.Poke(s.checkpoints.work) // the checkpoint reclaims the space
	}
	return r, wrapIf(err, "prune")
}

// pruning returns the event that removes those of the snapshots that nothing needs. The caller holds mu.
func (s *Store) pruning(targets []PruneTarget) (r PruneReport, ev *format.Event, err error) {
	r, ev = PruneReport{Removed: []Ref{}, Kept: []KeptSnapshot{}}, &format.Event{Op: "prune"}
	seen := map[*snapshot]bool{}
	for _, t := range targets {
		ref := t.Ref
		v, sn, err := s.lookup(ref)
		switch {
		case errors.Is(err, ErrNotFound):
			continue
		case err != nil:
			return r, nil, err
		case sn == nil:
			return r, nil, fmt.Errorf("%q is a volume, and only snapshots are pruned: %w", ref, ErrInvalid)
		case seen[sn]:
			continue
		}
		seen[sn] = true
		why := s.neededBy(v, sn)
		if !t.GUID.IsZero() && t.GUID != s.guidOf(sn) {
			why = another
		}
		if why != "" {
			r.Kept = append(r.Kept, KeptSnapshot{ref, why})
			continue
		}
		r.Removed = append(r.Removed, ref)
		ev.Snapshots = append(ev.Snapshots, unnamed(sn))
	}
	return r, ev, nil
}

// neededBy returns what needs a snapshot of the volume v, or "". The caller holds mu.
func (s *Store) neededBy(v *volume, sn *snapshot) string {
	var all []string
	if len(sn.Holds) > 0 {
		all = append(all, "hold "+few(slices.Collect(maps.Keys(sn.Holds))))
	}
	var names []string
	for c := range sn.clones() {
		if c != v {
			names = append(names, c.Name)
		}
	}
	if len(names) > 0 {
		all = append(all, "clone "+few(names))
	}
	if sn.open > 0 {
		all = append(all, "in use")
	}
	if s.isBase(sn) != nil {
		all = append(all, "base of what is being received")
	}
	return strings.Join(all, ", ")
}

// few returns the names in their order, or the first few and the number of the others.
func few(names []string) string {
	const most = 5
	slices.Sort(names)
	if n := len(names); n > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), n-most)
	}
	return strings.Join(names, ", ")
}
