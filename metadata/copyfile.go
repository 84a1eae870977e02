package metadata

import (
	"errors"
	"fmt"
	"io"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// copyBuffer is the size in bytes of the buffer through which the items of a batch are written.
const copyBuffer = 256 << 10

// copyFile is a file of the copy that is being written.
type copyFile struct {
	name    string
	f       storage.File
	end     int64  // where the whole batches end
	last    int64  // where the last of them begins, of a file that was found
	base    int64  // where the base ends; 0: it is not complete
	batches int64  // number of batches behind the base
	next    uint64 // number of the next batch

	// The batch that is being written, which begins at end.
	buf    []byte
	at     int64 // where buf belongs; end: nothing of the batch has been written
	length uint64
	items  uint32 // CRC of the items that have left buf
	err    error  // the first failure
	torn   bool   // something may be in the file behind end
}

// durable makes durable what any process has written to a file of the copy, whose last batch is in [from, to), and the
// file's name. If the sync of that batch has failed in a process that was killed then, the system takes its pages for
// written, and no other sync writes them. So the batch is written once more.
func durable(in storage.FS, f storage.File, from, to int64) error {
	p := make([]byte, min(copyBuffer, to-from))
	for ; from < to; from += int64(len(p)) {
		p = p[:min(int64(len(p)), to-from)]
		n, err := readUpTo(f, p, from)
		if err == nil && n < len(p) {
			err = io.ErrUnexpectedEOF
		}
		if err == nil {
			_, err = f.WriteAt(p, from)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), in.SyncDir())
}

// createCopy makes a new file of the copy, with its header. The file is not durable.
func createCopy(in storage.FS, name string, store [16]byte, first uint64) (*copyFile, error) {
	f, err := in.Create(name, 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(format.AppendCopyHeader(nil, store), 0); err != nil {
		return nil, errors.Join(err, f.Close(), in.Remove(name))
	}
	return &copyFile{name: name, f: f, end: format.CopyHeaderSize, next: first}, nil
}

// begin begins a batch, and cuts off one that was begun before and has not become whole.
func (c *copyFile) begin() {
	c.err = c.cut()
	c.buf = append(c.buf[:0], make([]byte, format.CopyHeadSize)...)
	c.at, c.length, c.items = c.end, 0, 0
}

// cut cuts off what stands behind the whole batches.
func (c *copyFile) cut() error {
	if !c.torn {
		return nil
	}
	if err := c.f.Truncate(c.end); err != nil {
		return fmt.Errorf("cut off a batch: %w", err)
	}
	c.torn = false
	return nil
}

// add adds an item to the batch.
func (c *copyFile) add(it *format.CopyItem) {
	if c.err != nil {
		return
	}
	c.buf = format.AppendCopyItem(c.buf, it)
	if len(c.buf) >= copyBuffer {
		c.flush()
	}
}

// flush writes the buffer. The place of the head keeps zeros until the batch is whole.
func (c *copyFile) flush() {
	items := c.buf
	if c.at == c.end {
		items = items[format.CopyHeadSize:]
	}
	c.length += uint64(len(items))
	c.items = format.MoreChecksum(c.items, items)
	c.write(c.buf, c.at)
	c.at += int64(len(c.buf))
	c.buf = c.buf[:0]
}

func (c *copyFile) write(p []byte, off int64) {
	if c.err == nil && len(p) > 0 {
		c.torn = true
		_, c.err = c.f.WriteAt(p, off)
	}
}

// finish writes the rest of the batch and its head. Nothing is durable before a sync.
func (c *copyFile) finish(kind format.CopyKind, sum sum) error {
	h := format.CopyHead{Kind: kind, Number: c.next, Sum: uint64(sum)}
	if whole := c.at == c.end; whole {
		items := c.buf[format.CopyHeadSize:]
		h.Length, h.Items = uint64(len(items)), format.Checksum(items)
		head := h.Encode(c.end)
		copy(c.buf, head[:])
		c.write(c.buf, c.at)
		c.length, c.at, c.buf = h.Length, c.at+int64(len(c.buf)), c.buf[:0]
		return c.err
	}
	c.flush()
	h.Length, h.Items = c.length, c.items
	head := h.Encode(c.end)
	c.write(head[:], c.end)
	return c.err
}

// took makes the batch one of the whole ones.
func (c *copyFile) took() {
	c.end += format.CopyHeadSize + int64(c.length)
	c.next++
	c.torn = false
	if c.base > 0 {
		c.batches++
	}
}

// due reports whether the changes take so much that a new base is worth its cost.
func (c *copyFile) due() bool {
	return max(c.end-c.base, c.batches*copyBatchLeast) > c.base+copyChanges
}

// batchAt is a batch in a file.
type batchAt struct {
	format.CopyHead
	off int64
}

func (b *batchAt) end() int64 { return b.off + format.CopyHeadSize + int64(b.Length) }

// copyReader reads a file of the copy.
type copyReader struct {
	name  string
	f     storage.File
	size  int64
	off   int64     // where the next batch begins
	first uint64    // number of the first batch
	last  []batchAt // the last batches that were read, at most 3
	base  int64     // where the base ends; 0: its end has not been read
	over  int64     // batches behind the base
	buf   []byte
}

// openCopy opens a file of the copy for reading. The error matches format.ErrCorrupt or format.ErrVersion if it is none
// of this store's.
func openCopy(in storage.FS, name string, store [16]byte) (*copyReader, error) {
	f, err := in.Open(name)
	if err != nil {
		return nil, err
	}
	r := &copyReader{name: name, f: f, off: format.CopyHeaderSize}
	if r.size, err = f.Size(); err == nil {
		if err = r.header(store); errors.Is(err, format.ErrCorrupt) && r.whole() == errUncompleted {
			err = errors.Join(err, errUncompleted) // a crash may take the header of a file that was being made
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return r, nil
}

func (r *copyReader) header(store [16]byte) error {
	var p [format.CopyHeaderSize]byte
	n, err := readUpTo(r.f, p[:], 0)
	if err != nil {
		return err
	}
	of, err := format.DecodeCopyHeader(p[:n])
	if err == nil && of != store {
		err = fmt.Errorf("it is of store %x, not %x: %w", of, store, format.ErrCorrupt)
	}
	return err
}

// readUpTo reads until p is full or the file ends.
func readUpTo(f storage.File, p []byte, off int64) (int, error) {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// next reads the head of the next batch. ok is false if there is none, or none that may follow the one before it. It
// does not read the items.
func (r *copyReader) next() (b batchAt, ok bool, err error) {
	var p [format.CopyHeadSize]byte
	n, err := readUpTo(r.f, p[:], r.off)
	if err != nil {
		return b, false, fmt.Errorf("%s: %w", r.name, err)
	}
	h, err := format.DecodeCopyHead(p[:n], r.off)
	if err != nil {
		return b, false, nil
	}
	b = batchAt{h, r.off}
	if h.Length > uint64(r.size) || b.end() > r.size || (r.base > 0) != (h.Kind == format.CopyChanges) {
		return b, false, nil
	}
	if n := len(r.last); n > 0 && h.Number != r.last[n-1].Number+1 {
		return b, false, nil
	}
	return b, true, nil
}

// pass goes past a batch of next.
func (r *copyReader) pass(b batchAt) {
	if r.off = b.end(); len(r.last) == 0 {
		r.first = b.Number
	}
	if r.base > 0 {
		r.over++
	}
	if b.Kind == format.CopyBaseEnd {
		r.base = r.off
	}
	if r.last = append(r.last, b); len(r.last) > 3 {
		r.last = append(r.last[:0], r.last[1:]...)
	}
}

// verify reads the items of a batch, and reports whether they are whole.
func (r *copyReader) verify(b batchAt) (bool, error) {
	crc := uint32(0)
	err := r.parts(b, func(p []byte) error { crc = format.MoreChecksum(crc, p); return nil })
	return crc == b.Items, err
}

// parts calls fn with the items of a batch, cut anywhere.
func (r *copyReader) parts(b batchAt, fn func([]byte) error) error {
	if r.buf == nil {
		r.buf = make([]byte, min(copyBuffer, r.size))
	}
	for off, end := b.off+format.CopyHeadSize, b.end(); off < end; {
		p := r.buf[:min(int64(len(r.buf)), end-off)]
		n, err := readUpTo(r.f, p, off)
		if err == nil && n < len(p) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		if err := fn(p); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// items calls fn with each item of a batch that verifies.
func (r *copyReader) items(b batchAt, fn func(*format.CopyItem) error) error {
	var held []byte
	err := r.parts(b, func(p []byte) error {
		held = append(held, p...)
		rest := held
		for len(rest) > 0 {
			it, after, need, err := format.DecodeCopyItem(rest)
			if err != nil {
				return fmt.Errorf("%s: batch %d: %w", r.name, b.Number, err)
			}
			if need > 0 {
				break
			}
			if err := fn(&it); err != nil {
				return err
			}
			rest = after
		}
		held = held[:copy(held, rest)]
		return nil
	})
	if err == nil && len(held) > 0 {
		err = fmt.Errorf("%s: batch %d ends within an item: %w", r.name, b.Number, format.ErrCorrupt)
	}
	return err
}

// toEnd goes past all batches, by their heads, and verifies the last one. A batch that a crash cut short is none. whole
// is false if the file is no complete copy.
func (r *copyReader) toEnd() (whole bool, err error) {
	for {
		b, ok, err := r.next()
		if err != nil {
			return false, err
		}
		if !ok {
			break
		}
		r.pass(b)
	}
	for torn := 0; len(r.last) > 0 && torn < 2; torn++ {
		b := r.last[len(r.last)-1]
		ok, err := r.verify(b)
		if err != nil {
			return false, err
		}
		if ok {
			return r.base > 0, nil
		}
		// What precedes the last batch was durable before the last one began.
		r.last, r.off, r.over = r.last[:len(r.last)-1], b.off, r.over-1
		if b.Kind == format.CopyBaseEnd {
			r.base = 0
		}
	}
	return false, nil
}
