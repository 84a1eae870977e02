package cow

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// MaxVolume is the size of the largest volume: 64 TiB.
const MaxVolume = 64 << 40

// lookup finds what a ref names. The caller holds mu.
func (s *Store) lookup(r Ref) (*volume, *snapshot, error) {
	v := s.catalog.byName[r.Volume]
	if v == nil {
		return nil, nil, fmt.Errorf("volume %q: %w", r.Volume, ErrNotFound)
	}
	if r.Snapshot == "" {
		return v, nil, nil
	}
	sn := v.snapshots[r.Snapshot]
	if sn == nil {
		return nil, nil, fmt.Errorf("snapshot %q: %w", r, ErrNotFound)
	}
	return v, sn, nil
}

// lookupSnapshot is lookup, but returns ErrInvalid if the ref does not name a snapshot. The caller holds mu.
func (s *Store) lookupSnapshot(r Ref) (*volume, *snapshot, error) {
	if v := s.catalog.byName[r.Volume]; v != nil && v.Receiving != nil {
		return nil, nil, v.received()
	}
	v, sn, err := s.lookup(r)
	if err == nil && sn == nil {
		err = fmt.Errorf("%q is a volume; name a snapshot of it, VOL@SNAP: %w", r, ErrInvalid)
	}
	return v, sn, err
}

func (s *Store) freeName(name string) error {
	if err := format.CheckName(name); err != nil {
		return fmt.Errorf("volume name: %v: %w", err, ErrInvalid)
	}
	if s.catalog.byName[name] != nil {
		return fmt.Errorf("volume %q: %w", name, ErrExists)
	}
	return s.receives(name)
}

// VolumeOptions are the options of CreateVolume.
type VolumeOptions struct {
	Size         int64        // in bytes: a multiple of LogicalBlock, at most MaxVolume
	Codec        format.Codec // format.Raw: none
	Level        int          // of zstd, 1 to 19; 0: the codec's default
	LogicalBlock int          // 512 (default) or 4096
	// Created is the time of creation, in whole milliseconds; zero stands for now. An owner that has to note a volume
	// before it exists chooses the time.
	Created time.Time `json:"-"`
}

func checkSize(size int64, block int) error {
	switch {
	case size <= 0:
		return fmt.Errorf("size %d: a volume has at least one block: %w", size, ErrInvalid)
	case size > MaxVolume:
		return fmt.Errorf("size %d: the largest volume has 64 TiB: %w", size, ErrInvalid)
	case size%int64(block) != 0:
		return fmt.Errorf("size %d is not a multiple of the logical block, %d: %w", size, block, ErrInvalid)
	}
	return nil
}

// CreateVolume makes an empty volume.
func (s *Store) CreateVolume(name string, o VolumeOptions) (VolumeInfo, error) {
	if o.LogicalBlock == 0 {
		o.LogicalBlock = 512
	}
	if o.LogicalBlock != 512 && o.LogicalBlock != format.BlockSize {
		return VolumeInfo{}, fmt.Errorf("create %s: logical block %d is neither 512 nor 4096: %w", name, o.LogicalBlock, ErrInvalid)
	}
	err := checkSize(o.Size, o.LogicalBlock)
	if err == nil {
		if err = format.CheckLevel(o.Codec, o.Level); err != nil {
			err = fmt.Errorf("%v: %w", err, ErrInvalid)
		}
	}
	if err != nil {
		return VolumeInfo{}, fmt.Errorf("create %s: %w", name, err)
	}
	err = s.transact(func() (*format.Event, error) {
		if err := s.freeName(name); err != nil {
			return nil, err
		}
		b := format.Branch{ID: s.catalog.newID(), Epoch: 1}
		v := format.Volume{
			ID: s.catalog.newID(), Name: name, Size: o.Size, Codec: o.Codec, Level: o.Level,
			LogicalBlock: o.LogicalBlock, Branch: b.ID, Created: o.Created,
		}
		if v.Created.IsZero() {
			v.Created = Now()
		}
		return &format.Event{Op: "create", Branches: []format.Branch{b}, Volumes: []format.Volume{v}}, nil
	})
	if err != nil {
		return VolumeInfo{}, fmt.Errorf("create %s: %w", name, err)
	}
	return s.Volume(name)
}

// Now returns the time, as a volume or snapshot that is made now gets it.
func Now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

// Snapshot takes snapshots of volumes, open or not, all at one moment. It takes either all of them or none.
func (s *Store) Snapshot(refs ...Ref) error { return s.SnapshotContext(context.Background(), refs...) }

// SnapshotContext is Snapshot, but takes none once ctx has ended.
func (s *Store) SnapshotContext(ctx context.Context, refs ...Ref) error {
	err := s.transact(func() (*format.Event, error) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return s.snapshotEvent(s.opts.now(), refs)
	})
	return wrapIf(err, "snapshot")
}

// snapshotEvent returns the event that takes snapshots. The caller holds mu.
func (s *Store) snapshotEvent(now time.Time, refs []Ref) (*format.Event, error) {
	ev := &format.Event{Op: "snapshot"}
	seen := map[*volume]bool{}
	for _, r := range refs {
		v, _, err := s.lookup(Ref{Volume: r.Volume})
		switch {
		case r.Snapshot == "":
			return nil, fmt.Errorf("%q names no snapshot, VOL@SNAP: %w", r, ErrInvalid)
		case err != nil:
			return nil, err
		case v.received() != nil:
			return nil, v.received()
		case v.snapshots[r.Snapshot] != nil:
			return nil, fmt.Errorf("%s: %w", r, ErrExists)
		case v.branch.Epoch >= lastEpoch:
			return nil, fmt.Errorf("%s has had %d snapshots since it was made, cloned or rolled back, and can have no more; go on in a clone of one: %w",
				r.Volume, lastEpoch-1, ErrExhausted)
		case seen[v]:
			return nil, fmt.Errorf("%s is named twice: %w", r.Volume, ErrInvalid)
		}
		if err := format.CheckSnapshotName(r.Snapshot); err != nil {
			return nil, fmt.Errorf("%v: %w", err, ErrInvalid)
		}
		seen[v] = true
		b := v.branch.Branch
		ev.Snapshots = append(ev.Snapshots, format.Snapshot{
			ID: s.catalog.newID(), Volume: v.ID, Name: r.Snapshot,
			Branch: b.ID, Epoch: b.Epoch, Size: v.Size, Created: now, GUID: newGUID(),
		})
		b.Epoch++
		ev.Branches = append(ev.Branches, b)
	}
	return ev, nil
}

// newGUID returns a GUID that no other snapshot has, in any store.
func newGUID() (g format.GUID) {
	_, _ = rand.Read(g[:]) // it never fails
	return g
}

// Clone makes volumes whose content begins as that of a snapshot. It makes either all of them or none.
func (s *Store) Clone(src Ref, names ...string) error {
	err := s.transact(func() (*format.Event, error) {
		v, sn, err := s.lookupSnapshot(src)
		if err != nil {
			return nil, err
		}
		ev := &format.Event{Op: "clone"}
		seen := map[string]bool{}
		for _, name := range names {
			if err := s.freeName(name); err != nil {
				return nil, err
			}
			if seen[name] {
				return nil, fmt.Errorf("%s is named twice: %w", name, ErrInvalid)
			}
			seen[name] = true
			b := s.branchAt(sn)
			ev.Branches = append(ev.Branches, b)
			ev.Volumes = append(ev.Volumes, format.Volume{
				ID: s.catalog.newID(), Name: name, Size: sn.Size, Codec: v.Codec, Level: v.Level,
				LogicalBlock: v.LogicalBlock, Branch: b.ID, Created: Now(),
			})
		}
		return ev, nil
	})
	return wrapIf(err, "clone %s", src)
}

// branchAt returns a new branch that begins at a snapshot's point.
func (s *Store) branchAt(sn *snapshot) format.Branch {
	return format.Branch{ID: s.catalog.newID(), Epoch: 1, OriginBranch: sn.Branch, OriginEpoch: sn.Epoch}
}

// Rollback gives a volume the content of one of its snapshots. All its snapshots stay, the newer ones too. The volume
// must not be open.
func (s *Store) Rollback(to Ref) error {
	err := s.transact(func() (*format.Event, error) {
		v, sn, err := s.lookupSnapshot(to)
		if err != nil {
			return nil, err
		}
		if v.writer || v.readers > s.openSnapshots(v) {
			return nil, fmt.Errorf("volume %s is open; detach it first: %w", v.Name, ErrBusy)
		}
		b, row := s.branchAt(sn), v.Volume
		row.Branch, row.Size = b.ID, sn.Size
		return &format.Event{Op: "rollback", Branches: []format.Branch{b}, Volumes: []format.Volume{row}}, nil
	})
	return wrapIf(err, "rollback to %s", to)
}

func (s *Store) openSnapshots(v *volume) (n int) {
	for _, sn := range v.snapshots {
		n += sn.open
	}
	return n
}

// Rename gives a volume, or a snapshot of a volume, another name.
func (s *Store) Rename(from, to Ref) error {
	err := s.transact(func() (*format.Event, error) {
		v, sn, err := s.lookup(from)
		switch {
		case err != nil:
			return nil, err
		case from == to:
			return nil, nil
		case sn == nil && to.Snapshot != "", sn != nil && (to.Snapshot == "" || to.Volume != from.Volume):
			return nil, fmt.Errorf("%s cannot become %s: a volume stays a volume and a snapshot its volume's: %w", from, to, ErrInvalid)
		case sn == nil:
			if err := errors.Join(v.received(), s.receives(v.Name), s.freeName(to.Volume)); err != nil {
				return nil, err
			}
			row := v.Volume
			row.Name = to.Volume
			return &format.Event{Op: "rename", Volumes: []format.Volume{row}}, nil
		}
		if err := format.CheckSnapshotName(to.Snapshot); err != nil {
			return nil, fmt.Errorf("%v: %w", err, ErrInvalid)
		}
		if v.snapshots[to.Snapshot] != nil {
			return nil, fmt.Errorf("%s: %w", to, ErrExists)
		}
		row := sn.Snapshot
		row.Name = to.Snapshot
		return &format.Event{Op: "rename", Snapshots: []format.Snapshot{row}}, nil
	})
	return wrapIf(err, "rename %s", from)
}

// Resize changes a volume's size. When a volume shrinks, it loses the data behind the new size (its snapshots keep
// theirs), so the caller must set shrink to confirm that.
func (s *Store) Resize(name string, size int64, shrink bool) error {
	err := s.resize(name, size, shrink)
	return wrapIf(err, "resize %s", name)
}

func (s *Store) resize(name string, size int64, shrink bool) error {
	var behind *Device
	var old int64
	err := s.transact(func() (*format.Event, error) {
		v, _, err := s.lookup(Ref{Volume: name})
		if err != nil {
			return nil, err
		}
		if err := errors.Join(v.received(), checkSize(size, v.LogicalBlock)); err != nil {
			return nil, err
		}
		switch {
		case size == v.Size:
			return nil, nil
		case size < v.Size && !shrink:
			return nil, fmt.Errorf("%d is smaller than the present %d, which would cut data off; say --shrink if that is meant: %w", size, v.Size, ErrInvalid)
		case size < v.Size && v.writer:
			return nil, fmt.Errorf("volume %s is open; detach it before it shrinks: %w", name, ErrBusy)
		case size < v.Size:
			old = v.Size
			behind = &Device{s: s, ref: Ref{Volume: name}, v: v, b: v.branch, asOf: head, noQuota: true}
			v.writer = true // nobody else may write while cutOff runs
			return nil, nil
		}
		row := v.Volume
		row.Size = size
		return &format.Event{Op: "resize", Volumes: []format.Volume{row}}, nil
	})
	if behind == nil {
		return err
	}
	defer func() {
		s.mu.Lock()
		behind.v.writer = false
		s.mu.Unlock()
	}()
	if err != nil {
		return err
	}
	return s.cutOff(behind, size, old)
}

// cutOff zeroes the data behind the new size, so that it does not come back when the volume grows again. Then it makes
// the volume smaller.
func (s *Store) cutOff(d *Device, size, old int64) error {
	if err := d.WriteZeroes(size, old-size, false); err != nil {
		return err
	}
	return s.transact(func() (*format.Event, error) {
		row := d.v.Volume
		row.Size = size
		return &format.Event{Op: "resize", Volumes: []format.Volume{row}}, nil
	})
}

// Remove deletes a snapshot, or a volume; with recursive set, it deletes the volume's snapshots too. Clones live on.
// Remove returns ErrBusy if the volume or snapshot is open, if a snapshot has holds, or if a volume has snapshots and
// recursive is not set. When it returns, the names are gone; the following checkpoints reclaim the space.
func (s *Store) Remove(r Ref, recursive bool) error {
	err := s.transact(func() (*format.Event, error) {
		v, sn, err := s.lookup(r)
		if err != nil {
			return nil, err
		}
		ev := &format.Event{Op: "remove"}
		if sn != nil {
			if sn.open > 0 {
				return nil, fmt.Errorf("it is open: %w", ErrBusy)
			}
			if err := errors.Join(held(v, sn), s.isBase(sn)); err != nil {
				return nil, err
			}
			ev.Snapshots = append(ev.Snapshots, unnamed(sn))
			return ev, nil
		}
		if v.writer || v.readers > 0 {
			return nil, fmt.Errorf("it is open; detach it first: %w", ErrBusy)
		}
		if len(v.snapshots) > 0 && !recursive {
			return nil, fmt.Errorf("it has snapshots (%s); -r removes them with it: %w", someNames(v), ErrBusy)
		}
		if err := errors.Join(held(v, slices.Collect(maps.Values(v.snapshots))...), s.needed(v)); err != nil {
			return nil, err
		}
		if len(v.snapshots) <= mostNamed {
			for _, sn := range v.snapshots {
				ev.Snapshots = append(ev.Snapshots, unnamed(sn))
			}
		}
		ev.DropVolumes = []uint32{v.ID}
		return ev, nil
	})
	if err == nil {
		wal.Poke(s.checkpoints.work) // the checkpoint reclaims the space
	}
	return wrapIf(err, "remove %s", r)
}

// mostNamed bounds the number of snapshots for which an event says that they are deleted with their volume. Replay
// deletes them in any case. Older versions of vdisk have to be told, but the size of an event is limited.
const mostNamed = 1000

// someNames returns the names of a volume's snapshots, or the first few and the number of the others.
func someNames(v *volume) string {
	const most = 5
	names := slices.Sorted(maps.Keys(v.snapshots))
	for i, name := range names[:min(most, len(names))] {
		names[i] = v.Name + "@" + name
	}
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func unnamed(sn *snapshot) format.Snapshot {
	row := sn.Snapshot
	row.Volume = 0
	return row
}
