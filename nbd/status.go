package nbd

import (
	"context"
	"errors"
	"unsafe"
)

// piece is a part of a range with its state in a metadata context.
type piece struct {
	off, length int64
	status      uint32
}

// hole reports whether a piece of base:allocation is a hole.
func (p piece) hole() bool { return p.status != 0 }

// descriptors returns the maximum number of descriptors for a context in the reply to a BLOCK_STATUS.
func descriptors(req request) int {
	if req.flags&cmdFlagReqOne != 0 {
		return 1
	}
	return int(min(maxDescriptors, req.length))
}

// statusCharge returns the memory that a BLOCK_STATUS takes until its reply is made: the chunks, and the pieces that one
// of them is made from. The slice of pieces may have grown to twice their number.
func (s *session) statusCharge(req request) int64 {
	n := descriptors(req)
	return requestCharge + int64(len(s.contexts))*bufferSize(s.statusLen(n)) + 2*int64(unsafe.Sizeof(piece{}))*int64(n)
}

// maxStatus is how many bytes one BLOCK_STATUS looks at. A device may have to look at all of the map of a range to find
// that it is one extent.
const maxStatus = 64 << 30

// blockStatus executes a BLOCK_STATUS and sends the reply, a chunk for each context. When a context fails, the error is
// the last chunk.
func (c *conn) blockStatus(t task) {
	var pieces []piece
	for i, x := range c.contexts {
		var err error
		if i > 0 && c.givesUp() {
			err = errGivenUp
		} else {
			pieces, err = c.status(x, t.request, pieces[:0])
		}
		if errors.Is(err, context.Canceled) && c.givesUp() {
			err = errGivenUp
		}
		if err != nil {
			c.reply(t, c.failed(t.request, err))
			return
		}
		last := i == len(c.contexts)-1
		p := c.statusChunk(t, metaContextID(i), pieces, last)
		if last { // the request is done with, apart from this chunk
			p.charge += requestCharge
			c.budget.release(t.charge - p.charge)
		} else {
			t.charge -= p.charge
		}
		c.out.send(p)
	}
}

// status appends the first pieces of a request's range in a context to pieces, which is empty.
func (c *conn) status(x Context, req request, pieces []piece) ([]piece, error) {
	off, length, most := int64(req.off), int64(min(req.length, maxStatus)), descriptors(req)
	if x != nil {
		return states(x.Status, off, length, most, pieces)
	}
	if c.ext == nil {
		return append(pieces, piece{off: off, length: length}), nil
	}
	return extents(c.ext, off, length, most, pieces)
}

// statusChunk makes the chunk of a context.
func (c *conn) statusChunk(t task, id uint32, pieces []piece, last bool) *packet {
	n := c.statusLen(len(pieces))
	p := newPacket(bufferSize(n))
	p.buf = newBuffer(n)
	var flags uint16
	if last {
		flags = chunkFlagDone
	}
	p.vec = append(p.vec, c.appendStatus(p.buf.b[:0], flags, t.request, id, pieces))
	return p
}

// extents is states in base:allocation.
func extents(ext Extenter, off, length int64, most int, pieces []piece) ([]piece, error) {
	return states(func(off, length int64, fn func(off, length int64, flags uint32) bool) error {
		return ext.Extents(off, length, func(off, length int64, hole bool) bool {
			flags := uint32(0)
			if hole {
				flags = stateHole | stateZero
			}
			return fn(off, length, flags)
		})
	}, off, length, most, pieces)
}

// states appends the first pieces of a range that is not empty to pieces, which is empty; at most most of them. They
// are in order and without gaps, neighbours are of different states, and none goes past the range's end, however status
// reports them. If there are fewer than most, they cover the range.
func states(status func(off, length int64, fn func(off, length int64, flags uint32) bool) error,
	off, length int64, most int, pieces []piece,
) ([]piece, error) {
	at, end := off, off+length
	// add appends a piece up to x. It returns false if there is no room.
	add := func(x int64, flags uint32) bool {
		if x <= at {
			return true
		}
		if n := len(pieces); n > 0 && pieces[n-1].status == flags {
			pieces[n-1].length += x - at
		} else if n == most {
			return false
		} else {
			pieces = append(pieces, piece{at, x - at, flags})
		}
		at = x
		return true
	}
	full := false
	err := status(off, length, func(o, l int64, flags uint32) bool {
		full = full || !add(min(o, end), 0) || !add(min(o+l, end), flags)
		return !full && at < end
	})
	if err == nil && !full {
		add(end, 0)
	}
	return pieces, err
}
