package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/image"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) exportCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "export",
		Category:  groupData,
		Usage:     "export a volume or snapshot to an image",
		UsageText: "vdisk export VOL[@SNAP] FILE|- [--format FORMAT] [--options KEY=VALUE,...] [--compressed] [--salvage] [--force]",
		Description: "FILE appears when it is complete; a raw one is sparse. An existing FILE or a block device is overwritten only with --force,\n" +
			"and keeps its owner, mode and names; a block device that is in use is refused. - is standard output, which also gets the\n" +
			"zeros. A volume that is open for writing is refused: take a snapshot and export that. gzip, xz and zstd are the raw\n" +
			"image, compressed; the other formats are written by qemu-img, to a file.\n" +
			"With --salvage, what is damaged does not end the export: FILE gets zeros there and is kept, the lost ranges are listed\n" +
			"on standard error, or with --json on standard output, and the exit code is 6. It is for raw images, compressed or not.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "overwrite FILE"},
			&cli.StringFlag{Name: "format", Usage: "`FORMAT` of the image: " + image.Names(), Value: "raw"},
			&cli.StringFlag{Name: "options", Usage: "of a format that qemu-img writes, as `KEY=VALUE,...`: subformat=streamOptimized, for example"},
			&cli.BoolFlag{Name: "salvage", Usage: "write zeros where VOL is damaged, and list what is lost"},
			&cli.BoolFlag{Name: "compressed", Usage: "compress the data within the image, as qcow2 can"},
		},
	}, a.export)
}

// outputOf reads the flags that say how an image is written.
func outputOf(c *cli.Context) (o image.Output, err error) {
	if o.Format, err = image.Parse(c.String("format")); err != nil {
		return o, usageError{c, fmt.Errorf("--format: %w", err)}
	}
	o.Options, o.Compress = c.String("options"), c.Bool("compressed")
	if o.Format.IsStream() && (o.Options != "" || o.Compress) {
		return o, usageError{c, fmt.Errorf("--format %s: --options and --compressed are for formats that qemu-img writes", o.Format.Name)}
	}
	if err := o.Check(); err != nil {
		return o, usageError{c, fmt.Errorf("--options: %w", err)}
	}
	return o, nil
}

func (a *app) export(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	out, err := outputOf(c)
	if err != nil {
		return err
	}
	path := c.Args().Get(1)
	if path == "-" && !out.Format.IsStream() {
		return usagef("--format %s: such an image is written at random, and standard output is a stream: name a file", out.Format.Name)
	}
	if c.Bool("salvage") && !out.Format.IsStream() {
		return usageError{c, fmt.Errorf("--salvage writes a raw image, and not the format %s: convert that afterwards", out.Format.Name)}
	}
	write, err := a.target(c, path)
	if err != nil {
		return err
	}
	return a.lookLong(c, a.streaming(path == "-", func(s owner.Store) error {
		writeSource := func(src sparse.Source) error {
			bar := a.progress("exporting "+r.String(), src.Size())
			defer bar.finish()
			raw := rawDisk{src, bar.set}
			if out.Format.IsRaw() {
				return write(c.Context, raw)
			}
			return write(c.Context, packedDisk{raw, out.Format})
		}
		var err error
		switch {
		case c.Bool("salvage"):
			err = a.salvage(c, s, r, path, writeSource)
		case out.Format.IsStream():
			err = s.Export(c.Context, r, writeSource)
		default:
			err = a.exportImage(c.Context, s, r, out, write)
		}
		if err != nil {
			return fmt.Errorf("exporting %v to %s: %w", r, path, err)
		}
		if c.Bool("salvage") { // the list of what is lost has been printed
			return nil
		}
		return a.printExported(r, path)
	}))
}

// printExported prints as JSON what was written to a file. Standard output has the content itself.
func (a *app) printExported(r cow.Ref, path string) error {
	if path == "-" {
		return nil
	}
	return a.print(map[string]any{"exported": r.String(), "path": path}, func() error { return nil })
}

// target returns what writes to path: a file, which --force overwrites, or standard output.
func (a *app) target(c *cli.Context, path string) (sink, error) {
	switch {
	case path != "-":
		return toFile(path, c.Bool("force"))
	case isTerminal(rawOf(a.stdout)):
		return nil, usagef("standard output is a terminal: redirect it, or name a file")
	}
	return a.toStdout, nil
}

// streaming is do for a command that writes its content to standard output, if toStdout says so. It closes standard output
// when do has ended, well or not. The command that reads the content may use the store through this process, which ends
// only when that command has ended, and that command waits for the end of its input.
func (a *app) streaming(toStdout bool, do func(owner.Store) error) func(owner.Store) error {
	return func(s owner.Store) error {
		err := do(s)
		if f, ok := rawOf(a.stdout).(io.Closer); ok && toStdout {
			err = errors.Join(err, f.Close())
		}
		return err
	}
}

func (a *app) toStdout(ctx context.Context, c exported) error {
	w := bufio.NewWriterSize(rawOf(a.stdout), 256<<10)
	if err := c.toStream(ctx, w); err != nil {
		return err
	}
	return w.Flush()
}
