package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow is how far back compressed data may refer, which takes memory: the limit of zstd(1) without --long.
const maxWindow = 128 << 20

// Unpack returns the content of a compressed stream. Closing it ends what was started, but does not close r.
func Unpack(ctx context.Context, r io.Reader, f Format) (io.ReadCloser, error) {
	switch f.Name {
	case "gzip":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("it is not gzip: %w", err)
		}
		return whole{z}, nil
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(runtime.NumCPU()))
		if err != nil {
			return nil, err
		}
		return whole{z.IOReadCloser()}, nil
	case "xz":
		c, err := command(ctx, "xz", "-dc", "-T0")
		if err != nil {
			return nil, err
		}
		c.Stdin = r
		return startReading(ctx, c)
	}
	return nil, fmt.Errorf("the format %s is not a compressed stream", f.Name)
}

// whole is a stream that says so if it is cut short.
type whole struct{ io.ReadCloser }

func (w whole) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = errTruncated
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		err = fmt.Errorf("%w: it needs more than %d MiB of memory: zstd -dc --long=31 FILE | vdisk import - VOL", err, maxWindow>>20)
	}
	return n, err
}

// output is the output of a program that is running. A failure of the program is an error at the end.
type output struct {
	io.ReadCloser
	ctx context.Context
	c   *exec.Cmd
	why complaint
	end error // set once the program was waited for
}

func startReading(ctx context.Context, c *exec.Cmd) (*output, error) {
	o := &output{ctx: ctx, c: c}
	c.Stderr = &o.why
	var err error
	if o.ReadCloser, err = c.StdoutPipe(); err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *output) Read(p []byte) (int, error) {
	if o.end != nil {
		return 0, o.end
	}
	n, err := o.ReadCloser.Read(p)
	if err != nil {
		if o.end = o.why.explain(o.ctx, o.c.Wait()); o.end == nil {
			o.end = io.EOF
		}
		err = o.end
	}
	return n, err
}

// Close ends the program.
func (o *output) Close() error {
	if o.end == nil {
		_ = o.c.Process.Kill()
		o.end = errors.Join(io.ErrClosedPipe, o.c.Wait())
	}
	return nil
}

// Pack returns a writer that writes to w what is written to it, compressed. The stream is complete once Close has
// returned nil.
func Pack(ctx context.Context, w io.Writer, f Format) (io.WriteCloser, error) {
	switch f.Name {
	case "gzip":
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case "zstd":
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(runtime.NumCPU()))
	case "xz":
		c, err := command(ctx, "xz", "-zc", "-T0")
		if err != nil {
			return nil, err
		}
		c.Stdout = w
		return startWriting(ctx, c)
	}
	return nil, fmt.Errorf("the format %s is not a compressed stream", f.Name)
}

// input is the input of a program that is running.
type input struct {
	io.WriteCloser
	ctx context.Context
	c   *exec.Cmd
	why complaint
}

func startWriting(ctx context.Context, c *exec.Cmd) (*input, error) {
	i := &input{ctx: ctx, c: c}
	c.Stderr = &i.why
	var err error
	if i.WriteCloser, err = c.StdinPipe(); err != nil {
		return nil, err
	}
	return i, c.Start()
}

// Close waits for the end of the program.
func (i *input) Close() error {
	err := i.WriteCloser.Close()
	if werr := i.c.Wait(); werr != nil { // why the pipe may be broken
		err = i.why.explain(i.ctx, werr)
	}
	return err
}
