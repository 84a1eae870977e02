package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"

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
}

// Usage returns what volumes and snapshots take: those of refs that exist, or all if there are no refs, each
// volume before its snapshots. It begins with a checkpoint, and its figures are exact as of then. The store
// may be in use.
func (s *Store) Usage(ctx context.Context, refs ...Ref) ([]Usage, error) {
	return s.usage(ctx, func(c *usageScan) []Ref {
		if len(refs) == 0 {
			return c.names
		}
		return refs
	})
}

// usage returns what the volumes and snapshots take that which chooses.
func (s *Store) usage(ctx context.Context, which func(*usageScan) []Ref) (us []Usage, err error) {
	if err := s.beginTask(); err != nil {
		return nil, fmt.Errorf("usage: %w", err)
	}
	defer s.tasks.Done()
	tx, err := s.readTable()
	if err != nil {
		return nil, fmt.Errorf("usage: %w", err)
	}
	defer func() { err = errors.Join(err, tx.Close()) }()
	err = metadata.Guard(func() error {
		c, err := newUsageScan(tx, func() error { return s.interrupted(ctx) })
		if err == nil {
			us, err = c.usage(which(c))
		}
		return err
	})
	return us, wrapIf(err, "usage")
}

// VolumeUsage returns what the named volumes and all their snapshots take, as Usage does, each volume before
// its snapshots. Volumes that do not exist are left out.
func (s *Store) VolumeUsage(ctx context.Context, names ...string) ([]Usage, error) {
	return s.usage(ctx, func(c *usageScan) []Ref {
		var refs []Ref
		for _, name := range names {
			i, _ := slices.BinarySearchFunc(c.names, Ref{Volume: name}, Ref.compare)
			for ; i < len(c.names) && c.names[i].Volume == name; i++ {
				refs = append(refs, c.names[i])
			}
		}
		return refs
	})
}
