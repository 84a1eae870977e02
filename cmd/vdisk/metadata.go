package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
)

func (a *app) metadataCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "metadata",
		Category:  groupMaintenance,
		Usage:     "make a lost or damaged table of blocks anew",
		UsageText: "vdisk metadata rebuild [--force]",
		Description: "rebuild makes the store's table, meta.db, anew from its second copy and the log, when it is missing, empty, cut, damaged\n" +
			"or an older one. The new table is proved to belong to the log and the chunks before anything is changed. The old one stays\n" +
			"as meta.db.aside-N. No process may have the store open. A sound table is left alone, unless --force is given; --force also\n" +
			"takes a table although chunk files are missing.\n" +
			"Exit codes: 0 the table was replaced, 1 it is sound, 3 there is no copy, 5 the store is in use, 6 the copy is damaged too,\n" +
			"or does not belong to the log.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Usage: "replace a table that is sound, or though chunk files are missing"}},
	}, func(c *cli.Context) error {
		if what := c.Args().First(); what != "rebuild" {
			return usageError{c, fmt.Errorf("%q: rebuild is possible", what)}
		}
		r, err := cow.RebuildTable(a.dir, c.Bool("force"), a.repairOptions())
		if err != nil {
			return err
		}
		return a.printRebuilt(r)
	})
}

func (a *app) repairOptions() cow.Options {
	return cow.Options{LockTimeout: a.lockTimeout, Logger: a.log, CacheBytes: a.cacheBytes, Foreign: a.foreign, ForgetElsewhere: true}
}

func (a *app) printRebuilt(r *cow.Rebuilt) error {
	return a.print(r, func() error {
		why, aside := "it was sound", "there was no old table"
		if r.Why != "" {
			why = r.Why
		}
		if r.Aside != "" {
			aside = "the old table is kept as " + r.Aside
		}
		_, err := fmt.Fprintf(a.stdout, "the table was replaced: %s\nmade from %s: %d rows, as of record %d; the log has %d records more; %d volumes, %d snapshots\n%s\n",
			why, r.From, r.Rows, r.Record, r.Replayed, r.Volumes, r.Snapshots, aside)
		return err
	})
}
