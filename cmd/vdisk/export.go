package main

import (
	"bufio"
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) exportCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "export",
		Category:  groupData,
		Usage:     "export a volume or snapshot to a raw image",
		UsageText: "vdisk export VOL[@SNAP] FILE|- [--force]",
		Description: "FILE is sparse, and appears when it is complete. An existing FILE or a block device is overwritten only with --force,\n" +
			"and keeps its owner, mode and names; a block device that is in use is refused. - is standard output, which also gets the\n" +
			"zeros. A volume that is open for writing is refused: take a snapshot and export that.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "overwrite FILE"}},
	}, a.export)
}

func (a *app) export(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	path := c.Args().Get(1)
	write := a.toStdout
	if path == "-" {
		if isTerminal(rawOf(a.stdout)) {
			return usagef("standard output is a terminal: redirect it, or name a file")
		}
	} else {
		if write, err = toFile(path, c.Bool("force")); err != nil {
			return err
		}
	}
	o := a.options(c)
	o.Offer, o.Temporary, o.Look = true, true, true
	return use(func(s owner.Store) error {
		err := s.Export(c.Context, r, func(src sparse.Source) error {
			bar := a.progress("exporting "+r.String(), src.Size())
			defer bar.finish()
			return write(c.Context, src, bar.set)
		})
		if err != nil {
			return fmt.Errorf("exporting %v to %s: %w", r, path, err)
		}
		return nil
	})(owner.Open(c.Context, a.dir, o))
}

// sink writes the content of a disk somewhere.
type sink func(ctx context.Context, src sparse.Source, progress func(int64)) error

func (a *app) toStdout(ctx context.Context, src sparse.Source, progress func(int64)) error {
	w := bufio.NewWriterSize(rawOf(a.stdout), 256<<10)
	if err := sparse.WriteTo(ctx, w, src, progress); err != nil {
		return err
	}
	return w.Flush()
}
