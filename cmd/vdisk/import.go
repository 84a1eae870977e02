package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/image"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) importCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "import",
		Category:  groupData,
		Usage:     "import an image as a new volume",
		UsageText: "vdisk import FILE|- VOL [--repair] [--format FORMAT] [--backing] [--compress none|s2|zstd[:N]] [--logical-block 512|4096]",
		Description: "FILE is an image, a block device, or - for standard input. The volume must not exist. It appears when all of its\n" +
			"content is durable, and has the size of the content, rounded up to a logical block. Without --format the image is raw,\n" +
			"and one that looks like another format is refused. gzip, xz and zstd are raw images that were compressed; the other\n" +
			"formats are read by qemu-img, from a file. Standard input is raw or compressed.\n" +
			"With --repair the volume exists, and FILE is an image of its content; it is written over those blocks that are damaged,\n" +
			"and over no others. Where it is proved to be what was lost, by checksum, snapshots and clones that share the damage\n" +
			"are mended, too. Elsewhere they are named, and stay as they are. The volume may be in use.",
		Flags: append(append(volumeFlags(), formatFlags()...),
			&cli.BoolFlag{Name: "repair", Usage: "write the content over the damaged blocks of a volume that exists"}),
	}, func(c *cli.Context) error {
		name, err := volumeName(c, 1)
		if err != nil {
			return err
		}
		if c.Bool("repair") {
			return a.repairFrom(c, c.Args().First(), name)
		}
		o, err := volumeOptions(c)
		if err != nil {
			return err
		}
		return a.importFrom(c, c.Args().First(), name, o)
	})
}

// importFrom makes a volume from the content at path. If o.Size is 0, the content's size is used.
func (a *app) importFrom(c *cli.Context, path, name string, o cow.VolumeOptions) error {
	src, closeSource, err := a.imageOf(c, path)
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

// imageOf opens the content at path, as the flags say that it is to be read. The caller calls the returned function when
// done with it.
func (a *app) imageOf(c *cli.Context, path string) (sparse.Source, func(), error) {
	in, err := readingOf(c)
	if err != nil {
		return nil, nil, err
	}
	return a.source(c.Context, path, in)
}

// source opens the content to import. The caller calls the returned function when done with it. A file, a block device,
// a FIFO and standard input are all checked in the same way.
func (a *app) source(ctx context.Context, path string, in reading) (sparse.Source, func(), error) {
	if path == "-" {
		if isTerminal(a.stdin) {
			return nil, nil, usagef("standard input is a terminal: connect it to an image")
		}
		if !in.Format.IsStream() {
			return nil, nil, usagef("--format %s: such an image is read at random, and standard input is a stream: put it into a file", in.Format.Name)
		}
		in.from = stream
		return content(ctx, a.stdin, "standard input", in)
	}
	f, err := openPatiently(ctx, path, os.O_RDONLY)
	if err != nil {
		return nil, nil, err
	}
	src, done, err := content(ctx, f, path, in)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return src, func() { done(); _ = f.Close() }, nil
}

// content returns the content of a file or stream from its present offset.
func content(ctx context.Context, f *os.File, name string, in reading) (src sparse.Source, done func(), err error) {
	done = func() {}
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if fi.IsDir() {
		return nil, nil, fmt.Errorf("%s is a folder, and an image is needed", name)
	}
	r := io.Reader(patient{ctx, f})
	switch {
	case !in.Format.IsStream():
		d, err := image.Open(ctx, f, in.Options)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
		return d, func() { _ = d.Close() }, nil
	case !in.Format.IsRaw():
		return unpacked(ctx, r, name, in)
	case fi.Mode()&(os.ModeNamedPipe|os.ModeCharDevice|os.ModeSocket) == 0:
		if at, err := f.Seek(0, io.SeekCurrent); err == nil && at == 0 { // holes need not be read
			src, err = wholeFile(ctx, f, name, in)
			return src, done, err
		}
	}
	if in.checked {
		in.from = stream
		if r, err = newRawStream(r, name, in); err != nil {
			return nil, nil, err
		}
	}
	return sparse.FromStream(r), done, nil
}

// wholeFile returns the content of a regular file or block device.
func wholeFile(ctx context.Context, f *os.File, name string, in reading) (sparse.Source, error) {
	return patiently(ctx, func() (sparse.Source, error) {
		if in.checked {
			if err := refuseFile(name, in, f); err != nil {
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
