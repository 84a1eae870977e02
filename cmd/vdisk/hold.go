package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) holdCommand() *cli.Command {
	return a.command(arity{2, -1}, &cli.Command{
		Name:      "hold",
		Category:  groupVolumes,
		Usage:     "keep snapshots from being removed",
		UsageText: "vdisk hold TAG VOL@SNAP...",
		Description: "Each hold of a snapshot has a tag, which says what the snapshot is kept for. As long as it has holds, it cannot be removed,\n" +
			"nor its volume. A rollback, renaming and sending are no removal. All named snapshots get the hold in one step, or none.\n" + patternHelp,
	}, a.changeHolds(owner.Store.Hold))
}

func (a *app) releaseCommand() *cli.Command {
	return a.command(arity{2, -1}, &cli.Command{
		Name:        "release",
		Category:    groupVolumes,
		Usage:       "give up a hold of snapshots",
		UsageText:   "vdisk release TAG VOL@SNAP...",
		Description: "All named snapshots lose the hold in one step, or none. The snapshots stay.\n" + patternHelp,
	}, a.changeHolds(owner.Store.Release))
}

// changeHolds returns the action of hold and release.
func (a *app) changeHolds(change func(owner.Store, context.Context, string, ...cow.Ref) error) func(*cli.Context) error {
	return func(c *cli.Context) error {
		patterns, err := argsFrom(c, 1, snapshotPattern)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			refs, err := expand(c, s, patterns)
			if err != nil {
				return err
			}
			err = change(s, c.Context, c.Args().First(), refs...)
			if errors.Is(err, cow.ErrNotFound) && c.Command.Name == "release" {
				return hintedError{err, "'vdisk holds' lists the holds, and 'vdisk ls -t all' what there is"}
			}
			if errors.Is(err, cow.ErrExists) { // to remove the snapshot is not the way out
				return hintedError{err, "'vdisk holds' lists the holds; a snapshot may have several, with different tags"}
			}
			if err != nil {
				return err
			}
			return a.printSnapshots(c, s, refs)
		})
	}
}

func (a *app) holdsCommand() *cli.Command {
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "holds",
		Category:  groupVolumes,
		Usage:     "list the holds of snapshots",
		UsageText: "vdisk holds [-H] [VOL[@SNAP]...]",
		Flags:     []cli.Flag{&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"}},
	}, func(c *cli.Context) error {
		patterns, err := argsFrom(c, 0, parsePattern)
		if err != nil {
			return err
		}
		return a.look(c, func(s owner.Store) error {
			refs, err := expand(c, s, patterns)
			if err != nil {
				return err
			}
			list, err := holdsOf(c, s, refs)
			if err != nil {
				return err
			}
			var rows [][]string
			for _, h := range list {
				rows = append(rows, []string{h.Snapshot, h.Tag, when(h.Created)})
			}
			return a.print(map[string]any{"holds": list}, func() error {
				return a.table(headings("SNAPSHOT", "TAG", "CREATED"), rows, c.Bool("script"))
			})
		})
	})
}

// holdsOf returns the holds of the named snapshots and of those of the named volumes, or of all snapshots.
func holdsOf(c *cli.Context, s owner.Store, refs []cow.Ref) ([]holdJSON, error) {
	list := []holdJSON{}
	add := func(v owner.Volume, name string) (found bool) {
		for _, sn := range v.Snapshots {
			if name != "" && name != sn.Name {
				continue
			}
			found = true
			for _, h := range sn.Holds {
				list = append(list, holdJSON{cow.Ref{Volume: v.Name, Snapshot: sn.Name}.String(), h.Tag, h.Created.UTC()})
			}
		}
		return found
	}
	if len(refs) == 0 {
		all, err := s.Volumes(c.Context)
		for _, v := range all {
			add(v, "")
		}
		return list, err
	}
	for _, r := range refs {
		v, err := s.Volume(c.Context, r.Volume)
		if err != nil {
			return nil, err
		}
		if !add(v, r.Snapshot) && r.Snapshot != "" {
			return nil, fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
		}
	}
	return list, nil
}
