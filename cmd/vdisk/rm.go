package main

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) rmCommand() *cli.Command {
	return a.command(arity{1, -1}, &cli.Command{
		Name:      "rm",
		Category:  groupVolumes,
		Usage:     "remove volumes and snapshots",
		UsageText: "vdisk rm VOL[@SNAP]... [-r] [-n]",
		Description: "Clones of a removed volume or snapshot stay. Space is reclaimed in the background. If one of several cannot be\n" +
			"removed, none is. A snapshot with holds cannot be removed ('vdisk hold').\n" + patternHelp,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "also remove the volume's snapshots"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "show what would be removed, and remove nothing"},
		},
	}, func(c *cli.Context) error {
		patterns, err := argsFrom(c, 0, parsePattern)
		if err != nil {
			return err
		}
		return a.with(c, func(s owner.Store) error {
			refs, err := expand(c, s, patterns)
			if err != nil {
				return err
			}
			if c.Bool("dry-run") {
				return a.wouldRemove(c, s, refs)
			}
			return a.remove(c, s, refs)
		})
	})
}

// remove removes all of the refs. If one of them cannot be removed, it returns the reason and removes none. A change
// between the check and the removal may still stop it halfway; then the error names what has been removed.
func (a *app) remove(c *cli.Context, s owner.Store, refs []cow.Ref) error {
	if len(refs) > 1 {
		if _, err := removals(c, s, refs); err != nil {
			return fmt.Errorf("nothing was removed: %w", err)
		}
	}
	gone := map[cow.Ref]bool{}
	removed := []string{}
	for i, r := range refs {
		if gone[r] || gone[cow.Ref{Volume: r.Volume}] {
			continue // named twice
		}
		if err := s.Remove(c.Context, r, c.Bool("recursive")); err != nil {
			if i > 0 {
				err = fmt.Errorf("%w (removed before: %s)", err, strings.Join(removed, ", "))
			}
			return err
		}
		gone[r] = true
		removed = append(removed, r.String())
	}
	return a.print(map[string]any{"removed": removed}, func() error { return nil })
}

// wouldRemove prints what removing the refs would remove, and fails if removing them would fail.
func (a *app) wouldRemove(c *cli.Context, s owner.Store, refs []cow.Ref) error {
	gone, rerr := removals(c, s, refs)
	err := a.print(map[string]any{"would_remove": gone}, func() error {
		for _, name := range gone {
			if _, err := fmt.Fprintln(a.stdout, name); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(rerr, err)
}

// removals returns what removing the refs, one after the other, would remove, and why it would fail.
func removals(c *cli.Context, s owner.Store, refs []cow.Ref) ([]string, error) {
	list := []string{}
	gone := map[string]bool{}
	var errs []error
	for _, r := range refs {
		if gone[r.String()] || gone[r.Volume] {
			continue // named twice
		}
		names, err := removal(c, s, r, gone)
		errs = append(errs, err)
		for _, name := range names {
			gone[name] = true
			list = append(list, name)
		}
	}
	return list, errors.Join(errs...)
}

// removal returns what would be removed with r once everything in gone has been removed.
func removal(c *cli.Context, s owner.Store, r cow.Ref, gone map[string]bool) ([]string, error) {
	v, err := s.Volume(c.Context, r.Volume)
	if err != nil {
		return nil, err
	}
	var snapshots []string
	var heldErr error
	for _, sn := range v.Snapshots {
		if sn.Name == r.Snapshot {
			return []string{r.String()}, held(r, sn)
		}
		if name := (cow.Ref{Volume: r.Volume, Snapshot: sn.Name}).String(); !gone[name] {
			snapshots = append(snapshots, name)
			heldErr = cmp.Or(heldErr, held(cow.Ref{Volume: r.Volume, Snapshot: sn.Name}, sn))
		}
	}
	switch {
	case r.Snapshot != "":
		return nil, fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
	case v.Open > 0:
		return nil, fmt.Errorf("volume %v is open: %w", r, cow.ErrBusy)
	case len(snapshots) > 0 && !c.Bool("recursive"):
		return nil, fmt.Errorf("volume %v has snapshots (%s), which -r removes with it: %w", r, strings.Join(snapshots, ", "), cow.ErrBusy)
	}
	return append(snapshots, r.Volume), heldErr
}

// held returns an error if a snapshot has holds.
func held(r cow.Ref, sn cow.SnapshotInfo) error {
	if len(sn.Holds) == 0 {
		return nil
	}
	var tags []string
	for _, h := range sn.Holds {
		tags = append(tags, h.Tag)
	}
	return cow.HeldError(r, tags)
}
