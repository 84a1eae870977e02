package owner

import (
	"context"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/ublk"
)

// Info describes the store.
func (o *Owner) Info(context.Context) (cow.StoreInfo, error) { return o.store.Info(), nil }

// Volumes lists the volumes by name.
func (o *Owner) Volumes(context.Context) ([]Volume, error) {
	infos := o.store.Volumes()
	volumes := make([]Volume, len(infos))
	for i, info := range infos {
		volumes[i] = o.volumeOf(info)
	}
	return volumes, nil
}

// Volume describes one volume.
func (o *Owner) Volume(_ context.Context, name string) (Volume, error) {
	info, err := o.store.Volume(name)
	if err != nil {
		return Volume{}, err
	}
	return o.volumeOf(info), nil
}

// volumeOf adds a volume's users to what the engine knows of it.
func (o *Owner) volumeOf(info cow.VolumeInfo) Volume {
	info.Open += o.exports.sharing(info.Name)
	return Volume{VolumeInfo: info, Devices: o.devicesOf(info.Name)}
}

// Usage returns the space that volumes and snapshots take: the named ones that exist, or all of them.
func (o *Owner) Usage(ctx context.Context, refs ...cow.Ref) ([]cow.Usage, error) {
	return o.store.Usage(ctx, refs...)
}

// VolumeUsage returns the space that volumes take, each with all of its snapshots.
func (o *Owner) VolumeUsage(ctx context.Context, names ...string) ([]cow.Usage, error) {
	return o.store.VolumeUsage(ctx, names...)
}

// CreateVolume makes an empty volume.
func (o *Owner) CreateVolume(ctx context.Context, name string, v cow.VolumeOptions) (cow.VolumeInfo, error) {
	info, err := o.store.CreateVolume(name, v)
	return info, o.did(ctx, journal.Entry{Kind: "create", Names: []string{name}, Details: map[string]any{"size": v.Size}}, err)
}

// Snapshot takes snapshots of all the volumes at the same moment. It takes none once ctx has ended.
func (o *Owner) Snapshot(ctx context.Context, refs ...cow.Ref) error {
	return o.did(ctx, journal.Entry{Kind: "snapshot", Names: namesOf(refs)}, o.store.SnapshotContext(ctx, refs...))
}

// Clone makes volumes from a snapshot, all of them or none.
func (o *Owner) Clone(ctx context.Context, src cow.Ref, names ...string) error {
	return o.did(ctx, journal.Entry{Kind: "clone", Names: names, From: src.String()}, o.store.Clone(src, names...))
}

// Rollback gives a volume the content of one of its snapshots.
func (o *Owner) Rollback(ctx context.Context, to cow.Ref) error {
	if o.unread != nil {
		return o.unread
	}
	err := o.inUse(to.Volume, o.store.Rollback(to))
	return o.did(ctx, journal.Entry{Kind: "rollback", Names: []string{to.Volume}, From: to.String()}, err)
}

// Rename gives a volume, or a snapshot of the same volume, another name.
func (o *Owner) Rename(ctx context.Context, from, to cow.Ref) error {
	return o.did(ctx, journal.Entry{Kind: "rename", Names: []string{to.String()}, From: from.String()}, o.rename(from, to))
}

func (o *Owner) rename(from, to cow.Ref) error {
	if o.unread != nil {
		return o.unread
	}
	done, err := o.exports.keepOut(from)
	if err != nil {
		return fmt.Errorf("renaming %v: %w", from, err)
	}
	defer done()
	attached := len(o.devicesOf(from.Volume)) > 0
	if attached {
		if err := o.recordRenaming(from, to); err != nil {
			return fmt.Errorf("renaming %v: writing down what is attached: %w", from, err)
		}
	}
	err = o.store.Rename(from, to)
	if err == nil {
		o.exports.meters.renamed(from, to)
	}
	if attached {
		err = errors.Join(err, o.record())
		o.tellNames(to.Volume)
	}
	return err
}

// Resize changes the size of a volume. The volume's block device grows with it; if the kernel cannot do that, Resize
// fails.
func (o *Owner) Resize(ctx context.Context, name string, size int64, shrink bool) error {
	err := o.resize(ctx, name, size, shrink)
	return o.did(ctx, journal.Entry{Kind: "resize", Names: []string{name}, Details: map[string]any{"size": size}}, err)
}

func (o *Owner) resize(ctx context.Context, name string, size int64, shrink bool) error {
	info, err := o.store.Volume(name)
	if err == nil {
		err = o.unread
	}
	if err != nil {
		return err
	}
	if err := o.notWaiting(cow.Ref{Volume: name}); err != nil {
		return err
	}
	if size < info.Size && info.Open > 0 {
		return o.inUse(name, fmt.Errorf("volume %s is open and cannot shrink: %w", name, cow.ErrBusy))
	}
	b, err := o.resizable(name)
	if err != nil {
		return err
	}
	if err := o.store.Resize(name, size, shrink); err != nil || b == nil {
		return err
	}
	if err := b.Resize(ctx, size); err != nil {
		return ublkError(fmt.Errorf("volume %s has its new size, but %s keeps the old one until it is attached again: %w", name, b.Path(), err))
	}
	return nil
}

// resizable returns the block device of a volume, or nil if it has none. It returns an error if the kernel cannot
// resize the device.
func (o *Owner) resizable(name string) (block, error) {
	disks, blocks := o.servedDisks()
	for i, d := range disks {
		if d.ref() != (cow.Ref{Volume: name}) {
			continue
		}
		if blocks[i].Features()&ublk.FeatureUpdateSize == 0 {
			return nil, fmt.Errorf("volume %s is attached as %s, and this kernel cannot change the size of a device that is (UPDATE_SIZE, Linux 6.16): "+
				"%w: detach it, resize, attach it again", name, blocks[i].Path(), ErrUnsupported)
		}
		return blocks[i], nil
	}
	return nil, nil
}

// Remove removes a volume or snapshot.
func (o *Owner) Remove(ctx context.Context, r cow.Ref, recursive bool) error {
	if o.unread != nil {
		return o.unread
	}
	err := o.inUse(r.Volume, o.store.Remove(r, recursive))
	return o.did(ctx, journal.Entry{Kind: "rm", Names: []string{r.String()}}, err)
}

// Clean reclaims the space of chunk files that are partly dead.
func (o *Owner) Clean(ctx context.Context, waste float64) (cow.CleanReport, error) {
	rep, err := o.store.Clean(ctx, waste)
	return rep, o.did(ctx, journal.Entry{Kind: "gc", Details: map[string]any{"chunk_files": rep.Chunks, "freed_bytes": rep.Freed}}, err)
}

// Bench measures the engine on a scratch volume.
func (o *Owner) Bench(ctx context.Context, b bench.Options, each func(bench.Result)) error {
	created, err := o.addUnfinished(bench.Volume, true)
	if err != nil {
		return err
	}
	b.Volume.Created = created
	err = bench.Run(ctx, o.store, b, each)
	o.noLonger(bench.Volume, created)
	return err
}

// Cold runs a whole cold pass.
func (o *Owner) Cold(ctx context.Context) (cow.ColdReport, error) {
	rep, err := o.store.Cold(ctx)
	return rep, o.did(ctx, journal.Entry{Kind: "gc", Details: map[string]any{"cold": true}}, err)
}

// Check verifies the store's structure and calls problem for each problem that it finds.
func (o *Owner) Check(ctx context.Context, c cow.CheckOptions, problem func(cow.Problem)) (cow.CheckReport, error) {
	return o.store.Check(ctx, c, problem)
}

// known returns an error if there is no such volume or snapshot.
func (o *Owner) known(r cow.Ref) error {
	info, err := o.store.Volume(r.Volume)
	if err != nil || r.Snapshot == "" {
		return err
	}
	for _, s := range info.Snapshots {
		if s.Name == r.Snapshot {
			return nil
		}
	}
	return fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
}
