package cow

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vdisk/vdisk/metadata"
)

// Usage is what a volume or snapshot takes of the store, as docs/reclaim.md, Space, defines it.
type Usage struct {
	Ref             Ref   `json:"ref"`
	Mapped          int64 `json:"mapped"`            // bytes of blocks that hold data
	Referenced      int64 `json:"referenced"`        // bytes that these take in the log, shared or not
	Exclusive       int64 `json:"exclusive"`         // what going without it, alone, frees
	Shared          int64 `json:"shared"`            // of what it refers to, what stays then
	UsedBySnapshots int64 `json:"used_by_snapshots"` // of a volume: what the deletion of all its snapshots frees
	Used            int64 `json:"used"`              // what its deletion frees; of a volume, with its snapshots
}

// Usage tells what volumes and snapshots take: those named, as far as they are there, or all, each volume before its
// snapshots. It begins with a checkpoint, and is exact as of then; the store may be in use.
func (s *Store) Usage(ctx context.Context, refs ...Ref) ([]Usage, error) {
	return s.usage(ctx, func(c *usageScan) []Ref {
		if len(refs) == 0 {
			return c.refs
		}
		return refs
	})
}

// usage tells what those take that which chooses.
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
		c, err := newCensus(tx, func() error { return s.interrupted(ctx) })
		if err == nil {
			us, err = c.usage(which(c))
		}
		return err
	})
	return us, wrapIf(err, "usage")
}

// VolumeUsage tells what volumes take, each before all of its snapshots, as Usage does. Volumes that are not there are
// left out.
func (s *Store) VolumeUsage(ctx context.Context, names ...string) ([]Usage, error) {
	return s.usage(ctx, func(c *usageScan) []Ref {
		var refs []Ref
		for _, name := range names {
			i, _ := slices.BinarySearchFunc(c.refs, Ref{Volume: name}, Ref.compare)
			for ; i < len(c.refs) && c.refs[i].Volume == name; i++ {
				refs = append(refs, c.refs[i])
			}
		}
		return refs
	})
}
