package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) importCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "import",
		Category:  groupData,
		Usage:     "import a raw image as a new volume",
		UsageText: "vdisk import FILE|- VOL [--format raw] [--compress none|s2|zstd[:N]] [--logical-block 512|4096]",
		Description: "FILE is a raw image, a block device, or - for standard input. The volume must not exist. It appears when all of its\n" +
			"content is durable, and has the size of the content, rounded up to a logical block. For other formats use\n" +
			"qemu-img convert FILE nbd+unix:///VOL?socket=..., with a volume that is served.",
		Flags: append(volumeFlags(), formatFlag()),
	}, func(c *cli.Context) error {
		name, err := volumeName(c, 1)
		if err != nil {
			return err
		}
		o, err := volumeOptions(c)
		if err != nil {
			return err
		}
		return a.importFrom(c, c.Args().First(), name, o)
	})
}

// formatFlag returns the --format flag of commands that read an image.
func formatFlag() cli.Flag {
	return &cli.StringFlag{Name: "format", Usage: "raw: import the file as it is, even if it looks like an image of another format"}
}

// importFrom makes a volume from the content at path. If o.Size is 0, the content's size is used.
func (a *app) importFrom(c *cli.Context, path, name string, o cow.VolumeOptions) error {
	if f := c.String("format"); f != "" && f != "raw" {
		return usageError{c, fmt.Errorf("--format %s: only raw is possible; convert others with qemu-img", f)}
	}
	src, closeSource, err := a.source(c.Context, path, c.IsSet("format"))
	if err != nil {
		return err
	}
	defer closeSource()
	if src.Size() == 0 && o.Size == 0 { // the owner refuses it, too, but would have created the store
		return usagef("%s is empty, and a volume has at least one block: give --size with 'vdisk create'", path)
	}
	return a.duringNew(c, func(s owner.Store) error {
		bar := a.progress("importing "+name, src.Size())
		v, err := s.Import(c.Context, name, o, src, bar.set)
		bar.finish()
		if err != nil {
			return fmt.Errorf("importing %s: %w", path, err)
		}
		if o.Size == 0 && v.Size != src.Size() {
			a.note("%s has %d bytes; volume %s has %d, a multiple of %d", path, src.Size(), name, v.Size, v.LogicalBlock)
		}
		return a.printVolume(owner.Volume{VolumeInfo: v})
	})
}

// source opens the content to import. The caller calls the returned function when done with it. A file, a block device,
// a FIFO and standard input are all checked in the same way.
func (a *app) source(ctx context.Context, path string, raw bool) (sparse.Source, func(), error) {
	if path == "-" {
		if isTerminal(a.stdin) {
			return nil, nil, usagef("standard input is a terminal: connect it to an image")
		}
		src, err := content(ctx, a.stdin, "standard input", raw)
		return src, func() {}, err
	}
	f, err := openPatiently(ctx, path, os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	src, err := content(ctx, f, path, raw)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return src, func() { _ = f.Close() }, nil
}

// content returns the content of a file or stream from its present offset. With raw, any format is accepted.
func content(ctx context.Context, f *os.File, name string, raw bool) (sparse.Source, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return nil, fmt.Errorf("%s is a folder, and a raw image is needed", name)
	}
	if fi.Mode()&(os.ModeNamedPipe|os.ModeCharDevice|os.ModeSocket) == 0 {
		if at, err := f.Seek(0, io.SeekCurrent); err == nil && at == 0 { // holes need not be read
			return wholeFile(ctx, f, name, raw)
		}
	}
	r := io.Reader(patient{ctx, f})
	if !raw {
		if r, err = newRawStream(r, name); err != nil {
			return nil, err
		}
	}
	return sparse.FromStream(r), nil
}

// wholeFile returns the content of a regular file or block device.
func wholeFile(ctx context.Context, f *os.File, name string, raw bool) (sparse.Source, error) {
	return patiently(ctx, func() (sparse.Source, error) {
		if !raw {
			if err := refuseImageFile(name, f); err != nil {
				return nil, err
			}
		}
		src, err := sparse.FromFile(f)
		return patientSource{src, ctx}, err
	}, nil)
}

// patientSource is a Source whose reads end with ctx.
type patientSource struct {
	sparse.Source
	ctx context.Context
}

func (s patientSource) Next(p []byte) (int, int64, error) {
	type run struct {
		n   int
		off int64
	}
	r, err := patiently(s.ctx, func() (run, error) {
		n, off, err := s.Source.Next(p)
		return run{n, off}, err
	}, nil)
	return r.n, r.off, err
}
