package nbd

import "slices"

// Limits for skipping holes in a read. Below sparseMin, asking for the extents costs more than it saves. If a range has
// more than maxPieces extents, the rest is sent as data.
const (
	sparseMin = 64 << 10
	maxPieces = 64
)

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
	pieces, err := extents(ext, int64(t.off), int64(t.length), maxPieces, nil)
	if err != nil {
		return err
	}
	if end := int64(t.off) + int64(t.length); len(pieces) == maxPieces {
		last := &pieces[maxPieces-1]
		last.length, last.status = end-last.off, 0
	}
	data := int64(0)
	for _, x := range pieces {
		if !x.hole() {
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
		if x.hole() {
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
