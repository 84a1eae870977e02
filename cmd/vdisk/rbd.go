package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) exportDiffCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "export-diff",
		Category:  groupData,
		Usage:     "export what changed since a snapshot, in the format of 'rbd export-diff'",
		UsageText: "vdisk export-diff [--from [VOL]@A] VOL[@B] FILE|- [--force]",
		Description: "Writes what differs from the snapshot A to the snapshot B, or to the volume as it is now, in version 1 of the format of\n" +
			"Ceph's 'rbd export-diff'; 'rbd import-diff' and 'vdisk import-diff' apply it. Without --from it is everything. A of\n" +
			"another volume is possible if that is where the volume was cloned from. Only what changed is read. FILE appears when it\n" +
			"is complete; an existing one is overwritten only with --force. - is standard output. A volume that is open for writing\n" +
			"is refused. The format has no checksums: keep such files where they cannot be damaged, or compress them.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "the snapshot `[VOL]@A` that the other side has"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "overwrite FILE"},
		},
	}, a.exportDiff)
}

func (a *app) exportDiff(c *cli.Context) error {
	to, err := ref(c, 0)
	if err != nil {
		return err
	}
	var from cow.Ref
	if c.IsSet("from") {
		if from, err = baseRef(c, "from", to.Volume); err != nil {
			return err
		}
	}
	path := c.Args().Get(1)
	write, err := a.target(c, path)
	if err != nil {
		return err
	}
	return a.lookLong(c, a.streaming(path == "-", func(s owner.Store) error {
		err := s.ExportDiff(c.Context, from, to, func(src sparse.Source) error {
			bar := a.progress("exporting "+to.String(), -1)
			defer bar.finish()
			return write(c.Context, rawDisk{src, bar.set})
		})
		if err != nil {
			return fmt.Errorf("exporting %v to %s: %w", to, path, err)
		}
		return a.printExported(to, path)
	}))
}

func (a *app) importDiffCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "import-diff",
		Category:  groupData,
		Usage:     "apply what 'vdisk export-diff' or 'rbd export-diff' wrote",
		UsageText: "vdisk import-diff FILE|- VOL [--force] [--compress none|s2|zstd[:N]] [--logical-block 512|4096]",
		Description: "VOL must have the snapshot from which the difference goes, and must not be open, nor have changed since that snapshot;\n" +
			"--force gives up what has changed. At the end VOL has the size and the content of the snapshot to which the difference\n" +
			"goes, and that snapshot. A difference from nothing makes a new volume, which appears when it is complete; --compress\n" +
			"and --logical-block are for it. If the import fails or is interrupted, VOL is as the snapshot is, or does not exist. Only\n" +
			"if vdisk is killed meanwhile, VOL may have a part of the difference: then --force, or 'vdisk rollback', goes back.",
		Flags: append(volumeFlags(), &cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "give up what has changed in VOL since the snapshot"}),
	}, a.importDiff)
}

// importedDiffJSON is the result of import-diff in the JSON output.
type importedDiffJSON struct {
	Volume   string `json:"volume"`
	Size     int64  `json:"size"`
	Snapshot string `json:"snapshot"` // VOL@SNAP that was made, or empty
}

func (a *app) importDiff(c *cli.Context) error {
	name, err := volumeName(c, 1)
	if err != nil {
		return err
	}
	o, err := volumeOptions(c)
	if err != nil {
		return err
	}
	path := c.Args().First()
	in, done, err := a.input(c, path, "'vdisk export-diff', or to a file with a difference")
	if err != nil {
		return err
	}
	defer done()
	return a.duringNew(c, func(s owner.Store) error {
		bar := a.progress("importing into "+name, -1)
		d, err := s.ImportDiff(c.Context, name, o, c.Bool("force"), sparse.FromStream(in), bar.set)
		bar.finish()
		if err != nil {
			return fmt.Errorf("importing %s: %w", path, err)
		}
		j := importedDiffJSON{Volume: name, Size: d.Volume.Size}
		if d.Snapshot != "" {
			j.Snapshot = cow.Ref{Volume: name, Snapshot: d.Snapshot}.String()
		}
		return a.print(j, func() error {
			what := j.Snapshot
			if what == "" {
				what = name
			}
			_, err := fmt.Fprintf(a.stdout, "%s (%s)\n", what, a.size(j.Size))
			return err
		})
	})
}
