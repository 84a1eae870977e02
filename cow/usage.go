package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Usage is how much of the store a volume or snapshot takes. docs/reclaim.md, Space, defines the figures.
type Usage struct {
	Ref             Ref   `json:"ref"`
	Mapped          int64 `json:"mapped"`            // bytes of its blocks that hold data
	Referenced      int64 `json:"referenced"`        // stored size of these blocks, shared or not
	Exclusive       int64 `json:"exclusive"`         // what removing it, and nothing else, frees
	Shared          int64 `json:"shared"`            // the part of Referenced that stays then
	UsedBySnapshots int64 `json:"used_by_snapshots"` // of a volume: what deleting all its snapshots frees
	Used            int64 `json:"used"`              // what deleting it frees; a volume with its snapshots
	// Family is what a volume takes together with all that has an origin in common with it, and FamilyID is the same for
	// all volumes of that family. Only Usage of all volumes has them.
	Family   int64  `json:"family,omitempty"`
	FamilyID uint32 `json:"family_id,omitempty"`
}

// Usage returns what volumes and snapshots take: those of refs that exist, or all if there are no refs, each volume
// before its snapshots. It begins with a checkpoint, and its figures are exact as of then. The store may be in use. If a
// part of the map cannot be read, the error matches ErrCorrupt, and KnownDamage names all such parts.
func (s *Store) Usage(ctx context.Context, refs ...Ref) ([]Usage, error) {
	return s.usage(ctx, len(refs) == 0, func(scan *audit.UsageScan) (names []audit.Name) {
		if len(refs) == 0 {
			return scan.All()
		}
		for _, r := range refs {
			names = append(names, audit.Name(r))
		}
		return names
	})
}

// VolumeUsage returns what the named volumes and all their snapshots take, as Usage does, each volume before its
// snapshots. Volumes that do not exist are left out.
func (s *Store) VolumeUsage(ctx context.Context, volumes ...string) ([]Usage, error) {
	return s.usage(ctx, false, func(scan *audit.UsageScan) (names []audit.Name) {
		for _, v := range volumes {
			names = append(names, scan.Of(v)...)
		}
		return names
	})
}

// usage returns what the volumes and snapshots take that which chooses, and what their families take.
func (s *Store) usage(ctx context.Context, families bool, which func(*audit.UsageScan) []audit.Name) (us []Usage, err error) {
	if err := s.beginTask(); err != nil {
		return nil, fmt.Errorf("usage: %w", err)
	}
	defer s.tasks.Done()
	tx, _, err := s.readTable()
	if err != nil {
		return nil, fmt.Errorf("usage: %w", err)
	}
	defer func() { err = errors.Join(err, tx.Close()) }()
	err = metadata.Guard(func() error {
		scan, err := audit.NewUsageScan(tx, func() error { return s.interrupted(ctx) })
		if err != nil {
			return err
		}
		names := which(scan)
		if err := scan.Figures(names, func(n audit.Name, f audit.Figures) { us = append(us, usageOf(Ref(n), f)) }); err != nil {
			return err
		}
		if !families {
			return nil
		}
		return addFamilies(us, scan)
	})
	if errors.Is(err, ErrCorrupt) {
		err = errors.Join(err, metadata.Guard(func() error { return s.metVersions(ctx, tx) }))
	}
	return us, wrapIf(err, "usage")
}

// addFamilies adds what the families of the volumes take.
func addFamilies(us []Usage, scan *audit.UsageScan) (err error) {
	for i := range us {
		if u := &us[i]; u.Ref.Snapshot == "" && err == nil {
			u.FamilyID, u.Family, err = scan.Family(u.Ref.Volume)
		}
	}
	return err
}

// metVersions notes all versions of leaves in the table that do not decode.
func (s *Store) metVersions(ctx context.Context, tx *metadata.Tx) error {
	s.mu.Lock()
	branches := slices.Sorted(maps.Keys(s.catalog.branches))
	s.mu.Unlock()
	var lf format.Leaf
	for _, b := range branches {
		for from := uint32(0); ; from++ {
			index, more, err := tx.NextLeaf(b, from)
			if err = cmp.Or(err, s.interrupted(ctx)); err != nil {
				return err
			}
			if !more {
				break
			}
			for epoch := head; epoch > 0; epoch-- {
				epoch, err = tx.Leaf(metadata.Version{Branch: b, Leaf: index, Epoch: epoch}, &lf)
				if d := (*metadata.LeafDamage)(nil); errors.As(err, &d) {
					s.metLeaf(index, err)
					epoch = d.Version.Epoch
				} else if err != nil {
					return err
				}
				if epoch == 0 {
					break
				}
			}
			if from = index; from == math.MaxUint32 {
				break
			}
		}
	}
	return nil
}

// readTable returns the table as of now. If no checkpoint can be made any more, it is as of the last one, and all is
// false.
func (s *Store) readTable() (tx *metadata.Tx, all bool, err error) {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	err = s.live()
	if err == nil && s.changed() {
		err = s.checkpointLocked()
	}
	if err != nil && s.readOnly == nil && !errors.Is(err, ErrFailed) && !errors.Is(err, ErrNoSpace) {
		return nil, false, err
	}
	all = err == nil
	tx, err = s.meta.Begin()
	return tx, all, err
}

func usageOf(r Ref, f audit.Figures) Usage {
	return Usage{
		Ref: r, Mapped: f.Mapped, Referenced: f.Referenced, Exclusive: f.Exclusive, Shared: f.Shared,
		UsedBySnapshots: f.UsedBySnapshots, Used: f.Used,
	}
}
