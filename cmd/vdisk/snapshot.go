package main

import (
	"context"
	"errors"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/retention"
)

func (a *app) snapshotCommand() *cli.Command {
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "snapshot",
		Category:  groupVolumes,
		Usage:     "take snapshots, all at the same moment",
		UsageText: "vdisk snapshot VOL@SNAP... [--freeze MOUNTPOINT] | --auto {VOL...|--all|--policy} [--freeze MOUNTPOINT]",
		Description: "Several snapshots are taken in one atomic step: all of them or none. They contain every write that had been acknowledged.\n" +
			"VOL may have wildcards (*, ?, [a-z]; quote them from the shell): each volume that matches gets a snapshot.\n" +
			"With --auto, the snapshots are named by the time in UTC, as in auto-20261130T125143Z, and their names are printed. A volume\n" +
			"that has not changed since its newest snapshot gets none. 'vdisk prune' removes such snapshots by rules.\n" +
			"With --freeze, the data of the mounted file system is written first, and nobody writes until the snapshot is taken, so that\n" +
			"the snapshot can be mounted as it is. It needs root. The file system is thawed in any case; if vdisk itself was killed:\n" +
			"fsfreeze --unfreeze MOUNTPOINT.",
		Flags: append(freezeFlags(),
			&cli.BoolFlag{Name: "auto", Usage: "name the snapshots by the time, and leave out volumes that have not changed"},
			allFlag(),
			policyFlag("all volumes that have a policy, the property "+retention.Property)),
	}, func(c *cli.Context) error {
		switch {
		case c.Bool("auto"):
			return a.snapshotAuto(c)
		case c.Bool("all") || c.Bool("policy"):
			return usageError{c, errors.New("--all and --policy go with --auto")}
		case c.NArg() == 0:
			return usageError{c, errors.New(miscounted(0, arity{1, -1}))}
		}
		patterns, err := argsFrom(c, 0, newSnapshot)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			refs, err := expandVolumes(c, s, patterns)
			if err != nil {
				return err
			}
			err = a.frozen(c, s, refs, func(ctx context.Context) ([]cow.Ref, error) { return refs, s.Snapshot(ctx, refs...) })
			if err != nil {
				return err
			}
			return a.printSnapshots(c, s, refs)
		})
	})
}

// printSnapshots prints new snapshots as JSON. Without --json it prints nothing.
func (a *app) printSnapshots(c *cli.Context, s owner.Store, refs []cow.Ref) error {
	if !a.json {
		return nil
	}
	list, err := newSnapshots(c, s, refs)
	if err != nil {
		return err
	}
	return a.print(map[string]any{"snapshots": list}, nil)
}

// newSnapshots returns new snapshots, as far as they are still there.
func newSnapshots(c *cli.Context, s owner.Store, refs []cow.Ref) ([]snapshotJSON, error) {
	list := []snapshotJSON{}
	for _, r := range refs {
		v, err := s.Volume(c.Context, r.Volume)
		if err != nil {
			return nil, err
		}
		for _, sn := range v.Snapshots {
			if sn.Name == r.Snapshot {
				list = append(list, snapshotOf(v, sn))
			}
		}
	}
	return list, nil
}

func (a *app) cloneCommand() *cli.Command {
	return a.command(arity{2, -1}, &cli.Command{
		Name:      "clone",
		Category:  groupVolumes,
		Usage:     "create volumes from a snapshot",
		UsageText: "vdisk clone VOL@SNAP NEW...",
		Description: "A clone takes no space until it is written to. It stays when the snapshot or its volume is removed. Several are made\n" +
			"in one atomic step: all of them or none.",
	}, func(c *cli.Context) error {
		from, err := snapshotRef(c, 0)
		if err != nil {
			return err
		}
		names, err := argsFrom(c, 1, volumeName)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			if err := s.Clone(c.Context, from, names...); err != nil {
				return err
			}
			return a.printClones(c, s, names)
		})
	})
}

// printClones prints new volumes as JSON: one as itself, several as a list. Without --json it prints nothing.
func (a *app) printClones(c *cli.Context, s owner.Store, names []string) error {
	if !a.json {
		return nil
	}
	list := []volumeJSON{}
	for _, name := range names {
		v, err := s.Volume(c.Context, name)
		if err != nil {
			return err
		}
		list = append(list, volumeOf(v))
	}
	if len(list) == 1 {
		return a.print(list[0], nil)
	}
	return a.print(map[string]any{"volumes": list}, nil)
}

func (a *app) rollbackCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:        "rollback",
		Category:    groupVolumes,
		Usage:       "return a volume to the content of one of its snapshots",
		UsageText:   "vdisk rollback VOL@SNAP",
		Description: "Writes since the snapshot are lost, unless another snapshot has them. All snapshots stay, newer ones too.",
	}, func(c *cli.Context) error {
		to, err := snapshotRef(c, 0)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			if err := s.Rollback(c.Context, to); err != nil {
				return err
			}
			return a.printChanged(c, s, to.Volume)
		})
	})
}

func (a *app) renameCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "rename",
		Category:  groupVolumes,
		Usage:     "rename a volume or a snapshot",
		UsageText: "vdisk rename VOL NEW | VOL@SNAP VOL@NEW",
	}, func(c *cli.Context) error {
		from, err := ref(c, 0)
		if err != nil {
			return err
		}
		to, err := ref(c, 1)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			err := s.Rename(c.Context, from, to)
			switch {
			case err != nil:
				return err
			case to.Snapshot != "":
				return a.printSnapshots(c, s, []cow.Ref{to})
			}
			return a.printChanged(c, s, to.Volume)
		})
	})
}

func (a *app) resizeCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "resize",
		Category:  groupVolumes,
		Usage:     "change the size of a volume",
		UsageText: "vdisk resize VOL SIZE|+SIZE [--shrink]",
		Description: "+SIZE makes the volume larger by SIZE.\n" +
			"NBD clients see the new size when they reconnect. An attached block device grows at once (Linux 6.16).\n" +
			"Shrinking cuts off the data behind the new end; snapshots keep it.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "shrink", Usage: "allow a smaller size"}},
	}, func(c *cli.Context) error {
		name, err := volumeName(c, 0)
		if err != nil {
			return err
		}
		text, more := strings.CutPrefix(c.Args().Get(1), "+")
		size, err := a.sizeBetween("size", text, 512, cow.MaxVolume)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			if more {
				v, err := s.Volume(c.Context, name)
				if err != nil {
					return err
				}
				if size += v.Size; size > cow.MaxVolume {
					return usagef("size %s: the volume would have %s, and the most is %s", c.Args().Get(1), a.size(size), a.size(cow.MaxVolume))
				}
			}
			if err := s.Resize(c.Context, name, size, c.Bool("shrink")); err != nil {
				return err
			}
			return a.printChanged(c, s, name)
		})
	})
}
