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

// Prune removes snapshots, in one step, but for those that something needs: a hold, a clone, a user, or a reception of
// which it is the base. Those it leaves, and says why. Snapshots that do not exist are not mentioned. With dry set, it
// removes nothing, and reports what it would do. With an error, the report says what was to be removed.
func (s *Store) Prune(dry bool, refs ...Ref) (r PruneReport, err error) {
	if dry {
		s.mu.Lock()
		defer s.mu.Unlock()
		r, _, err = s.pruning(refs)
		return r, wrapIf(err, "prune")
	}
	err = s.transact(func() (ev *format.Event, err error) {
		r, ev, err = s.pruning(refs)
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
func (s *Store) pruning(refs []Ref) (r PruneReport, ev *format.Event, err error) {
	r, ev = PruneReport{Removed: []Ref{}, Kept: []KeptSnapshot{}}, &format.Event{Op: "prune"}
	clones, seen := s.clones(), map[*snapshot]bool{}
	for _, ref := range refs {
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
		if why := s.neededBy(v, sn, clones); why != "" {
			r.Kept = append(r.Kept, KeptSnapshot{ref, why})
			continue
		}
		r.Removed = append(r.Removed, ref)
		ev.Snapshots = append(ev.Snapshots, unnamed(sn))
	}
	return r, ev, nil
}

// neededBy returns what needs a snapshot of the volume v, or "". The caller holds mu.
func (s *Store) neededBy(v *volume, sn *snapshot, clones map[point][]*volume) string {
	var all []string
	if len(sn.Holds) > 0 {
		all = append(all, "hold "+few(slices.Collect(maps.Keys(sn.Holds))))
	}
	var names []string
	for _, c := range clones[point{sn.branch, sn.Epoch}] {
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
