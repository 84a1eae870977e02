package nbd

// Where a read skips holes. Below sparseMin, asking for the extents costs more than it saves; a
// range with more than maxPieces extents is sent as data from there on.
const (
	sparseMin = 64 << 10
	maxPieces = 64
)

// piece is a part of a range: a hole or data.
type piece struct {
	off, length int64
	hole        bool
}

// read does a READ and replies.
func (c *conn) read(t task) {
	p := newPacket(t.charge)
	var err error
	if ext, ok := c.dev.(Extenter); ok && c.structured && t.flags&cmdFlagDF == 0 && t.length >= sparseMin {
		err = c.readPieces(p, t, ext)
	} else {
		err = c.readWhole(p, t)
	}
	if err != nil {
		p.reset()
		p.head = c.appendError(p.head, t.request, wireErrno(err))
		p.sealHead()
	}
	c.out.send(p)
}

func (c *conn) readWhole(p *packet, t task) error {
	buf := newBuffer(int(t.length))
	p.bufs = append(p.bufs, buf)
	if c.structured {
		p.head = appendOffsetData(p.head, chunkFlagDone, t.cookie, t.off, t.length)
	} else {
		p.head = appendSimple(p.head, t.cookie, 0)
	}
	p.vec = append(p.vec, p.head, buf.b)
	return readFull(c.dev, buf.b, int64(t.off))
}

// readPieces makes a chunk of each extent.
func (c *conn) readPieces(p *packet, t task, ext Extenter) error {
	pieces, err := extents(ext, int64(t.off), int64(t.length), maxPieces)
	if err != nil {
		return err
	}
	if end := int64(t.off) + int64(t.length); len(pieces) == maxPieces {
		last := &pieces[maxPieces-1]
		last.length, last.hole = end-last.off, false
	}
	heads := newBuffer(len(pieces) * offsetHoleLen)
	p.bufs = append(p.bufs, heads)
	h := heads.b[:0]
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
		buf := newBuffer(int(x.length))
		p.bufs = append(p.bufs, buf)
		p.vec = append(p.vec, h[start:], buf.b)
		if err := readFull(c.dev, buf.b, x.off); err != nil {
			return err
		}
	}
	return nil
}

// blockStatus does a BLOCK_STATUS and replies.
func (c *conn) blockStatus(t task) {
	most := maxDescriptors
	if t.flags&cmdFlagReqOne != 0 {
		most = 1
	}
	pieces := []piece{{off: int64(t.off), length: int64(t.length)}}
	if ext, ok := c.dev.(Extenter); ok {
		var err error
		if pieces, err = extents(ext, int64(t.off), int64(t.length), most); err != nil {
			c.reply(t, wireErrno(err))
			return
		}
	}
	p := newPacket(t.charge)
	h := appendChunk(p.head, chunkFlagDone, chunkBlockStatus, t.cookie, uint32(4+8*len(pieces)))
	h = be.AppendUint32(h, contextAllocationID)
	for _, x := range pieces {
		state := uint32(0)
		if x.hole {
			state = stateHole | stateZero
		}
		h = be.AppendUint32(h, uint32(x.length))
		h = be.AppendUint32(h, state)
	}
	p.head = h
	c.out.send(p.sealHead())
}

// extents returns the first pieces, at most most, of a range that is not empty: in order, without
// gaps, neighbours of different kinds, none past the range's end, however ext reports them. With
// fewer than most, they cover the range.
func extents(ext Extenter, off, length int64, most int) ([]piece, error) {
	var pieces []piece
	at, end := off, off+length
	// add appends up to x; false when there is no room.
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
