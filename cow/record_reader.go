package cow

import (
	"errors"
	"io"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// recordReader reads the records of a chunk in order, through a window.
type recordReader struct {
	f    storage.File
	c    *chunk
	off  uint32 // offset of the next record
	win  []byte // bytes of the file from at on
	at   uint32 // offset of win in the file
	back uint32 // what lies before it was durable, and is not written back
	why  error  // why next returned no record, or no payload

	readOnly bool // nothing is written back: it is durable, or the store cannot be written to
}

const readWindow = 128 << 10 // or one record, if that is larger

// next returns the record at off if it verifies and has the number seq. Otherwise it returns no header, or a
// header without a payload if only the payload does not verify, and sets why. An error is one that says
// nothing of the log.
func (r *recordReader) next(seq uint64) (*format.RecordHeader, []byte, error) {
	r.why = nil
	head, err := r.bytes(format.RecordHeaderSize)
	if err != nil || head == nil {
		return nil, nil, err
	}
	h, err := format.DecodeRecordHeader(head, r.c.seq, r.off)
	if err == nil && h.Seq != seq {
		err = fault.Corruptf("the record there has the number %d", h.Seq)
	}
	if err != nil {
		r.why = err
		return nil, nil, nil
	}
	rec, err := r.bytes(h.Size())
	if err != nil || rec == nil {
		return &h, nil, err
	}
	payload := rec[format.RecordHeaderSize : format.RecordHeaderSize+h.PayloadLen]
	if r.why = h.VerifyPayload(payload); r.why != nil {
		return &h, nil, nil
	}
	r.off += uint32(h.Size())
	return &h, payload, nil
}

// bytes returns n bytes from off on. If the file ends before, or the disk cannot read them, it returns nil
// and sets why.
func (r *recordReader) bytes(n int) ([]byte, error) {
	if r.off < r.at || r.off+uint32(n) > r.at+uint32(len(r.win)) {
		err := r.load(max(n, readWindow), r.off)
		if fault.IsUnreadable(err) && n < readWindow {
			err = r.load(n, r.off) // the bytes that cannot be read may lie behind these
		}
		if fault.IsUnreadable(err) {
			r.why = err
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	if r.off+uint32(n) > r.at+uint32(len(r.win)) {
		r.why = fault.Corruptf("the file ends at %d", r.at+uint32(len(r.win)))
		return nil, nil
	}
	return r.win[r.off-r.at:][:n], nil
}

// writeBack writes the verified records in the window once more. A process whose sync has failed may have
// left records that the page cache calls clean and that the disk does not have. Only what is written again is
// synced again.
func (r *recordReader) writeBack() error {
	from := max(r.at, r.back)
	if r.readOnly || r.off <= from {
		return nil
	}
	_, err := r.f.WriteAt(r.win[from-r.at:r.off-r.at], int64(from))
	return err
}

// load fills the window with n bytes from off on. It first writes back the verified records in the old
// window.
func (r *recordReader) load(n int, off uint32) error {
	if err := r.writeBack(); err != nil {
		return err
	}
	if cap(r.win) < n {
		r.win = make([]byte, n)
	}
	m, err := readFull(r.f, r.win[:n], int64(off))
	if err != nil {
		m = 0
	}
	r.win, r.at = r.win[:m], off
	return err
}

// tail returns the number of bytes that were written to the log behind its end, as far as that can be seen.
// It looks up to a stretch of readWindow bytes without a record of this chunk, since the file's former life
// may have left any other bytes there. next is the number of the record that the log would go on with, or 0: a
// damaged header of that record counts, though nothing else may lie behind.
func (r *recordReader) tail(next uint64) (n int64, err error) {
	r.readOnly = true
	end, last := r.off, r.off
	head, err := r.bytes(format.RecordHeaderSize)
	if err == nil && head != nil && format.WasRecordHeader(head, r.c.seq, r.off, next) {
		last += format.RecordHeaderSize
	}
	for r.off-last < readWindow {
		head, err := r.bytes(format.RecordHeaderSize)
		if err != nil || head == nil {
			return int64(last - end), err // the end of the file, or of what can be read
		}
		off := r.off
		r.off += format.RecordAlign
		if !format.IsRecordHeader(head, r.c.seq, off) {
			continue
		}
		if h, err := format.DecodeRecordHeader(head, r.c.seq, off); err == nil {
			r.off = off + uint32(h.Size())
			last = r.off
		}
	}
	return int64(last - end), nil
}

// readFull reads up to len(p) bytes. It reads fewer only at the end of the file.
func readFull(f storage.File, p []byte, off int64) (n int, err error) {
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
