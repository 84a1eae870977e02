package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) exportCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "export",
		Category:  groupData,
		Usage:     "write a volume or snapshot to a raw image",
		UsageText: "vdisk export VOL[@SNAP] FILE|- [--force]",
		Description: "FILE is made sparse, and appears when it is complete. A FILE that is there, or a block device, is overwritten\n" +
			"only with --force. - is standard output, which gets the zeros too. A volume that is being written is refused:\n" +
			"take a snapshot and export that.",
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
	return a.during(c, func(s owner.Store) error {
		err := s.Export(c.Context, r, func(src sparse.Source) error {
			bar := a.progress("exporting "+r.String(), src.Size())
			defer bar.finish()
			return write(c.Context, src, bar.set)
		})
		if err != nil {
			return fmt.Errorf("exporting %v to %s: %w", r, path, err)
		}
		return nil
	})
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

// toFile chooses how to write to path.
func toFile(path string, force bool) (sink, error) {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return newFile(path), nil
	case err != nil:
		return nil, err
	case fi.IsDir():
		return nil, fmt.Errorf("%s is a folder: %w", path, fs.ErrExist)
	case !force:
		return nil, fmt.Errorf("%s: %w: --force overwrites it", path, fs.ErrExist)
	case fi.Mode().IsRegular():
		return newFile(path), nil
	}
	return inPlace(path), nil
}

// newFile writes a file beside path, which then takes its place.
func newFile(path string) sink {
	return func(ctx context.Context, src sparse.Source, progress func(int64)) (err error) {
		f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
		if err != nil {
			return err
		}
		defer func() {
			if err != nil {
				_ = os.Remove(f.Name()) // it was never there for anyone else
			}
		}()
		if _, err = sparse.Copy(ctx, f, src, nil, progress); err == nil {
			err = f.Truncate(src.Size())
		}
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
		return os.Rename(f.Name(), path)
	}
}

// inPlace writes to a block device, or to something else that takes a stream.
func inPlace(path string) sink {
	return func(ctx context.Context, src sparse.Source, progress func(int64)) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err == nil && size < src.Size() {
			return fmt.Errorf("it has %d bytes, and %d are needed", size, src.Size())
		}
		if err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err != nil && !errors.Is(err, syscall.ESPIPE) {
			return err
		}
		if err := sparse.WriteTo(ctx, f, src, progress); err != nil {
			return err
		}
		// A pipe has neither a size nor a need to be synced.
		if err := f.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
			return err
		}
		return f.Close()
	}
}
