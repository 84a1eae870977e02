package sparse

import (
	"bytes"
	"context"
	"io"
)

// Compare compares two contents. The shorter one counts as followed by zeros. It returns the first byte that differs,
// and reports whether there is one. What is in unread is not compared; a source may add to it what lies before the end of
// what it hands out next. If progress is not nil, Compare calls it with the offset that has been reached.
func Compare(ctx context.Context, a, b Source, unread *Ranges, progress func(off int64)) (at int64, differs bool, err error) {
	x, y := compared{src: a, buf: make([]byte, Piece)}, compared{src: b, buf: make([]byte, Piece)}
	for {
		if ctx.Err() != nil {
			return 0, false, context.Cause(ctx)
		}
		if err := x.fill(); err != nil {
			return 0, false, err
		}
		if err := y.fill(); err != nil {
			return 0, false, err
		}
		switch {
		case len(x.run) == 0 && len(y.run) == 0:
			return 0, false, nil
		case len(y.run) == 0 || len(x.run) > 0 && x.off < y.off:
			at, differs = x.zeros(&y, *unread)
		case len(x.run) == 0 || y.off < x.off:
			at, differs = y.zeros(&x, *unread)
		default:
			n := min(len(x.run), len(y.run))
			if i := FirstDifference(x.run[:n], y.run[:n]); i >= 0 {
				at = x.off + int64(i)
				n = int(min(int64(n), unread.After(at)-x.off))
				differs = x.off+int64(n) == at
			}
			x.take(n)
			y.take(n)
			if !differs {
				at = x.off
			}
		}
		if differs {
			return at, true, nil
		}
		if progress != nil {
			progress(at)
		}
	}
}

// compared is one of two contents.
type compared struct {
	src   Source
	buf   []byte
	run   []byte // data that is not compared yet
	off   int64  // where it lies
	ended bool
}

// fill gets the next run, unless there is one. At the end of the content there is none.
func (c *compared) fill() error {
	if len(c.run) > 0 || c.ended {
		return nil
	}
	n, off, err := c.src.Next(c.buf)
	if c.ended = err == io.EOF; c.ended {
		return nil
	}
	c.run, c.off = c.buf[:n], off
	return err
}

func (c *compared) take(n int) { c.run, c.off = c.run[n:], c.off+int64(n) }

// zeros compares the part of c's run that lies before the run of the other with zeros, which the other has there. It
// returns how far it came, or where the first byte lies that is not zero.
func (c *compared) zeros(other *compared, unread Ranges) (at int64, differs bool) {
	n := len(c.run)
	if len(other.run) > 0 {
		n = int(min(int64(n), other.off-c.off))
	}
	for n > 0 {
		k := min(n, Block)
		if i := FirstDifference(c.run[:k], zeroBlock[:k]); i >= 0 {
			at := c.off + int64(i)
			if k = int(min(int64(k), unread.After(at)-c.off)); c.off+int64(k) == at {
				return at, true
			}
		}
		c.take(k)
		n -= k
	}
	return c.off, false
}

// FirstDifference returns the index of the first byte that differs, or -1. a and b have the same length.
func FirstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	i := 0
	for a[i] == b[i] {
		i++
	}
	return i
}
