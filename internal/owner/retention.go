package owner

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
)

// The largest numbers of volumes and of snapshots in one event, whose size is bounded, and in one request to the owner,
// which is bounded by maxRequest.
const (
	autoAtOnce  = 1000
	pruneAtOnce = 1000
)

// autoTries is how many seconds SnapshotAuto tries, if there is a snapshot of this second already. There is one of the
// next second, too, if the clock was set back.
const autoTries = 5

// SnapshotAuto takes a snapshot, named by the time, of each volume that has changed since its newest one:
// cow.Store.SnapshotAuto. If there is one of this second, it waits for the next.
func (o *Owner) SnapshotAuto(ctx context.Context, volumes ...string) (r cow.AutoReport, err error) {
	r = cow.AutoReport{Taken: []cow.Ref{}, Unchanged: []cow.Ref{}}
	for some := range slices.Chunk(volumes, autoAtOnce) {
		for try := 1; ; try++ {
			one, err := o.store.SnapshotAuto(ctx, some...)
			if len(one.Taken) > 0 {
				err = o.did(ctx, journal.Entry{Kind: "snapshot", Names: namesOf(one.Taken), Details: map[string]any{"auto": true}}, err)
			}
			if err == nil {
				r.Taken, r.Unchanged = append(r.Taken, one.Taken...), append(r.Unchanged, one.Unchanged...)
				break
			}
			if !errors.Is(err, cow.ErrExists) || try == autoTries {
				return r, err
			}
			if err := o.nextSecond(ctx); err != nil {
				return r, err
			}
		}
	}
	return r, nil
}

// nextSecond waits until the next second of the clock begins.
func (o *Owner) nextSecond(ctx context.Context) error {
	now := time.Now()
	select {
	case <-time.After(now.Truncate(time.Second).Add(time.Second).Sub(now)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-o.life.Done():
		return context.Cause(o.life)
	}
}

// Prune removes snapshots that nothing needs: cow.Store.Prune.
func (o *Owner) Prune(ctx context.Context, dry bool, targets ...cow.PruneTarget) (r cow.PruneReport, err error) {
	r = cow.PruneReport{Removed: []cow.Ref{}, Kept: []cow.KeptSnapshot{}}
	if o.unread != nil && !dry {
		return r, o.unread
	}
	for some := range slices.Chunk(targets, pruneAtOnce) {
		one, err := o.store.Prune(dry, some...)
		if !dry && len(one.Removed) > 0 {
			err = o.did(ctx, journal.Entry{Kind: "prune", Names: namesOf(one.Removed)}, err)
		}
		if err != nil {
			return r, err
		}
		r.Removed, r.Kept = append(r.Removed, one.Removed...), append(r.Kept, one.Kept...)
	}
	return r, nil
}

// retentionRoutes adds the operations of this file to those of the control socket.
func (o *Owner) retentionRoutes(plain func(string, func(context.Context, request) (any, error))) {
	plain("snapshot-auto", func(ctx context.Context, r request) (any, error) { return o.SnapshotAuto(ctx, r.Names...) })
	plain("prune", func(ctx context.Context, r request) (any, error) { return o.Prune(ctx, r.Flag, r.Prune...) })
}

// SnapshotAuto takes a snapshot, named by the time, of each volume that has changed since its newest one.
func (c *Client) SnapshotAuto(ctx context.Context, volumes ...string) (r cow.AutoReport, err error) {
	r = cow.AutoReport{Taken: []cow.Ref{}, Unchanged: []cow.Ref{}}
	for some := range slices.Chunk(volumes, autoAtOnce) {
		var one cow.AutoReport
		if err := c.call(ctx, "snapshot-auto", request{Names: some}, &one); err != nil {
			return r, err
		}
		r.Taken, r.Unchanged = append(r.Taken, one.Taken...), append(r.Unchanged, one.Unchanged...)
	}
	return r, nil
}

// Prune removes snapshots that nothing needs.
func (c *Client) Prune(ctx context.Context, dry bool, targets ...cow.PruneTarget) (r cow.PruneReport, err error) {
	r = cow.PruneReport{Removed: []cow.Ref{}, Kept: []cow.KeptSnapshot{}}
	for some := range slices.Chunk(targets, pruneAtOnce) {
		var one cow.PruneReport
		if err := c.call(ctx, "prune", request{Prune: some, Flag: dry}, &one); err != nil {
			return r, err
		}
		r.Removed, r.Kept = append(r.Removed, one.Removed...), append(r.Kept, one.Kept...)
	}
	return r, nil
}
