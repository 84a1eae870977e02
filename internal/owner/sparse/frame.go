package sparse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// The framed stream consists of frames. All integers are little-endian.
//
//	0   8   offset
//	8   4   length of the data that follows, 1 to Piece
//	12  ..  data
//
// A frame of length 0 has no data and ends the stream; its offset is the size of the content. A frame of length
// frameError also ends the stream, and means that the sender failed; its offset is the length of the message that
// follows. A stream that ends in any other way is incomplete.
//
// A frame of length frameLost says that a range cannot be read: it begins at the frame's offset, and its length, of 8
// bytes, follows. The content has zeros there. Only a receiver that has asked for such frames gets them.
const (
	frameHeader = 12
	frameError  = 1<<32 - 1
	frameLost   = 1<<32 - 2
	maxMessage  = 64 << 10
)

// RemoteError is the error that the receiver of a framed stream gets if the sender failed.
type RemoteError struct{ Message []byte }

func (e *RemoteError) Error() string { return string(e.Message) }

// Encode writes src as a framed stream. If src fails, Encode sends message(err) to the receiver.
func Encode(ctx context.Context, w io.Writer, src Source, message func(error) []byte) error {
	buf := make([]byte, frameHeader+Piece)
	for {
		n, off, err := src.Next(buf[frameHeader:])
		if err == nil {
			err = context.Cause(ctx)
		}
		switch {
		case err == io.EOF:
			putFrame(buf, src.Size(), 0)
			_, err = w.Write(buf[:frameHeader])
			return err
		case err != nil:
			m := message(err)
			m = m[:min(len(m), maxMessage)]
			putFrame(buf, int64(len(m)), frameError)
			_, werr := w.Write(append(buf[:frameHeader], m...))
			return errors.Join(err, werr)
		}
		putFrame(buf, off, uint32(n))
		if _, err := w.Write(buf[:frameHeader+n]); err != nil {
			return err
		}
	}
}

// EncodeLost writes the frame that says that a range is lost. It is called between two frames.
func EncodeLost(w io.Writer, off, length int64) error {
	p := make([]byte, frameHeader+8)
	putFrame(p, off, frameLost)
	binary.LittleEndian.PutUint64(p[frameHeader:], uint64(length))
	_, err := w.Write(p)
	return err
}

func putFrame(p []byte, off int64, n uint32) {
	binary.LittleEndian.PutUint64(p, uint64(off))
	binary.LittleEndian.PutUint32(p[8:], n)
}

// frames is a Source over a framed stream.
type frames struct {
	r    io.Reader
	at   int64 // position of the next byte of the current frame; no later frame may start before it
	left int   // bytes left in the current frame
	size int64
	done bool
	lost func(off, length int64) // nil: no range is lost
}

// Decode returns the content of a framed stream. size is the announced size of the content, or -1 if none was
// announced. An incomplete stream is an error, and so are frames out of order.
func Decode(r io.Reader, size int64) Source { return &frames{r: r, size: size} }

// DecodeLost is Decode for a stream that may say that ranges are lost. lost is called with each, before data behind it is
// returned.
func DecodeLost(r io.Reader, size int64, lost func(off, length int64)) Source {
	return &frames{r: r, size: size, lost: lost}
}

func (s *frames) Size() int64 { return s.size }

func (s *frames) Next(p []byte) (int, int64, error) {
	if s.done {
		return 0, 0, io.EOF
	}
	for s.left == 0 {
		if err := s.header(); err != nil {
			return 0, 0, err
		}
	}
	n := min(len(p), s.left)
	if _, err := io.ReadFull(s.r, p[:n]); err != nil {
		return 0, 0, incomplete(err)
	}
	off := s.at
	s.at, s.left = s.at+int64(n), s.left-n
	return n, off, nil
}

func (s *frames) header() error {
	var h [frameHeader]byte
	if _, err := io.ReadFull(s.r, h[:]); err != nil {
		return incomplete(err)
	}
	off, n := int64(binary.LittleEndian.Uint64(h[:])), binary.LittleEndian.Uint32(h[8:])
	end := int64(math.MaxInt64) // where the content ends at the latest
	if s.size >= 0 {
		end = s.size
	}
	switch {
	case n == frameError:
		m := make([]byte, min(max(off, 0), maxMessage))
		if _, err := io.ReadFull(s.r, m); err != nil {
			return incomplete(err)
		}
		return &RemoteError{m}
	case n == frameLost && s.lost != nil:
		return s.lostFrame(off, end)
	case off < s.at || n > Piece:
		return fmt.Errorf("a bad frame in the stream: offset %d, length %d, after %d", off, n, s.at)
	case n == 0 && s.size >= 0 && s.size != off:
		return fmt.Errorf("the stream ends at %d, and was to end at %d: %w", off, s.size, io.ErrUnexpectedEOF)
	case n == 0:
		s.size, s.done = off, true
		return io.EOF
	case off > end-int64(n):
		return fmt.Errorf("a bad frame in the stream: offset %d, length %d, in a content of %d bytes", off, n, end)
	}
	s.at, s.left = off, int(n)
	return nil
}

// lostFrame reads the rest of the frame that says that a range from off on is lost. The content ends at end at the latest.
func (s *frames) lostFrame(off, end int64) error {
	var p [8]byte
	if _, err := io.ReadFull(s.r, p[:]); err != nil {
		return incomplete(err)
	}
	n := int64(binary.LittleEndian.Uint64(p[:]))
	if off < s.at || n <= 0 || n > end || off > end-n {
		return fmt.Errorf("a bad frame in the stream: %d bytes from %d on are lost, after %d, in a content of %d bytes", n, off, s.at, end)
	}
	s.lost(off, n)
	return nil
}

func incomplete(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("the stream is incomplete: %w", err)
}
