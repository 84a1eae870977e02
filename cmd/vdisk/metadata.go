package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) metadataCommand() *cli.Command {
	return a.command(arity{1, 2}, &cli.Command{
		Name:      "metadata",
		Category:  groupMaintenance,
		Usage:     "make a lost or damaged table of blocks anew, or save it as text",
		UsageText: "vdisk metadata rebuild [--force]\n   vdisk metadata dump FILE|- [--force]\n   vdisk metadata restore FILE|- [--force]",
		Description: "rebuild makes the store's table, meta.db, anew from its second copy and the log, when it is missing, empty, cut, damaged\n" +
			"or an older one. The new table is proved to belong to the log and the chunks before anything is changed. The old one stays\n" +
			"as meta.db.aside-N. No process may have the store open. A sound table is left alone, unless --force is given; --force also\n" +
			"takes a table although chunk files are missing.\n" +
			"dump writes the table as text, a JSON object a line, and restore makes it anew from that text, with the same proof. So\n" +
			"text that is older than the last table is refused: dump again after changes. With dump, --force replaces FILE.\n" +
			"Exit codes: 0 the table was replaced or written, 1 it is sound, 3 there is no copy, 4 FILE exists, 5 the store is in use,\n" +
			"6 the copy or the text is damaged too, or does not belong to the log.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Usage: "replace a table that is sound, or though chunk files are missing; dump: replace FILE"}},
	}, a.metadata)
}

func (a *app) metadata(c *cli.Context) error {
	what, path := c.Args().Get(0), c.Args().Get(1)
	switch {
	case what == "rebuild" && c.NArg() == 1:
		r, err := owner.RebuildTable(a.dir, c.Bool("force"), a.repairOptions())
		if err != nil {
			return err
		}
		return a.printRebuilt(r)
	case what == "dump" && c.NArg() == 2:
		return a.dumpTable(c, path)
	case what == "restore" && c.NArg() == 2:
		return a.restoreTable(c, path)
	}
	return usageError{c, fmt.Errorf("%q: rebuild, dump FILE and restore FILE are possible", what)}
}

func (a *app) dumpTable(c *cli.Context, path string) error {
	write := a.toStdout
	if path != "-" {
		var err error
		if write, err = toFile(path, c.Bool("force")); err != nil {
			return err
		}
	}
	return a.lookLong(c, a.streaming(path == "-", func(s owner.Store) error {
		if err := write(c.Context, tableText{s}); err != nil || path == "-" {
			return err
		}
		return a.print(map[string]any{"path": path}, func() error { return nil })
	}))
}

// tableText is the table as text.
type tableText struct{ s owner.Store }

func (t tableText) toFile(ctx context.Context, f *os.File) error {
	if err := t.s.DumpTable(ctx, f); err != nil {
		return err
	}
	return f.Sync()
}

func (t tableText) toStream(ctx context.Context, w io.Writer) error { return t.s.DumpTable(ctx, w) }
func (t tableText) size() int64                                     { return 0 }

func (a *app) restoreTable(c *cli.Context, path string) error {
	in, done, err := a.input(c, path, "a file that 'vdisk metadata dump' wrote")
	if err != nil {
		return err
	}
	defer done()
	r, err := owner.RestoreTable(a.dir, path, bufio.NewReaderSize(in, 1<<20), c.Bool("force"), a.repairOptions())
	if err != nil {
		return err
	}
	return a.printRebuilt(r)
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
