// Package rbddiff writes and reads differences in the format of 'rbd export-diff', version 1. Ceph publishes it as
// doc/dev/rbd-diff.rst. All integers are little-endian.
//
//	"rbd diff v1\n"
//	'f', length (4), name            the snapshot from which it goes; a full one has none
//	't', length (4), name            the snapshot to which it goes; none: to a volume
//	's', size (8)                    of the disk at the end
//	'w', offset (8), length (8), ..  data
//	'z', offset (8), length (8)      zeros
//	'e'                              the end
//
// The records f, t and s come before the records w and z, and in any order. Nothing proves that the data is right.
package rbddiff

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

const (
	magic   = "rbd diff v1\n"
	maxName = 4096
)

// ErrFormat is matched by errors about content that is no such difference.
var ErrFormat = errors.New("it is no difference in the format of 'rbd export-diff', version 1")

// Header is the records before the data.
type Header struct {
	From, To string // names of snapshots, or empty
	Size     int64  // of the disk at the end
}

// Writer writes a difference. The first error is final, and End returns it.
type Writer struct {
	w   io.Writer
	err error
}

// NewWriter begins a difference.
func NewWriter(w io.Writer, h Header) *Writer {
	d := &Writer{w: w}
	b := []byte(magic)
	for _, n := range []struct {
		tag  byte
		name string
	}{{'f', h.From}, {'t', h.To}} {
		if n.name != "" {
			b = binary.LittleEndian.AppendUint32(append(b, n.tag), uint32(len(n.name)))
			b = append(b, n.name...)
		}
	}
	d.write(binary.LittleEndian.AppendUint64(append(b, 's'), uint64(h.Size)))
	return d
}

func (d *Writer) write(p []byte) {
	if d.err == nil {
		_, d.err = d.w.Write(p)
	}
}

func (d *Writer) extent(tag byte, off, length int64) {
	b := append(make([]byte, 0, 17), tag)
	d.write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, uint64(off)), uint64(length)))
}

// Data writes data.
func (d *Writer) Data(p []byte, off int64) error {
	d.extent('w', off, int64(len(p)))
	d.write(p)
	return d.err
}

// Zero writes that a range has become zeros.
func (d *Writer) Zero(off, length int64) error {
	d.extent('z', off, length)
	return d.err
}

// End ends the difference.
func (d *Writer) End() error {
	d.write([]byte{'e'})
	return d.err
}

// Reader reads a difference.
type Reader struct {
	r    *bufio.Reader
	h    Header
	at   int64 // the next byte of the data record that is being read
	left int64 // bytes left of it
	next byte  // the tag of the next record, or 0
}

// NewReader reads the records before the data.
func NewReader(r io.Reader) (*Reader, error) {
	d := &Reader{r: bufio.NewReaderSize(r, 256<<10), h: Header{Size: -1}}
	b := make([]byte, len(magic))
	if n, err := io.ReadFull(d.r, b); err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	} else if string(b[:n]) != magic {
		if string(b[:n]) == "rbd diff v2\n" {
			return nil, fmt.Errorf("%w, but in version 2: make it with --export-format 1", ErrFormat)
		}
		return nil, ErrFormat
	}
	for {
		tag, err := d.r.ReadByte()
		if err != nil {
			return nil, cut(err)
		}
		switch tag {
		case 'f':
			err = d.name(&d.h.From)
		case 't':
			err = d.name(&d.h.To)
		case 's':
			err = d.numbers(&d.h.Size)
		case 'w', 'z', 'e':
			if d.h.Size < 0 {
				return nil, fmt.Errorf("%w: it does not say the disk's size", ErrFormat)
			}
			d.next = tag
			return d, nil
		default:
			err = fmt.Errorf("%w: a record %q", ErrFormat, tag)
		}
		if err != nil {
			return nil, err
		}
	}
}

// cut returns the error for a difference that ends too early.
func cut(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the difference is cut off: %w", io.ErrUnexpectedEOF)
	}
	return err
}

func (d *Reader) name(to *string) error {
	var b [4]byte
	if _, err := io.ReadFull(d.r, b[:]); err != nil {
		return cut(err)
	}
	n := binary.LittleEndian.Uint32(b[:])
	if n == 0 || n > maxName || *to != "" {
		return fmt.Errorf("%w: a name of %d bytes, or a second one", ErrFormat, n)
	}
	name := make([]byte, n)
	if _, err := io.ReadFull(d.r, name); err != nil {
		return cut(err)
	}
	*to = string(name)
	return nil
}

func (d *Reader) numbers(to ...*int64) error {
	for _, n := range to {
		var b [8]byte
		if _, err := io.ReadFull(d.r, b[:]); err != nil {
			return cut(err)
		}
		v := binary.LittleEndian.Uint64(b[:])
		if v > math.MaxInt64 {
			return fmt.Errorf("%w: the number %d", ErrFormat, v)
		}
		*n = int64(v)
	}
	return nil
}

// Header returns the records before the data.
func (d *Reader) Header() Header { return d.h }

// Next returns the next part that differs: length bytes at off, which lie within the disk. If zero is false, they are
// data, and are in the first length bytes of p; a longer record comes in several parts. After the end of the difference
// Next returns io.EOF. If the content ends before, or goes on behind it, that is an error.
func (d *Reader) Next(p []byte) (off, length int64, zero bool, err error) {
	for d.left == 0 {
		tag := d.next
		if d.next = 0; tag == 0 {
			if tag, err = d.r.ReadByte(); err != nil {
				return 0, 0, false, cut(err)
			}
		}
		switch tag {
		case 'e':
			if _, err = d.r.ReadByte(); err == nil {
				err = fmt.Errorf("%w: something follows its end", ErrFormat)
			}
			d.next = 'e'
			return 0, 0, false, err
		case 'w', 'z':
		default:
			return 0, 0, false, fmt.Errorf("%w: a record %q behind the first data", ErrFormat, tag)
		}
		if err := d.numbers(&d.at, &length); err != nil {
			return 0, 0, false, err
		}
		if d.at > d.h.Size || length > d.h.Size-d.at {
			return 0, 0, false, fmt.Errorf("%w: %d bytes at %d of a disk of %d", ErrFormat, length, d.at, d.h.Size)
		}
		if tag == 'z' && length > 0 {
			return d.at, length, true, nil
		}
		if tag == 'w' {
			d.left = length
		}
	}
	off, length = d.at, min(d.left, int64(len(p)))
	if _, err := io.ReadFull(d.r, p[:length]); err != nil {
		return 0, 0, false, cut(err)
	}
	d.at, d.left = off+length, d.left-length
	return off, length, false, nil
}
