package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/retention"
)

// allFlag and policyFlag choose volumes for the commands that work on many.
func allFlag() cli.Flag { return &cli.BoolFlag{Name: "all", Usage: "all volumes"} }

func policyFlag(usage string) cli.Flag { return &cli.BoolFlag{Name: "policy", Usage: usage} }

// autoTries is how often the volumes are looked up again because one of them has gone meanwhile.
const autoTries = 3

// snapshotAuto takes snapshots that are named by the time.
func (a *app) snapshotAuto(c *cli.Context) error {
	patterns, err := argsFrom(c, 0, parsePattern)
	if err != nil {
		return err
	}
	chosen := 0
	for _, is := range []bool{len(patterns) > 0, c.Bool("all"), c.Bool("policy")} {
		if is {
			chosen++
		}
	}
	if chosen != 1 {
		return usageError{c, errors.New("--auto needs volumes: name some, or say --all or --policy")}
	}
	for _, p := range patterns {
		if p.at {
			return usageError{c, fmt.Errorf("%s is a snapshot; --auto needs volumes, and names the snapshots itself", p.text)}
		}
	}
	return a.with(c, func(s owner.Store) error {
		for try := 1; ; try++ {
			names, err := chosenVolumes(c, s, patterns)
			if err != nil {
				return err
			}
			var r cow.AutoReport
			wanted := make([]cow.Ref, len(names))
			for i, name := range names {
				wanted[i].Volume = name
			}
			err = a.frozen(c, s, wanted, func(ctx context.Context) (_ []cow.Ref, err error) {
				r, err = s.SnapshotAuto(ctx, names...)
				return r.Taken, err
			})
			// A volume has gone since the look at the store. The next look fails if its name was given, and leaves it out
			// if not.
			if errors.Is(err, cow.ErrNotFound) && try < autoTries {
				continue
			}
			if err != nil {
				return err
			}
			if len(names) == 0 && c.Bool("policy") {
				a.noPolicy()
			}
			return a.printAuto(c, s, r)
		}
	})
}

func (a *app) noPolicy() {
	a.note("no volume has a policy ('vdisk set VOL %s=daily=7')", retention.Property)
}

// chosenVolumes returns the names of the volumes that the patterns, --all or --policy choose, each once.
func chosenVolumes(c *cli.Context, s owner.Store, patterns []pattern) (names []string, err error) {
	if len(patterns) > 0 {
		refs, err := expand(c, s, patterns)
		seen := map[string]bool{}
		for _, r := range refs {
			if !seen[r.Volume] {
				seen[r.Volume] = true
				names = append(names, r.Volume)
			}
		}
		return names, err
	}
	all, err := s.Volumes(c.Context)
	for _, v := range all {
		if v.Receiving == nil && (c.Bool("all") || v.Properties[retention.Property] != "") {
			names = append(names, v.Name)
		}
	}
	return names, err
}

// printAuto prints the names of new snapshots, and says which volumes have none because they have not changed.
func (a *app) printAuto(c *cli.Context, s owner.Store, r cow.AutoReport) error {
	if a.json {
		list, err := newSnapshots(c, s, r.Taken)
		if err != nil {
			return err
		}
		return a.print(map[string]any{"snapshots": list, "unchanged": texts(r.Unchanged)}, nil)
	}
	for _, ref := range r.Taken {
		if _, err := fmt.Fprintln(a.stdout, ref); err != nil {
			return err
		}
	}
	const most = 5
	switch n := len(r.Unchanged); {
	case n > most:
		a.note("%d volumes are as their newest snapshots, and get none: %s and %d more", n, strings.Join(texts(r.Unchanged[:most]), ", "), n-most)
	default:
		for _, ref := range r.Unchanged {
			a.note("%s has not changed since %s, and gets no snapshot", ref.Volume, ref)
		}
	}
	return nil
}

func texts(refs []cow.Ref) []string {
	list := []string{}
	for _, r := range refs {
		list = append(list, r.String())
	}
	return list
}
