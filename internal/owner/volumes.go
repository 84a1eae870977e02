package owner

import (
	"context"
	"fmt"

	"github.com/vdisk/vdisk/cow"
)

// Info describes the store.
func (o *Owner) Info(context.Context) (cow.StoreInfo, error) { return o.store.Info(), nil }

// Volumes lists the volumes by name.
func (o *Owner) Volumes(context.Context) ([]Volume, error) {
	infos := o.store.Volumes()
	volumes := make([]Volume, len(infos))
	for i, info := range infos {
		volumes[i] = Volume{VolumeInfo: info, Devices: o.devicesOf(info.Name)}
	}
	return volumes, nil
}

// Volume describes one volume.
func (o *Owner) Volume(_ context.Context, name string) (Volume, error) {
	info, err := o.store.Volume(name)
	if err != nil {
		return Volume{}, err
	}
	return Volume{VolumeInfo: info, Devices: o.devicesOf(name)}, nil
}

// Usage says how much of a volume or snapshot is data, and what it takes in the store.
func (o *Owner) Usage(ctx context.Context, r cow.Ref) (cow.Usage, error) {
	return o.store.Usage(ctx, r)
}

// CreateVolume makes an empty volume.
func (o *Owner) CreateVolume(_ context.Context, name string, v cow.VolumeOptions) (cow.VolumeInfo, error) {
	return o.store.CreateVolume(name, v)
}

// Snapshot takes snapshots, of all the volumes at one moment.
func (o *Owner) Snapshot(_ context.Context, refs ...cow.Ref) error { return o.store.Snapshot(refs...) }

// Clone makes a volume from a snapshot.
func (o *Owner) Clone(_ context.Context, src cow.Ref, name string) error {
	return o.store.Clone(src, name)
}

// Rollback gives a volume the content of one of its snapshots.
func (o *Owner) Rollback(_ context.Context, to cow.Ref) error {
	return o.inUse(to.Volume, o.store.Rollback(to))
}

// Rename gives a volume, or a snapshot of the same volume, another name.
func (o *Owner) Rename(_ context.Context, from, to cow.Ref) error { return o.store.Rename(from, to) }

// Resize changes the size of a volume. The block device of an attached one cannot follow.
func (o *Owner) Resize(_ context.Context, name string, size int64, shrink bool) error {
	info, err := o.store.Volume(name)
	if err != nil {
		return err
	}
	for _, d := range o.devicesOf(name) {
		if d.Ref.Snapshot == "" {
			return fmt.Errorf("volume %s is attached as %s, whose size is fixed: %w: detach it, resize, attach it again",
				name, d.Path, cow.ErrBusy)
		}
	}
	if size < info.Size && info.Open > 0 {
		return o.inUse(name, fmt.Errorf("volume %s is open and cannot shrink: %w", name, cow.ErrBusy))
	}
	return o.store.Resize(name, size, shrink)
}

// Remove removes a volume or snapshot.
func (o *Owner) Remove(_ context.Context, r cow.Ref, recursive bool) error {
	return o.inUse(r.Volume, o.store.Remove(r, recursive))
}

// Check proves the store's structure, and tells of each problem it finds.
func (o *Owner) Check(ctx context.Context, c cow.CheckOptions, problem func(cow.Problem)) (cow.CheckReport, error) {
	return o.store.Check(ctx, c, problem)
}

// known tells whether there is such a volume or snapshot.
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
