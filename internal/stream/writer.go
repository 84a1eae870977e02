package stream

import (
	"crypto/sha256"
	"hash"
	"io"

	"github.com/vdisk/vdisk/format"
)

const (
	// frameBytes is the number of bytes of payload from which on a units frame is written. An item more fits a frame.
	frameBytes = 1 << 20
	// markBytes is the same for a mark. A cut loses less than this and a frame, and a mark costs the receiver an event.
	markBytes = 16 << 20
)

// Writer writes one stream. After an error nothing more can be written.
type Writer struct {
	// FrameBytes and MarkBytes are the numbers of bytes from which on a frame and a mark are written. Tests make them
	// smaller.
	FrameBytes, MarkBytes int

	w      io.Writer
	sum    hash.Hash
	frame  []byte // the payload of the next units frame
	out    []byte
	number uint64
	blocks uint64
	at     uint64 // the block behind the last item
	mark   format.StreamMark
	marked uint64 // mark.Bytes at the last mark
	length int64
}

// NewWriter writes the header of a stream to w.
func NewWriter(w io.Writer, h *format.StreamHeader) (*Writer, error) {
	payload, err := format.AppendStreamHeader(nil, h)
	if err != nil {
		return nil, err
	}
	s := &Writer{FrameBytes: frameBytes, MarkBytes: markBytes, w: w, sum: sha256.New(), blocks: h.Blocks(), at: h.From, frame: make([]byte, 0, frameBytes+format.StreamItemSize+format.UnitSize)}
	return s, s.put(format.FrameHeader, payload)
}

// Put writes an item, which must lie behind those before.
func (s *Writer) Put(it *format.StreamItem) error {
	s.frame = format.AppendStreamItem(s.frame, it)
	s.mark.Units++
	s.at = it.End()
	if len(s.frame) < s.FrameBytes {
		return nil
	}
	return s.Flush()
}

// Flush writes the items that no frame has yet, and a mark if one is due.
func (s *Writer) Flush() error {
	if len(s.frame) == 0 {
		return nil
	}
	if err := s.put(format.FrameUnits, s.frame); err != nil {
		return err
	}
	s.mark.Bytes += uint64(len(s.frame))
	s.frame = s.frame[:0]
	if s.mark.Bytes-s.marked < uint64(s.MarkBytes) {
		return nil
	}
	return s.putMark(format.FrameMark, s.at)
}

// End writes the end of the stream.
func (s *Writer) End() error {
	if err := s.Flush(); err != nil {
		return err
	}
	return s.putMark(format.FrameEnd, s.blocks)
}

// Length returns the number of bytes that were written.
func (s *Writer) Length() int64 { return s.length }

func (s *Writer) putMark(kind format.FrameKind, block uint64) error {
	s.mark.Block, s.marked = block, s.mark.Bytes
	s.sum.Sum(s.mark.Sum[:0])
	return s.put(kind, format.AppendStreamMark(nil, &s.mark))
}

// put writes a frame, in one piece.
func (s *Writer) put(kind format.FrameKind, payload []byte) error {
	s.out = format.AppendFrame(s.out[:0], kind, s.number, payload)
	s.number++
	s.sum.Write(s.out)
	n, err := s.w.Write(s.out)
	s.length += int64(n)
	return err
}

// Estimate returns about how long a stream is that has so many items, and so many bytes in units.
func Estimate(h *format.StreamHeader, items uint64, bytes int64) int64 {
	head, _ := format.AppendStreamHeader(nil, h) // a header that cannot be encoded has no stream
	payload := bytes + int64(items)*format.StreamItemSize
	const frame, mark = format.FrameHeaderSize, format.FrameHeaderSize + format.StreamMarkSize
	return frame + int64(len(head)) + payload + (payload+frameBytes-1)/frameBytes*frame + payload/markBytes*mark + mark
}
