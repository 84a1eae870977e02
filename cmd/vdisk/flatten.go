package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// flattenedJSON is a volume that was flattened, in the JSON output.
type flattenedJSON struct {
	Name   string `json:"name"`
	Origin string `json:"origin"` // before: VOL@SNAP, "(deleted)", or empty if there was none
	Blocks uint64 `json:"blocks"` // of 4096 bytes, copied
	Bytes  int64  `json:"bytes"`  // that they take, after compression
}

func (a *app) flattenCommand() *cli.Command {
	return a.command(arity{1, -1}, &cli.Command{
		Name:      "flatten",
		Category:  groupVolumes,
		Usage:     "make clones independent of their origin",
		UsageText: "vdisk flatten VOL... | --all VOL@SNAP",
		Description: "Copies the blocks that a volume shares with the snapshot at which it began, as they are stored, and then forgets the\n" +
			"snapshot. So when that is removed, its space comes back. The volume may be in use. If it is interrupted, the volume stays a\n" +
			"clone, and flatten goes on when it is given again.\n" +
			"A volume that has had snapshots since it began is refused (5), because they share blocks with the origin, too.\n" +
			"There is no 'promote': a snapshot and its volume can be removed while clones of them live on.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "flatten all volumes that began at the snapshot"}},
	}, func(c *cli.Context) error {
		if c.Bool("all") {
			if c.NArg() > 1 {
				return usageError{c, fmt.Errorf("--all takes one snapshot")}
			}
			r, err := snapshotRef(c, 0)
			if err != nil {
				return err
			}
			return a.during(c, func(s owner.Store) error { return a.flattenChildren(c, s, r) })
		}
		names, err := argsFrom(c, 0, volumeName)
		if err != nil {
			return err
		}
		return a.during(c, func(s owner.Store) error { return a.flatten(c, s, names) })
	})
}

// flattenChildren flattens all volumes that began at a snapshot, also its own volume after a rollback.
func (a *app) flattenChildren(c *cli.Context, s owner.Store, r cow.Ref) error {
	v, err := s.Volume(c.Context, r.Volume)
	if err != nil {
		return err
	}
	for _, sn := range v.Snapshots {
		if sn.Name != r.Snapshot {
			continue
		}
		names := append([]string{}, sn.Clones...)
		if v.Origin == r.String() {
			names = append(names, v.Name)
		}
		return a.flatten(c, s, names)
	}
	return fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
}

// flatten flattens volumes, one after the other. It ends with the first that fails, and prints what it has done.
func (a *app) flatten(c *cli.Context, s owner.Store, names []string) (err error) {
	list := []flattenedJSON{}
	for _, name := range names {
		var rep cow.FlattenReport
		if rep, err = s.Flatten(c.Context, name); err != nil {
			break
		}
		list = append(list, flattenedJSON{name, rep.Origin, rep.Blocks, rep.Bytes})
	}
	perr := a.print(map[string]any{"flattened": list}, func() error {
		for _, f := range list {
			if f.Origin == "" {
				a.note("%s has no origin", f.Name)
				continue
			}
			if _, err := fmt.Fprintf(a.stdout, "%s does not need %s any more: %s copied\n", f.Name, f.Origin, a.size(f.Bytes)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = perr
	}
	return partly(err)
}
