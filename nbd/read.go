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
	if t.length > MaxPayload {
		c.readLong(t)
		return
	}
	p := newPacket(t.charge)
	err := c.readPart(p, t, chunkFlagDone)
	c.finished(t.request, err)
	if err != nil {
		c.failRead(p, t, err)
	}
	c.out.send(p)
}

// readPart fills p with the content of t's range. The last chunk gets flags.
func (c *conn) readPart(p *packet, t task, flags uint16) error {
	if c.ext != nil && c.structured && t.flags&cmdFlagDF == 0 && t.length >= sparseMin {
		return c.readPieces(p, t, c.ext, flags)
	}
	return c.readWhole(p, t, flags)
}

// failRead makes p the reply that ends a READ that failed.
func (c *conn) failRead(p *packet, t task, err error) {
	p.reset()
	p.head = c.appendError(p.head, t.request, c.failed(t.request, err))
	p.sealHead()
}

// longRead is how much of a READ of more than MaxPayload is read at a time.
const longRead = 4 << 20

// readStep returns how much of a READ is in memory at a time.
func readStep(req request) uint64 {
	if req.length > MaxPayload {
		return longRead
	}
	return req.length
}

// readLong executes a READ that is longer than a payload may be. It reads a part when the part before has been sent, and
// so needs the memory of one part. An error ends the reply after the parts before it.
func (c *conn) readLong(t task) {
	sent := make(chan struct{}, 1)
	for part, end := t, t.off+t.length; ; part.off += longRead {
		part.length = min(longRead, end-part.off)
		last, flags := part.off+part.length == end, uint16(0)
		if last {
			flags = chunkFlagDone
		}
		p := newPacket(0)
		err := errGivenUp
		if !c.givesUp() {
			err = c.readPart(p, part, flags)
		}
		if err != nil {
			c.failRead(p, t, err)
		}
		if err != nil || last {
			c.finished(t.request, err)
			p.charge = t.charge
			c.out.send(p)
			return
		}
		p.sent = sent
		c.out.send(p)
		<-sent
	}
}

func (c *conn) readWhole(p *packet, t task, flags uint16) error {
	p.buf = newBuffer(int(t.length))
	if c.structured {
		p.head = c.appendOffsetData(p.head, flags, t.request, t.off, uint32(t.length))
	} else {
		p.head = c.appendSimple(p.head, t.request, 0)
	}
	p.vec = append(p.vec, p.head, p.buf.b)
	return readFull(c.dev, p.buf.b, int64(t.off))
}

// readPieces fills p with one chunk for each extent. The last one gets lastFlags.
func (c *conn) readPieces(p *packet, t task, ext Extenter, lastFlags uint16) error {
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
			flags = lastFlags
		}
		start := len(h)
		if x.hole() {
			h = c.appendOffsetHole(h, flags, t.request, uint64(x.off), uint32(x.length))
			p.vec = append(p.vec, h[start:])
			continue
		}
		h = c.appendOffsetData(h, flags, t.request, uint64(x.off), uint32(x.length))
		b := p.buf.b[used:][:x.length]
		used += x.length
		p.vec = append(p.vec, h[start:], b)
		if err := readFull(c.dev, b, x.off); err != nil {
			return err
		}
	}
	return nil
}
