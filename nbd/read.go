package nbd

import (
	"slices"
	"unsafe"
)

// Limits for skipping holes in a read. Below sparseMin, asking for the extents costs more than it saves. If a range has
// more than maxPieces extents, the rest is sent as data.
const (
	sparseMin = 64 << 10
	maxPieces = 64
)

// piece is a part of a range: a hole, or data.
type piece struct {
	off, length int64
	hole        bool
}

// read executes a READ and sends the reply.
func (c *conn) read(t task) {
	p := newPacket(t.charge)
	var err error
	if c.ext != nil && c.structured && t.flags&cmdFlagDF == 0 && t.length >= sparseMin {
		err = c.readPieces(p, t, c.ext)
	} else {
		err = c.readWhole(p, t)
	}
	if err != nil {
		p.reset()
		p.head = c.appendError(p.head, t.request, c.errno(t.request, err))
		p.sealHead()
	}
	c.out.send(p)
}

func (c *conn) readWhole(p *packet, t task) error {
	p.buf = newBuffer(int(t.length))
	if c.structured {
		p.head = appendOffsetData(p.head, chunkFlagDone, t.cookie, t.off, t.length)
	} else {
		p.head = appendSimple(p.head, t.cookie, 0)
	}
	p.vec = append(p.vec, p.head, p.buf.b)
	return readFull(c.dev, p.buf.b, int64(t.off))
}

// readPieces fills p with one chunk for each extent.
func (c *conn) readPieces(p *packet, t task, ext Extenter) error {
	pieces, err := extents(ext, int64(t.off), int64(t.length), maxPieces)
	if err != nil {
		return err
	}
	if end := int64(t.off) + int64(t.length); len(pieces) == maxPieces {
		last := &pieces[maxPieces-1]
		last.length, last.hole = end-last.off, false
	}
	data := int64(0)
	for _, x := range pieces {
		if !x.hole {
			data += x.length
		}
	}
	if data > 0 {
		p.buf = newBuffer(int(data))
	}
	// The headers must not move, since the vector refers to them.
	h := slices.Grow(p.head, len(pieces)*offsetHoleLen)
	p.head = h
	used := int64(0)
	for i, x := range pieces {
		var flags uint16
		if i == len(pieces)-1 {
			flags = chunkFlagDone
		}
		start := len(h)
		if x.hole {
			h = appendOffsetHole(h, flags, t.cookie, uint64(x.off), uint32(x.length))
			p.vec = append(p.vec, h[start:])
			continue
		}
		h = appendOffsetData(h, flags, t.cookie, uint64(x.off), uint32(x.length))
		b := p.buf.b[used:][:x.length]
		used += x.length
		p.vec = append(p.vec, h[start:], b)
		if err := readFull(c.dev, b, x.off); err != nil {
			return err
		}
	}
	return nil
}

// descriptors returns the maximum number of descriptors in the reply to a BLOCK_STATUS.
func descriptors(req request) int {
	if req.flags&cmdFlagReqOne != 0 {
		return 1
	}
	return int(min(maxDescriptors, req.length))
}

// statusLen returns the length of a reply with n descriptors.
func statusLen(n int) int { return chunkLen + 4 + 8*n }

// statusCharge returns the memory that a BLOCK_STATUS takes until its reply is made: the reply, and the pieces it is
// made from. The slice of pieces may have grown to twice their number.
func statusCharge(req request) int64 {
	n := descriptors(req)
	return requestCharge + bufferSize(statusLen(n)) + 2*int64(unsafe.Sizeof(piece{}))*int64(n)
}

// blockStatus executes a BLOCK_STATUS and sends the reply.
func (c *conn) blockStatus(t task) {
	pieces := []piece{{off: int64(t.off), length: int64(t.length)}}
	if c.ext != nil {
		var err error
		if pieces, err = extents(c.ext, int64(t.off), int64(t.length), descriptors(t.request)); err != nil {
			c.reply(t, c.errno(t.request, err))
			return
		}
	}
	n := statusLen(len(pieces))
	p := newPacket(requestCharge + bufferSize(n))
	p.buf = newBuffer(n)
	h := appendChunk(p.buf.b[:0], chunkFlagDone, chunkBlockStatus, t.cookie, uint32(n-chunkLen))
	h = be.AppendUint32(h, contextAllocationID)
	for _, x := range pieces {
		state := uint32(0)
		if x.hole {
			state = stateHole | stateZero
		}
		h = be.AppendUint32(h, uint32(x.length))
		h = be.AppendUint32(h, state)
	}
	p.vec = append(p.vec, h)
	c.budget.release(t.charge - p.charge)
	c.out.send(p)
}

// extents returns the first pieces of a range that is not empty, at most most of them. They are in order and without
// gaps, neighbours are of different kinds, and none goes past the range's end, however ext reports them. If there are
// fewer than most, they cover the range.
func extents(ext Extenter, off, length int64, most int) ([]piece, error) {
	var pieces []piece
	at, end := off, off+length
	// add appends a piece up to x. It returns false if there is no room.
	add := func(x int64, hole bool) bool {
		if x <= at {
			return true
		}
		if n := len(pieces); n > 0 && pieces[n-1].hole == hole {
			pieces[n-1].length += x - at
		} else if n == most {
			return false
		} else {
			pieces = append(pieces, piece{at, x - at, hole})
		}
		at = x
		return true
	}
	full := false
	err := ext.Extents(off, length, func(o, l int64, hole bool) bool {
		full = full || !add(min(o, end), false) || !add(min(o+l, end), hole)
		return !full && at < end
	})
	if err == nil && !full {
		add(end, false)
	}
	return pieces, err
}
