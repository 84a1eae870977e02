// Package sparse moves the content of disks without moving their holes: from and to files and block devices, from and
// to plain streams, and over a framed stream of its own that carries only data.
package sparse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
)

// Piece is the largest run of data that a Source returns at once.
const Piece = 1 << 20

// Block is the granularity at which zeros are detected: the engine's unit of redirection.
const Block = 4096

// Source is the content of a disk, as runs of data in ascending order. Everything between the runs is zeros.
type Source interface {
	// Next fills p from the next run of data: n bytes that belong at off. If a run is longer than p, the next call
	// continues it. At the end Next returns io.EOF and no data.
	Next(p []byte) (n int, off int64, err error)
	// Size returns the length of the content, or -1 while it is unknown. After io.EOF it is known.
	Size() int64
}

// zeroBlock is compared with blocks to detect zeros.
var zeroBlock [Block]byte

// DataRun returns the first run of p that is not zeros: p[skip:skip+n]. The start of p lies at a multiple of Block. n
// is 0 if all of p is zeros.
func DataRun(p []byte) (skip, n int) {
	for skip < len(p) && isZero(p[skip:min(skip+Block, len(p))]) {
		skip += Block
	}
	end := skip
	for end < len(p) && !isZero(p[end:min(end+Block, len(p))]) {
		end += Block
	}
	end = min(end, len(p))
	return min(skip, len(p)), max(0, end-skip)
}

func isZero(p []byte) bool {
	return bytes.Equal(p, zeroBlock[:len(p)])
}

// Copy writes the runs of src to dst, several at a time, and returns how many bytes of data it copied. If progress is
// not nil, Copy calls it after each run with the offset in src that has been reached; only one goroutine calls it. If
// grow is not nil, Copy calls it with the end of each run before it writes the run.
func Copy(ctx context.Context, dst io.WriterAt, src Source, grow func(end int64) error, progress func(off int64)) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type run struct {
		p   []byte
		off int64
	}
	writers := runtime.GOMAXPROCS(0)
	free := make(chan []byte, writers+1)
	for range cap(free) {
		free <- make([]byte, Piece)
	}
	runs := make(chan run)
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for r := range runs {
				if _, err := dst.WriteAt(r.p, r.off); err != nil {
					cancel(err)
				}
				free <- r.p[:cap(r.p)]
			}
		})
	}
	copied, err := func() (copied int64, err error) {
		defer wg.Wait()
		defer close(runs)
		for ctx.Err() == nil {
			p := <-free
			n, off, err := src.Next(p)
			if err == io.EOF {
				return copied, nil
			}
			if err == nil && grow != nil {
				err = grow(off + int64(n))
			}
			if err != nil {
				return copied, err
			}
			runs <- run{p[:n], off}
			copied += int64(n)
			if progress != nil {
				progress(off + int64(n))
			}
		}
		return copied, context.Cause(ctx)
	}()
	if err == nil {
		err = context.Cause(ctx) // a write that failed after the last run was handed out
	}
	return copied, err
}

// WriteTo writes the whole content to a stream, including zeros.
func WriteTo(ctx context.Context, w io.Writer, src Source, progress func(off int64)) error {
	var at int64
	p := make([]byte, Piece)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, off, err := src.Next(p)
		if err != nil && err != io.EOF {
			return err
		}
		if err == io.EOF {
			off = src.Size()
		}
		if off < at {
			return errors.New("the content comes out of order")
		}
		if err := writeZeros(ctx, w, off-at); err != nil {
			return err
		}
		if err == io.EOF {
			return nil
		}
		if _, err := w.Write(p[:n]); err != nil {
			return err
		}
		at = off + int64(n)
		if progress != nil {
			progress(at)
		}
	}
}

func writeZeros(ctx context.Context, w io.Writer, n int64) error {
	zeros := make([]byte, min(n, Piece))
	for n > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		k := min(n, int64(len(zeros)))
		if _, err := w.Write(zeros[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// streamSource is a Source over a plain stream.
type streamSource struct {
	r     io.Reader
	at    int64  // position in the content of the next byte of rest, or of r
	buf   []byte // input buffer; its length is a multiple of Block
	rest  []byte // the part of buf not yet handed out; starts at a multiple of Block
	ended bool
}

// FromStream returns the content that r carries until r ends. It leaves out blocks of zeros.
func FromStream(r io.Reader) Source {
	return &streamSource{r: r, buf: make([]byte, Piece)}
}

func (s *streamSource) Next(p []byte) (int, int64, error) {
	for {
		skip, n := DataRun(s.rest)
		s.rest, s.at = s.rest[skip:], s.at+int64(skip)
		if n > 0 {
			n = copy(p[:len(p)/Block*Block], s.rest[:n])
			off := s.at
			s.rest, s.at = s.rest[n:], s.at+int64(n)
			return n, off, nil
		}
		if s.ended {
			return 0, 0, io.EOF
		}
		n, err := s.fill()
		if s.ended = err == io.EOF; err != nil && !s.ended {
			return 0, 0, fmt.Errorf("reading the input at %d: %w", s.at+int64(n), err)
		}
		s.rest = s.buf[:n]
	}
}

// fill reads until buf is full. Unlike io.ReadFull, it tells the end of r from one that comes too early for r, such as
// that of compressed data.
func (s *streamSource) fill() (n int, err error) {
	for n < len(s.buf) && err == nil {
		var k int
		k, err = s.r.Read(s.buf[n:])
		n += k
	}
	if n == len(s.buf) {
		err = nil
	}
	return n, err
}

func (s *streamSource) Size() int64 {
	if !s.ended || len(s.rest) > 0 {
		return -1
	}
	return s.at
}
