package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/image"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// formatFlags returns the flags of commands that read an image.
func formatFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "format", Usage: "`FORMAT` of the image: " + image.Names(), DefaultText: "raw, and refuse what looks like another"},
		backingFlag(),
	}
}

func backingFlag() cli.Flag {
	return &cli.BoolFlag{Name: "backing", Usage: "permit an image that refers to other files, such as a backing file: it chooses files that this command reads"}
}

// reading is how an image is read.
type reading struct {
	image.Options
	flag    string // by which another format is named
	verb    string // what the command does with such an image
	checked bool   // what looks like another format is refused
	from    origin // file or stream
}

// readingOf reads the flags of formatFlags.
func readingOf(c *cli.Context) (r reading, err error) {
	if r, err = readingAs(c, "format", "imports"); err == nil && r.Backing && r.Format.IsStream() {
		err = usageError{c, fmt.Errorf("--backing is for a --format that qemu-img reads; a %s image refers to nothing", r.Format.Name)}
	}
	return r, err
}

// readingAs reads a flag that names a format, and --backing.
func readingAs(c *cli.Context, flag, verb string) (r reading, err error) {
	r.flag, r.verb, r.checked, r.Backing = flag, verb, !c.IsSet(flag), c.Bool("backing")
	name := "raw"
	if !r.checked {
		name = c.String(flag)
	}
	if r.Format, err = image.Parse(name); err != nil {
		return r, usageError{c, fmt.Errorf("--%s: %w", flag, err)}
	}
	return r, nil
}

// refuse returns an error if a content is no raw disk, as which it would be useless. It only refuses. It never selects a
// format, because the disk's user controls the first bytes of a raw disk. first and last are the content's first and
// last bytes, as far as they are known.
func refuse(name string, in reading, first, last []byte) error {
	f, is := image.Recognise(first, last)
	if !is {
		return nil
	}
	if in.from == packed {
		return fmt.Errorf("what %s holds looks like %s, and a raw image is needed: unpack it into a file first: %w", name, f.What, cow.ErrInvalid)
	}
	how := "unpack or convert it"
	if f.Use != "" {
		how = "'vdisk " + f.Use + "' reads it"
	}
	if format, err := image.Parse(f.Format); err == nil {
		flag := "--" + in.flag + " " + f.Format
		if how = flag + " " + in.verb + " it"; in.from == stream && !format.IsStream() {
			how = "put it into a file, which " + flag + " " + in.verb
		}
	}
	return fmt.Errorf("%s looks like %s, and a raw image is needed: %s; --%s raw takes its bytes as they are: %w", name, f.What, how, in.flag, cow.ErrInvalid)
}

// origin is where a content comes from.
type origin int

const (
	file   origin = iota
	stream        // it can only be read in order
	packed        // it was compressed
)

// refuseFile applies refuse to a file or block device.
func refuseFile(name string, in reading, f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	first, last := make([]byte, min(image.HeadSize, size)), make([]byte, min(image.FootSize, size))
	_, err = f.ReadAt(first, 0)
	if _, ferr := f.ReadAt(last, size-int64(len(last))); err == nil {
		err = ferr
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return refuse(name, in, first, last)
}

// rawStream applies refuse to a stream. A stream's end is known only when it is there, so the stream ends with the error.
type rawStream struct {
	r    io.Reader
	name string
	in   reading
	last []byte // the last bytes read, at most image.FootSize
}

// newRawStream waits for the first bytes of r and checks them.
func newRawStream(r io.Reader, name string, in reading) (*rawStream, error) {
	first := make([]byte, image.HeadSize)
	n, err := io.ReadFull(r, first)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		if in.from == packed { // the error is that of the format, and names no file
			err = fmt.Errorf("%s: %w", name, err)
		}
		return nil, err
	}
	if err := refuse(name, in, first[:n], nil); err != nil {
		return nil, err
	}
	return &rawStream{r: io.MultiReader(strings.NewReader(string(first[:n])), r), name: name, in: in}, nil
}

func (s *rawStream) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.last = append(s.last, p[max(0, n-image.FootSize):n]...)
	s.last = append(s.last[:0], s.last[max(0, len(s.last)-image.FootSize):]...)
	if err == io.EOF {
		if ferr := refuse(s.name, s.in, nil, s.last); ferr != nil {
			err = ferr
		}
	}
	return n, err
}

// unpacked returns the raw disk in a compressed stream. What was compressed is checked, too: an image in another format
// has to be unpacked into a file first.
func unpacked(ctx context.Context, r io.Reader, name string, in reading) (sparse.Source, func(), error) {
	z, err := image.Unpack(ctx, r, in.Format)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	done := func() { _ = z.Close() }
	in.from = packed
	s, err := newRawStream(z, name, in)
	if err != nil {
		done()
		return nil, nil, err
	}
	return sparse.FromStream(s), done, nil
}
