package cow

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/format"
)

// HoldInfo is a hold: a tag that keeps a snapshot from being removed.
type HoldInfo struct {
	Tag     string    `json:"tag"`
	Created time.Time `json:"created"`
}

// Hold gives snapshots a hold with a tag, in one step: all of them or none. A snapshot with holds cannot be removed. It
// returns ErrExists if one of them has that hold.
func (s *Store) Hold(tag string, refs ...Ref) error {
	now := Now()
	err := s.changeHolds("hold", tag, refs, func(r Ref, holds map[string]time.Time) error {
		if _, held := holds[tag]; held {
			return fmt.Errorf("%s has the hold %s: %w", r, tag, ErrExists)
		}
		holds[tag] = now
		if err := format.CheckHolds(holds); err != nil {
			return fmt.Errorf("%s: %v: %w", r, err, ErrInvalid)
		}
		return nil
	})
	return wrapIf(err, "hold")
}

// Release removes the hold with a tag from snapshots, in one step: from all of them or none. It returns ErrNotFound if
// one of them does not have it.
func (s *Store) Release(tag string, refs ...Ref) error {
	err := s.changeHolds("release", tag, refs, func(r Ref, holds map[string]time.Time) error {
		if _, held := holds[tag]; !held {
			return fmt.Errorf("%s has no hold %s: %w", r, tag, ErrNotFound)
		}
		delete(holds, tag)
		return nil
	})
	return wrapIf(err, "release")
}

// changeHolds makes one event out of what change does to a copy of the holds of each snapshot.
func (s *Store) changeHolds(op, tag string, refs []Ref, change func(Ref, map[string]time.Time) error) error {
	if err := format.CheckName(tag); err != nil {
		return fmt.Errorf("tag: %v: %w", err, ErrInvalid)
	}
	return s.transact(func() (*format.Event, error) {
		ev := &format.Event{Op: op}
		seen := map[*snapshot]bool{}
		for _, r := range refs {
			_, sn, err := s.lookupSnapshot(r)
			if err != nil {
				return nil, err
			}
			if seen[sn] {
				return nil, fmt.Errorf("%s is named twice: %w", r, ErrInvalid)
			}
			seen[sn] = true
			row := sn.Snapshot
			if row.Holds = maps.Clone(row.Holds); row.Holds == nil {
				row.Holds = map[string]time.Time{}
			}
			if err := change(r, row.Holds); err != nil {
				return nil, err
			}
			ev.Snapshots = append(ev.Snapshots, row)
		}
		return ev, nil
	})
}

// held returns an error if one of the snapshots of the volume v has holds. The caller holds mu.
func held(v *volume, snapshots ...*snapshot) error {
	var first *snapshot
	for _, sn := range snapshots {
		if len(sn.Holds) > 0 && (first == nil || sn.Name < first.Name) {
			first = sn
		}
	}
	if first == nil {
		return nil
	}
	return HeldError(Ref{v.Name, first.Name}, slices.Collect(maps.Keys(first.Holds)))
}

// HeldError returns the error of a removal of a snapshot that has holds with these tags. It matches ErrBusy.
func HeldError(r Ref, tags []string) error {
	const most = 5
	tags = slices.Sorted(slices.Values(tags))
	named, what, tag := strings.Join(tags[:min(most, len(tags))], ", "), "hold", tags[0]
	if len(tags) > 1 {
		what, tag = "holds", "TAG"
	}
	if len(tags) > most {
		named = fmt.Sprintf("%s and %d more", named, len(tags)-most)
	}
	return fmt.Errorf("snapshot %s has the %s %s; 'vdisk release %s %s' gives it up: %w", r, what, named, tag, r, ErrBusy)
}

// holdInfos returns the holds of a snapshot, in the order of their tags.
func holdInfos(m map[string]time.Time) []HoldInfo {
	if len(m) == 0 {
		return nil
	}
	list := make([]HoldInfo, 0, len(m))
	for tag, created := range m {
		list = append(list, HoldInfo{tag, created})
	}
	slices.SortFunc(list, func(a, b HoldInfo) int { return cmp.Compare(a.Tag, b.Tag) })
	return list
}
