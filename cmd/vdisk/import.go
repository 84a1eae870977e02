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
		Usage:     "make a volume from a raw image",
		UsageText: "vdisk import FILE|- VOL [--format raw] [--compress none|s2|zstd[:N]] [--logical-block 512|4096]",
		Description: "FILE is a raw image, a block device, or - for standard input. The volume is new: one of that name must not be\n" +
			"there. It appears when all of its content is durable, and has the size of the content, rounded up to a logical\n" +
			"block. Other formats: qemu-img convert FILE nbd+unix:///VOL?socket=..., with a volume that is served.",
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

// formatFlag is for commands that read an image.
func formatFlag() cli.Flag {
	return &cli.StringFlag{Name: "format", Usage: "raw: take the file as it is, even if it looks like an image of another format"}
}

// importFrom makes a volume from what is at path; o.Size may be 0, for the size of that.
func (a *app) importFrom(c *cli.Context, path, name string, o cow.VolumeOptions) error {
	if f := c.String("format"); f != "" && f != "raw" {
		return usageError{c, fmt.Errorf("--format %s: only raw is possible; convert others with qemu-img", f)}
	}
	src, closeSource, err := a.source(c.Context, path, c.IsSet("format"))
	if err != nil {
		return err
	}
	defer closeSource()
	if src.Size() == 0 && o.Size == 0 { // the owner refuses it too, but then there would be a store
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
		return a.made(owner.Volume{VolumeInfo: v})
	})
}

// source opens what is to be imported; the caller calls the returned function when it is done with it.
func (a *app) source(ctx context.Context, path string, raw bool) (sparse.Source, func(), error) {
	if path == "-" {
		if isTerminal(a.stdin) {
			return nil, nil, usagef("standard input is a terminal: connect it to an image")
		}
		if src, ok := wholeFile(a.stdin); ok {
			return src, func() {}, nil
		}
		return sparse.FromStream(patient{ctx, a.stdin}), func() {}, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err == nil && fi.Mode()&(os.ModeNamedPipe|os.ModeCharDevice) != 0 {
		return sparse.FromStream(patient{ctx, f}), func() { f.Close() }, nil
	}
	src, err := sparse.FromFile(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	if raw {
		return src, func() { f.Close() }, nil
	}
	if err := refuseImageFormats(f); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return src, func() { f.Close() }, nil
}

// patient is a stream whose reads end with ctx. The read that is then under way is left behind: a blocking read of a
// pipe or terminal cannot be ended, and the program is about to exit.
type patient struct {
	ctx context.Context
	r   io.Reader
}

func (p patient) Read(b []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := p.r.Read(b)
		done <- result{n, err}
	}()
	select {
	case r := <-done:
		return r.n, r.err
	case <-p.ctx.Done():
		return 0, context.Cause(p.ctx)
	}
}

// wholeFile returns the content of a stream that is a file at its beginning, so that holes need not be read.
func wholeFile(stream io.Reader) (sparse.Source, bool) {
	f, ok := stream.(*os.File)
	if !ok {
		return nil, false
	}
	if at, err := f.Seek(0, io.SeekCurrent); err != nil || at != 0 {
		return nil, false
	}
	src, err := sparse.FromFile(f)
	return src, err == nil
}

// imageFormats are what an image file that is not raw begins with.
var imageFormats = []struct{ name, magic string }{
	{"qcow2", "QFI\xfb"},
	{"VMDK", "KDMV"},
	{"VHDX", "vhdxfile"},
	{"VHD", "conectix"},
	{"QED", "QED\x00"},
	{"gzip", "\x1f\x8b\x08"},
	{"xz", "\xfd7zXZ\x00"},
	{"zstd", "\x28\xb5\x2f\xfd"},
}

// refuseImageFormats keeps a file in another format, which would be of no use as a disk, from being taken for a raw
// image. It only refuses: what a raw disk begins with is its user's, so no format is ever chosen by it.
func refuseImageFormats(f *os.File) error {
	head := make([]byte, 16)
	if _, err := f.ReadAt(head, 0); err != nil && err != io.EOF {
		return err
	}
	for _, k := range imageFormats {
		if string(head[:len(k.magic)]) == k.magic {
			return fmt.Errorf("%s looks like %s, and a raw image is needed: convert it (qemu-img convert -O raw) or decompress it; "+
				"--format raw takes it as it is: %w", f.Name(), k.name, cow.ErrInvalid)
		}
	}
	return nil
}
