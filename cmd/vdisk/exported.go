package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/image"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// exported is the content of a disk in the format in which it leaves.
type exported interface {
	// toFile writes it to an empty file, and syncs that.
	toFile(ctx context.Context, f *os.File) error
	toStream(ctx context.Context, w io.Writer) error
	// size returns how large a block device has to be for it, or 0 if that is not known.
	size() int64
}

// sink writes a disk somewhere.
type sink func(ctx context.Context, c exported) error

// rawDisk is a disk as it is.
type rawDisk struct {
	src      sparse.Source
	progress func(int64)
}

func (d rawDisk) size() int64 { return d.src.Size() }

func (d rawDisk) toFile(ctx context.Context, f *os.File) error {
	if _, err := sparse.Copy(ctx, f, d.src, nil, d.progress); err != nil {
		return err
	}
	return errors.Join(f.Truncate(d.src.Size()), f.Sync())
}

func (d rawDisk) toStream(ctx context.Context, w io.Writer) error {
	return sparse.WriteTo(ctx, w, d.src, d.progress)
}

// packedDisk is a raw disk that is compressed as a whole.
type packedDisk struct {
	rawDisk
	format image.Format
}

func (d packedDisk) size() int64 { return 0 }

func (d packedDisk) toFile(ctx context.Context, f *os.File) error {
	w := bufio.NewWriterSize(f, 1<<20)
	if err := d.toStream(ctx, w); err != nil {
		return err
	}
	return errors.Join(w.Flush(), f.Sync())
}

func (d packedDisk) toStream(ctx context.Context, w io.Writer) error {
	z, err := image.Pack(ctx, w, d.format)
	if err != nil {
		return err
	}
	if err := errors.Join(d.rawDisk.toStream(ctx, z), z.Close()); err != nil {
		return err
	}
	return nil
}

// imageDisk is a disk that qemu-img writes as an image. It reads the disk from an NBD server.
type imageDisk struct {
	image.Output
	ref            cow.Ref
	socket, folder string // the server's, and a private folder
	progress       func(percent float64)
}

func (d imageDisk) size() int64 { return 0 }

func (d imageDisk) toFile(ctx context.Context, f *os.File) error {
	return d.Convert(ctx, d.socket, d.ref.String(), f, d.folder, d.progress)
}

func (d imageDisk) toStream(context.Context, io.Writer) error {
	return fmt.Errorf("an image in the format %s is written at random, and needs a file: %w", d.Format.Name, cow.ErrInvalid)
}

// exportImage writes r by qemu-img. The owner of the store serves it meanwhile, so that qemu-img learns of its holes.
func (a *app) exportImage(ctx context.Context, s owner.Store, r cow.Ref, o image.Output, write sink) error {
	folder, err := os.MkdirTemp("", "vdisk-export-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	socket := filepath.Join(folder, "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("a socket for qemu-img; TMPDIR can name another folder: %w", err)
	}
	converting, end := context.WithCancel(ctx)
	defer end()
	serving, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() {
		defer end() // a service that has ended has an error, and qemu-img would go on for a while
		served <- s.Serve(serving, l, owner.ServeOptions{Exports: []cow.Ref{r}, Fixed: true, Socket: socket})
	}()
	bar := a.bar("exporting "+r.String(), 100)
	err = write(converting, imageDisk{o, r, socket, folder, func(percent float64) { bar.set(int64(percent)) }})
	bar.finish()
	stop()
	serr := <-served
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(serr, context.Canceled) { // it was not needed any more
		serr = nil
	}
	if serr != nil { // why qemu-img failed, if it did
		return serr
	}
	return err
}
