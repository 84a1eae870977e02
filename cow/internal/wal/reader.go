package wal

import (
	"cmp"
	"errors"
	"io"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// Reader reads the records of a chunk in order, through a window of its file. Begin makes it ready.
type Reader struct {
	Off      uint32 // offset of the next record
	Why      error  // why the last call of Next returned no record, or no payload
	Durable  uint32 // what lies before this offset was durable, and is not written back
	Rewrites bool   // the reader writes back what has verified: see WriteBack

	f    storage.File
	c    *Chunk
	win  []byte // bytes of the file from at on
	at   uint32 // offset of win in the file
	size int    // bytes to read at once, or one record, if that is larger
}

// The windows of a replay and of the cleaner, in bytes.
const (
	ReplayWindow = 128 << 10
	MoveWindow   = 1 << 20
)

// Begin makes the reader read the records of c from offset off on, through a window of window bytes. It does not write
// back what an earlier chunk has left in the window.
func (r *Reader) Begin(c *Chunk, off uint32, window int) error {
	f, err := c.Handle()
	*r = Reader{f: f, c: c, Off: off, at: off, win: r.win[:0], size: window}
	return err
}

// Next returns the record at Off if it verifies and has the number seq, and moves Off behind it. Otherwise it leaves
// Off where it is, and sets Why: it returns a header without a payload if only the payload cannot be had or does not
// verify, and else no header. An error is one that says nothing of the log. The record is valid until the next call.
func (r *Reader) Next(seq uint64) (*format.RecordHeader, []byte, error) {
	h, err := r.header()
	if h == nil {
		return nil, nil, err
	}
	if h.Seq != seq {
		r.Why = fault.Corruptf("the record there has the number %d", h.Seq)
		return nil, nil, nil
	}
	payload, err := r.payload(h)
	if payload == nil {
		return h, nil, err
	}
	if r.Why = h.VerifyPayload(payload); r.Why != nil {
		return h, nil, nil
	}
	r.Off += uint32(h.Size())
	return h, payload, nil
}

// Any returns the record at Off, whatever its number is, and moves Off behind it. The payload is not verified. If there
// is no record, the error says why. The record is valid until the next call.
func (r *Reader) Any() (*format.RecordHeader, []byte, error) {
	h, err := r.header()
	if h == nil {
		return nil, nil, fault.AsCorrupt(cmp.Or(err, r.Why))
	}
	payload, err := r.payload(h)
	if payload == nil {
		return nil, nil, fault.AsCorrupt(cmp.Or(err, r.Why))
	}
	r.Off += uint32(h.Size())
	return h, payload, nil
}

// header returns the header of the record at Off. If there is none, or the disk cannot read it, it returns nil and sets
// Why.
func (r *Reader) header() (*format.RecordHeader, error) {
	r.Why = nil
	head, err := r.bytes(format.RecordHeaderSize)
	if err != nil || head == nil {
		return nil, err
	}
	h, err := format.DecodeRecordHeader(head, r.c.Seq, r.Off)
	if err != nil {
		r.Why = err
		return nil, nil
	}
	return &h, nil
}

// payload returns the payload of the record at Off, whose header is h. It is not nil even if it is empty. If the file
// ends before, or the disk cannot read it, payload returns nil and sets Why.
func (r *Reader) payload(h *format.RecordHeader) ([]byte, error) {
	rec, err := r.bytes(h.Size())
	if err != nil || rec == nil {
		return nil, err
	}
	return rec[format.RecordHeaderSize : format.RecordHeaderSize+h.PayloadLen], nil
}

// bytes returns n bytes from Off on. If the file ends before, or the disk cannot read them, it returns nil and sets
// Why.
func (r *Reader) bytes(n int) ([]byte, error) {
	if r.Off < r.at || r.Off+uint32(n) > r.at+uint32(len(r.win)) {
		err := r.load(max(n, r.size), r.Off)
		if fault.IsUnreadable(err) && n < r.size {
			err = r.load(n, r.Off) // the bytes that cannot be read may lie behind these
		}
		if fault.IsUnreadable(err) {
			r.Why = err
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	if r.Off+uint32(n) > r.at+uint32(len(r.win)) {
		r.Why = fault.Corruptf("the file ends at %d", r.at+uint32(len(r.win)))
		return nil, nil
	}
	return r.win[r.Off-r.at:][:n], nil
}

// WriteBack writes the verified records in the window once more. A process whose sync has failed may have left records
// that the page cache calls clean and that the disk does not have. Only what is written again is synced again.
func (r *Reader) WriteBack() error {
	from := max(r.at, r.Durable)
	if !r.Rewrites || r.Off <= from {
		return nil
	}
	_, err := r.f.WriteAt(r.win[from-r.at:r.Off-r.at], int64(from))
	return err
}

// load fills the window with n bytes from off on. It first writes back the verified records in the old window.
func (r *Reader) load(n int, off uint32) error {
	if err := r.WriteBack(); err != nil {
		return err
	}
	if cap(r.win) < n {
		r.win = make([]byte, n)
	}
	m, err := ReadFull(r.f, r.win[:n], int64(off))
	if err != nil {
		m = 0
	}
	r.win, r.at = r.win[:m], off
	return err
}

// FirstSeq returns the number of the chunk's first record; 0 if there is none that can be read and verifies.
func (c *Chunk) FirstSeq() (seq uint64, err error) {
	var r Reader
	if err := r.Begin(c, format.ChunkHeaderSize, 0); err != nil {
		return 0, fault.IgnoreUnreadable(err)
	}
	h, err := r.header()
	if h == nil {
		return 0, err
	}
	payload, err := r.payload(h)
	if payload == nil || h.VerifyPayload(payload) != nil {
		return 0, err
	}
	return h.Seq, nil
}

// Tail returns the number of bytes that were written to the log behind its end, which is at offset end of the chunk, as
// far as that can be seen. It looks up to a stretch of ReplayWindow bytes without a record of this chunk, since the
// file's former life may have left any other bytes there. next is the number of the record that the log would go on
// with, or 0: a damaged header of that record counts, though nothing else may lie behind.
func (c *Chunk) Tail(end uint32, next uint64) (n int64, err error) {
	var r Reader
	if err := r.Begin(c, end, ReplayWindow); err != nil {
		return 0, err
	}
	last := end
	head, err := r.bytes(format.RecordHeaderSize)
	if err == nil && head != nil && format.WasRecordHeader(head, c.Seq, end, next) {
		last += format.RecordHeaderSize
	}
	for r.Off < last+ReplayWindow {
		head, err := r.bytes(format.RecordHeaderSize)
		if err != nil || head == nil {
			return int64(last - end), err // the end of the file, or of what can be read
		}
		off := r.Off
		r.Off += format.RecordAlign
		if !format.IsRecordHeader(head, c.Seq, off) {
			continue
		}
		if h, err := format.DecodeRecordHeader(head, c.Seq, off); err == nil {
			r.Off = off + uint32(h.Size())
			last = r.Off
		}
	}
	return int64(last - end), nil
}

// ReadFull reads up to len(p) bytes. It reads fewer only at the end of the file.
func ReadFull(f storage.File, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := f.ReadAt(p[n:], off+int64(n))
		n += m
		if errors.Is(err, io.EOF) || err == nil && m == 0 {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
