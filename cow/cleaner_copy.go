package cow

import (
	"errors"
	"math/bits"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
)

// mover is the state of the cleaner or of the cold pass while it moves data. Store.cleaner.mu guards it.
type mover struct {
	s      *Store
	r      wal.Reader
	c      *chunk // being cleaned; the caller holds a reference
	unit   [format.UnitSize]byte
	comp   []byte
	pay    []byte      // payload of a moved record
	leaf   format.Leaf // buffer of ownedMask
	line   lineage     // of the last record's branch
	held   gathered
	again  []int // indexes in held of records to look at again
	most   int   // bytes to gather before held is moved
	turn   int   // the same, for this chunk
	codecs map[format.Codec]*format.Compressor

	forwarded bool // records of c may have been moved elsewhere
	full      bool // the last batch stopped because a checkpoint has to come first
}

// heldMost is how many bytes of records that snapshots hold are moved in one turn of the checkpoint lock. For a chunk
// with more than heldLarge bytes of live data it is heldLarge: while much is being deleted, the cleaner waits for each
// turn, and writers wait for the chunk.
const heldMost, heldLarge = 2 << 20, 8 << 20

func newMover(s *Store) *mover {
	return &mover{s: s, comp: make([]byte, 0, format.MaxCompressed), most: heldMost, codecs: map[format.Codec]*format.Compressor{}}
}

// begin makes c the chunk to be cleaned.
func (m *mover) begin(c *chunk) error {
	m.held.reset()
	if cap(m.held.data) > heldLarge/2 {
		m.held = gathered{} // few chunks need that much memory
	}
	m.turn = m.most
	if m.s.livesIn(c) > heldLarge {
		m.turn = max(m.most, heldLarge)
	}
	m.c = c
	return m.r.Begin(c.Chunk, format.ChunkHeaderSize, wal.MoveWindow)
}

// livesIn returns the live bytes of a chunk.
func (s *Store) livesIn(c *chunk) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(c.live)
}

// look reads the state of the chunk at the beginning of a batch: where its records end, and whether the chunk still
// exists.
func (m *mover) look() (end uint32, here bool) {
	s := m.s
	s.mu.Lock()
	defer s.mu.Unlock()
	m.line, m.forwarded = lineage{}, m.c.moved > 0
	return m.c.End, s.slots.get(m.c.Slot) == m.c && !m.c.dead
}

// batch goes on through the chunk until it has moved or passed over a batch. Records that snapshots may hold are
// gathered, and moved together when there are enough or at the chunk's end. It returns the bytes that it wrote, and
// whether there is more to do in the chunk.
func (m *mover) batch() (moved int, more bool, err error) {
	m.full = false
	end, here := m.look()
	if !here {
		return 0, false, nil // the chunk has died meanwhile
	}
	gathered := len(m.held.data)
	for from := m.r.Off; moved+len(m.held.data)-gathered < cleanBatch && m.r.Off-from < 16*cleanBatch; {
		if len(m.held.data) >= m.turn || m.r.Off >= end && len(m.held.records) > 0 {
			var n int
			n, err = m.moveGathered()
			moved, gathered = moved+n, 0
			if err == nil {
				continue
			}
			return m.stopped(moved, m.held.from, err)
		}
		if m.r.Off >= end {
			return moved, false, nil
		}
		off := m.r.Off
		h, payload, err := m.r.Any()
		if err == nil && (h.Kind == format.KindData || h.Kind == format.KindMoved) {
			var n int
			n, err = m.move(h, payload, off)
			moved += n
		}
		if err != nil {
			m.met(off, err)
			return m.stopped(moved, off, err)
		}
	}
	return moved, true, nil
}

// met notes that the record at an offset of the chunk may be damaged, if err says so.
func (m *mover) met(off uint32, err error) {
	if errors.Is(err, ErrCorrupt) {
		m.s.metAt(m.c, off, err)
	}
}

// stopped ends a batch at a record that returned an error. After errFull, the next batch goes on at that record once a
// checkpoint has been made.
func (m *mover) stopped(moved int, off uint32, err error) (int, bool, error) {
	s := m.s
	switch {
	case errors.Is(err, errFull):
		if len(m.held.records) > 0 {
			off = min(off, m.held.from)
		}
		m.r.Off, m.full = off, true
		m.held.reset()
		return moved, true, nil
	case errors.Is(err, ErrCorrupt):
		// A copy would make damaged data look sound. Check reports the damage; the rest of the chunk stays where it is.
		s.log.Error("a chunk cannot be cleaned; run check", "chunk", m.c.Name(), "offset", off, "err", err)
		s.mu.Lock()
		m.c.damaged = true
		s.slots.recount(m.c)
		s.mu.Unlock()
		return moved, false, nil
	}
	return moved, false, err
}

// record is a record that the mover has come to.
type record struct {
	h       *format.RecordHeader
	payload []byte       // as stored
	data    []byte       // the part of payload that is the unit
	here    format.Entry // entry of its first block at its present place
	name    format.Entry // the entry that leaves have for that block
	of      *chunk       // chunk in name's slot when find looked
}

// move rewrites the blocks of a record that only a head has, and returns the size of what it wrote. If a snapshot may
// hold other blocks of the record, the record is gathered.
func (m *mover) move(h *format.RecordHeader, payload []byte, off uint32) (n int, err error) {
	r, err := m.decode(h, payload, off)
	if err != nil {
		return 0, err
	}
	n, rest, err := m.writeOwn(&r)
	if err == nil && rest {
		m.held.add(&r, off)
	}
	return n, err
}

// writeOwn repeats moveOwn until no other writer interferes.
func (m *mover) writeOwn(r *record) (n int, rest bool, err error) {
	for {
		k, rest, err := m.moveOwn(r)
		n += k
		if !errors.Is(err, errChanged) {
			return n, rest, err
		}
		m.line = lineage{}
	}
}

func (m *mover) decode(h *format.RecordHeader, payload []byte, off uint32) (r record, err error) {
	here := format.MakeEntry(m.c.Slot, off, h.Size(), h.Blocks, 0)
	r = record{h: h, payload: payload, data: payload, here: here, name: here}
	if h.Kind == format.KindMoved {
		was, err := format.DecodeMoved(h, payload)
		if err != nil {
			return r, err
		}
		r.name, r.data = was.From, payload[format.MovedSize:]
	}
	return r, nil
}

// find looks up what the record's name means now, and sets r.of. It returns false if the name means another record, or
// none. Code that relies on the result later must check that r.of is still in the name's slot; as long as it is, the
// name means the same.
func (m *mover) find(r *record) (ok bool, err error) {
	if r.of = m.s.slots.get(r.name.Slot()); r.of == nil {
		return false, nil
	}
	if r.h.Kind == format.KindData && !m.forwarded {
		return r.of == m.c, nil
	}
	to, moved, err := m.s.forwards.lookup(r.name)
	if moved {
		return to.To == r.here, err
	}
	return r.h.Kind == format.KindData && r.of == m.c, err // otherwise it was moved on, or has died
}

// moveOwn rewrites those blocks of a record that only the head of its volume has. The head's entry becomes a new one,
// so nothing has to be forwarded. rest is true if the record may have other live blocks. For a replay this is an
// ordinary write; so it takes no more locks than a write, and runs beside a checkpoint.
func (m *mover) moveOwn(r *record) (n int, rest bool, err error) {
	if ok, err := m.find(r); !ok {
		return 0, false, err
	}
	mask, rest, err := m.headMask(r.h, r.name)
	if err != nil || mask == 0 {
		return 0, rest, err // damage in dead data does not matter
	}
	if err := r.h.VerifyPayload(r.payload); err != nil {
		return 0, rest, err
	}
	n, err = m.rewrite(r, mask)
	return n, rest, err
}

// ownedIn returns a mask of the blocks of the record name that l owns: their changed bits are set.
func ownedIn(l *format.Leaf, h *format.RecordHeader, name format.Entry) (mask uint16) {
	first := int(h.Block % format.LeafBlocks)
	for i := range h.Blocks {
		if l.IsChanged(first+i) && l.Entries[first+i] == name.WithIndex(i) {
			mask |= 1 << i
		}
	}
	return mask
}

// lineage is what the mover knows of a branch, as of the beginning of a batch or of the last change that it noticed.
type lineage struct {
	b       *branch
	epoch   uint32
	written bool // a volume writes to its head
	alone   bool // it has no points, so the head's versions are its only ones
}

func (m *mover) lineageOf(branch uint32) *lineage {
	if m.line.b == nil || m.line.b.ID != branch {
		m.s.mu.Lock()
		defer m.s.mu.Unlock()
		m.line = lineage{}
		if b := m.s.catalog.branches[branch]; b != nil {
			m.line = lineage{b, b.Epoch, b.volume != nil, len(b.points) == 0}
		}
	}
	return &m.line
}

// headMask returns a mask of those blocks of a record that a volume's head put there in its present epoch, and that
// nothing else has. rest is true if the record may have other live blocks. (A snapshot that is taken meanwhile may hold
// the blocks, too. Then their bytes count as live, and they are cleaned another time.)
func (m *mover) headMask(h *format.RecordHeader, name format.Entry) (mask uint16, rest bool, err error) {
	l := m.lineageOf(h.Branch)
	if !l.written {
		return 0, true, nil
	}
	err = m.s.cache.View(l.b.leaf(uint32(h.Block/format.LeafBlocks), head), func(lf *leafcache.Leaf) {
		first := int(h.Block % format.LeafBlocks)
		rest = !l.alone
		for i := range h.Blocks {
			switch {
			case lf.Entry(first+i) != name.WithIndex(i):
			case lf.Epoch() == l.epoch && lf.IsChanged(first+i):
				mask |= 1 << i
			default:
				rest = true
			}
		}
	})
	return mask, rest, err
}

// rewrite writes those blocks of a head again that mask selects. Their content stays the same.
func (m *mover) rewrite(r *record, mask uint16) (n int, err error) {
	s, h := m.s, r.h
	if bits.OnesCount16(mask) == h.Blocks {
		crc := h.PayloadCRC
		if h.Kind == format.KindMoved { // its payload begins with a Moved, so its checksum is another
			crc = format.Checksum(r.data)
		}
		return s.putMoved(&format.RecordHeader{
			Block: h.Block, Branch: h.Branch, Kind: format.KindData, Codec: h.Codec, Blocks: h.Blocks,
			PayloadLen: len(r.data), PayloadCRC: crc,
		}, r.data, m.still(r, 0, h.Blocks))
	}
	unit := m.unit[:h.Blocks*format.BlockSize]
	if err := format.Decompress(h.Codec, unit, r.data); err != nil {
		return 0, err
	}
	pool := s.codecOf(h.Branch)
	if pool == nil {
		return 0, nil // its volume has just been deleted
	}
	for i := 0; i < h.Blocks; {
		run := bits.TrailingZeros16(^(mask >> i))
		if run == 0 {
			i++
			continue
		}
		c := pool.get()
		out, codec := c.Compress(m.comp, unit[i*format.BlockSize:(i+run)*format.BlockSize])
		pool.put(c)
		k, err := s.putMoved(&format.RecordHeader{
			Block: h.Block + uint64(i), Branch: h.Branch, Kind: format.KindData, Codec: codec, Blocks: run,
			PayloadLen: len(out), PayloadCRC: format.Checksum(out),
		}, out, m.still(r, i, run))
		if n += k; err != nil {
			return n, err
		}
		i += run
	}
	return n, nil
}

func (s *Store) codecOf(branch uint32) *codecPool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.catalog.branches[branch]; b != nil && b.volume != nil {
		return b.volume.codec
	}
	return nil
}

// putMoved writes blocks of a head again with the same content, and returns the size of the record. same reports
// whether the blocks are still those that were copied; it is called with mu and the leaf's lock held. If they are not,
// or are not of the present epoch, putMoved returns errChanged.
func (s *Store) putMoved(h *format.RecordHeader, payload []byte, same func(*leafcache.Leaf) bool) (n int, err error) {
	for {
		k, err := s.tryPutMoved(h, payload, same)
		if errors.Is(err, errEvicted) {
			if err = s.cache.Ensure(k); err == nil {
				continue
			}
		}
		if err != nil {
			return 0, err
		}
		return h.Size(), nil
	}
}

// tryPutMoved tries putMoved once. It returns the key of the leaf that it changes.
func (s *Store) tryPutMoved(h *format.RecordHeader, payload []byte, same func(*leafcache.Leaf) bool) (k leafcache.Key, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.catalog.branches[h.Branch]
	if b == nil {
		return k, errChanged
	}
	k = b.leaf(uint32(h.Block/format.LeafBlocks), head)
	err = s.install(b, h, payload, h.Blocks, wal.ForMoves, false, func(lf *leafcache.Leaf) error {
		if b.volume == nil || lf.Epoch() != b.Epoch || !same(lf) {
			return errChanged
		}
		return nil
	})
	if err == nil {
		s.cleaner.moved += uint64(h.Size())
	}
	return k, err
}

// still returns a function that reports whether n blocks of a record, beginning with block from, are still the own
// blocks of its volume's head.
func (m *mover) still(r *record, from, n int) func(*leafcache.Leaf) bool {
	first := int(r.h.Block%format.LeafBlocks) + from
	return func(lf *leafcache.Leaf) bool {
		for i := range n {
			if !lf.IsChanged(first+i) || lf.Entry(first+i) != r.name.WithIndex(from+i) {
				return false
			}
		}
		return m.s.slots.get(r.name.Slot()) == r.of // otherwise the entries mean another record by now
	}
}
