package stream

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/vdisk/vdisk/format"
)

var (
	// ErrDamaged is matched by the error for a frame that is not what was written.
	ErrDamaged = errors.New("the stream is damaged")
	// ErrCut is matched by the error for a stream that ends before its end frame.
	ErrCut = errors.New("the stream is cut")
)

// FrameError names a frame that cannot be read.
type FrameError struct {
	Stream int    // number of the stream in its file or pipe, from 1
	Frame  uint64 // number of the frame in its stream, from 0
	Offset int64  // where the frame begins in the file or pipe
	Err    error
}

func (e *FrameError) Error() string {
	return fmt.Sprintf("stream %d, frame %d at byte %d: %v", e.Stream, e.Frame, e.Offset, e.Err)
}

// Unwrap returns what is wrong with the frame.
func (e *FrameError) Unwrap() error { return e.Err }

// Totals are what has been read of a stream.
type Totals struct {
	Frames uint64 // of all kinds
	Marks  uint64
	Units  uint64
	Holes  uint64
	Blocks uint64 // of the units
	Bytes  uint64 // of the payloads of units frames
	Length int64  // of the stream
}

// Frame is a frame behind the header of a stream. It is valid until the next one is read.
type Frame struct {
	Kind  format.FrameKind // units, mark or end
	Items []format.StreamItem
	Mark  format.StreamMark // of a mark or the end
}

// Reader reads streams. After an error other than io.EOF it can read nothing more.
type Reader struct {
	r       io.Reader
	head    [format.FrameHeaderSize]byte
	payload []byte
	items   []format.StreamItem
	unit    [format.UnitSize]byte
	sum     hash.Hash

	stream int
	number uint64 // of the next frame
	offset int64  // of the next frame
	begin  int64  // where the stream begins
	header format.StreamHeader
	at     uint64 // no later item begins before this block
	marked uint64 // Totals.Bytes at the last mark
	open   bool   // the stream's end has not been read
	totals Totals
}

// NewReader returns a reader of the streams in r. It reads r in large pieces, and not beyond a frame.
func NewReader(r io.Reader) *Reader { return &Reader{r: r, sum: sha256.New()} }

// Next reads the header of the next stream. It returns io.EOF if there is none. The stream before must have been read
// to its end.
func (r *Reader) Next() (format.StreamHeader, error) {
	r.stream++
	r.number, r.begin, r.at, r.marked, r.totals = 0, r.offset, 0, 0, Totals{}
	r.sum.Reset()
	f, err := r.frame()
	if err == io.EOF {
		return r.header, err
	}
	if err == nil && f.Kind != format.FrameHeader {
		err = damaged("it is of the kind %v, and a stream begins with its header", f.Kind)
	}
	if err == nil {
		r.header, err = format.DecodeStreamHeader(r.payload)
		if errors.Is(err, format.ErrCorrupt) {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	if err != nil {
		return r.header, r.wrong(err)
	}
	r.open, r.at = true, r.header.From
	r.advance()
	return r.header, nil
}

// Frame reads the next frame of the stream. It returns io.EOF behind the end frame.
func (r *Reader) Frame() (Frame, error) {
	if !r.open {
		return Frame{}, io.EOF
	}
	f, err := r.frame()
	if err == io.EOF {
		err = fmt.Errorf("%w: it ends before the frame", ErrCut)
	}
	out := Frame{Kind: f.Kind}
	if err == nil {
		switch f.Kind {
		case format.FrameUnits:
			out.Items, err = r.units()
		case format.FrameMark, format.FrameEnd:
			out.Mark, err = r.mark(f.Kind == format.FrameEnd)
		default:
			err = damaged("a second header")
		}
	}
	if err != nil {
		return Frame{}, r.wrong(err)
	}
	r.open = f.Kind != format.FrameEnd
	r.advance()
	return out, nil
}

// Totals returns what has been read of the stream.
func (r *Reader) Totals() Totals { return r.totals }

// frame reads and verifies a frame, whose payload is then r.payload. It returns io.EOF if the input ends before it.
func (r *Reader) frame() (format.Frame, error) {
	n, err := io.ReadFull(r.r, r.head[:])
	if n > 0 && err == io.ErrUnexpectedEOF {
		return format.Frame{}, fmt.Errorf("%w: %d bytes of the frame's header are there", ErrCut, n)
	}
	if err != nil {
		return format.Frame{}, err
	}
	f, err := format.DecodeFrame(r.head[:])
	if err == nil && f.Number != r.number {
		err = fmt.Errorf("it has the number %d: %w", f.Number, format.ErrCorrupt)
	}
	if err != nil {
		return f, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	r.payload = slices.Grow(r.payload[:0], f.Length)[:f.Length]
	n, err = io.ReadFull(r.r, r.payload)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return f, fmt.Errorf("%w: %d of %d bytes of the frame's payload are there", ErrCut, n, f.Length)
	}
	if err == nil {
		if err = format.VerifyFrame(r.head[:], r.payload); err != nil {
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	return f, err
}

// advance goes on behind a frame that is right.
func (r *Reader) advance() {
	r.sum.Write(r.head[:])
	r.sum.Write(r.payload)
	r.number++
	r.offset += int64(len(r.head) + len(r.payload))
	r.totals.Frames, r.totals.Length = r.number, r.offset-r.begin
}

func (r *Reader) wrong(err error) error {
	r.open = false
	return &FrameError{r.stream, r.number, r.offset, err}
}

func damaged(text string, args ...any) error {
	return fmt.Errorf("%w: %w: %s", ErrDamaged, format.ErrCorrupt, fmt.Sprintf(text, args...))
}

// units decodes a units frame.
func (r *Reader) units() (items []format.StreamItem, err error) {
	items = r.items[:0]
	for rest := r.payload; len(rest) > 0; {
		var it format.StreamItem
		if it, rest, err = format.NextStreamItem(rest); err == nil {
			err = r.check(&it)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: item %d: %w", ErrDamaged, len(items), err)
		}
		items = append(items, it)
		r.at = it.End()
	}
	r.items = items
	if r.totals.Bytes += uint64(len(r.payload)); r.totals.Bytes-r.marked > format.MarkBytes {
		return nil, damaged("no mark in %d bytes", r.totals.Bytes-r.marked)
	}
	return items, nil
}

// check proves that an item is in order and that its unit can be decoded, and counts it.
func (r *Reader) check(it *format.StreamItem) error {
	switch {
	case it.First < r.at:
		return fmt.Errorf("%w: block %d after block %d", format.ErrCorrupt, it.First, r.at)
	case it.End() > r.header.Blocks():
		return fmt.Errorf("%w: block %d of %d", format.ErrCorrupt, it.End()-1, r.header.Blocks())
	case it.IsHole():
		r.totals.Holes++
		return nil
	case it.Codec == format.Zstd && !slices.Contains(r.header.Features, format.FeatureZstd):
		return fmt.Errorf("%w: a unit of zstd in a stream without that feature", format.ErrCorrupt)
	}
	r.totals.Units++
	r.totals.Blocks += uint64(it.Blocks)
	return format.Decompress(it.Codec, r.unit[:it.Blocks*format.BlockSize], it.Unit)
}

// mark decodes a mark, and proves that it is that of what was read.
func (r *Reader) mark(end bool) (m format.StreamMark, err error) {
	if m, err = format.DecodeStreamMark(r.payload); err != nil {
		return m, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	blocks := r.header.Blocks()
	switch sum := [sha256.Size]byte(r.sum.Sum(nil)); {
	case m.Sum != sum:
		return m, damaged("SHA-256 %x, want %x", sum, m.Sum)
	case m.Units != r.totals.Units+r.totals.Holes || m.Bytes != r.totals.Bytes:
		return m, damaged("%d items in %d bytes, want %d in %d", r.totals.Units+r.totals.Holes, r.totals.Bytes, m.Units, m.Bytes)
	case m.Block < r.at || m.Block > blocks || end && m.Block != blocks:
		return m, damaged("block %d after block %d of %d", m.Block, r.at, blocks)
	}
	r.at, r.marked = m.Block, r.totals.Bytes
	r.totals.Marks++
	return m, nil
}
