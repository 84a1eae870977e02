package cow

import (
	"errors"

	"github.com/vdisk/vdisk/format"
)

// A record that is damaged, and whose content an image has, is healed for all that share it: docs/engine.md, Healing.

// healTries is how often a checkpoint is made to heal one record.
const healTries = 3

// healer heals records of a store. One goroutine at a time uses it.
type healer struct {
	m       *mover
	ready   bool // a checkpoint has been made
	coders  map[format.Codec][]*format.Compressor
	trimmed []byte
}

func newHealer(s *Store) *healer { return &healer{m: newMover(s)} }

// heal makes the record that an entry names whole again, for all that refer to it, if unit is proved to be its content.
// was is the entry of the unit's first block. The record is copied with that content, like one that the cleaner moves. The
// damaged one stays as it is. ok is false if the proof fails, or if there is no room.
func (h *healer) heal(was content, unit []byte) (ok bool, err error) {
	s := h.m.s
	c, at, err := s.placeOf(was)
	if c == nil || err != nil {
		return false, err
	}
	defer c.Release()
	head, payload := h.prove(c, at, was.e, unit)
	if payload == nil {
		return false, nil
	}
	if !h.ready { // as for the cleaner, the record has to lie before the replay position
		if err := s.Checkpoint(); err != nil {
			return false, ignoreNoSpace(err)
		}
		h.ready = true
	}
	for range healTries {
		if ok, err = h.move(c, head, payload, at.Offset()); !errors.Is(err, errFull) {
			return ok, ignoreNoSpace(err)
		}
		if err := s.Checkpoint(); err != nil {
			return false, ignoreNoSpace(err)
		}
	}
	return false, nil
}

func ignoreNoSpace(err error) error {
	if errors.Is(err, ErrNoSpace) {
		return nil
	}
	return err
}

// placeOf returns where the record is that an entry names, and its chunk with a reference taken: its copy, if it was
// moved. c is nil if it is not there any more.
func (s *Store) placeOf(was content) (c *chunk, at format.Entry, err error) {
	if s.slots.get(was.e.Slot()) != was.c {
		return nil, 0, nil
	}
	to, moved, err := s.forwards.lookup(was.e)
	if err != nil {
		return nil, 0, err
	}
	c, at = was.c, was.e
	if moved {
		c, at = s.slots.get(to.To.Slot()), to.To
	}
	if c == nil || c.gone || !c.TryAcquire() {
		return nil, 0, nil
	}
	return c, at, nil
}

// prove returns the header of a record, and the payload that it had if its unit was the given one. The payload is nil if
// the header does not verify, or if its checksum is of other content.
func (h *healer) prove(c *chunk, at, name format.Entry, unit []byte) (*format.RecordHeader, []byte) {
	var raw [format.RecordHeaderSize + format.MovedSize]byte
	if h.m.s.readRecord(c, at.Offset(), raw[:]) != nil {
		return nil, nil
	}
	head, err := format.DecodeRecordHeader(raw[:], c.Seq, at.Offset())
	if err != nil || head.Blocks != at.Blocks() || head.Size() != at.Size() || len(unit) != head.Blocks*format.BlockSize {
		return nil, nil
	}
	switch head.Kind {
	case format.KindData:
		return &head, h.proveUnit(&head, nil, unit)
	case format.KindMoved: // its dead blocks may have been left out
		prefix := raw[format.RecordHeaderSize:]
		was, err := format.DecodeMoved(&head, prefix)
		if err != nil || was.From != name.WithIndex(0) {
			return nil, nil
		}
		if payload := h.proveUnit(&head, prefix, unit); payload != nil {
			return &head, payload
		}
		h.trimmed = append(h.trimmed[:0], unit...)
		leaveOut(h.trimmed, was.Mask)
		return &head, h.proveUnit(&head, prefix, h.trimmed)
	}
	return nil, nil
}

// proveUnit compresses a unit in each way in which the record may have been, and returns the payload that has the
// record's checksum, or nil.
func (h *healer) proveUnit(head *format.RecordHeader, prefix, unit []byte) []byte {
	for _, c := range h.codersOf(head.Codec) {
		out, codec := c.Compress(h.m.comp, unit)
		if codec != head.Codec {
			continue
		}
		payload := append(append(make([]byte, 0, len(prefix)+len(out)), prefix...), out...)
		if head.VerifyPayload(payload) == nil {
			return payload
		}
	}
	return nil
}

// codersOf returns the compressors of a codec that differ in what they write.
func (h *healer) codersOf(codec format.Codec) []*format.Compressor {
	if list, ok := h.coders[codec]; ok {
		return list
	}
	levels := []int{0}
	if codec == format.Zstd {
		levels = []int{0, 1, 7, coldLevel}
	}
	var list []*format.Compressor
	for _, level := range levels {
		if c, err := format.NewCompressor(codec, level); err == nil { // another codec proves nothing
			list = append(list, c)
		}
	}
	if h.coders == nil {
		h.coders = map[format.Codec][]*format.Compressor{}
	}
	h.coders[codec] = list
	return list
}

// move copies a record with a payload that was proved. ok is false if it is not there any more.
func (h *healer) move(c *chunk, head *format.RecordHeader, payload []byte, off uint32) (ok bool, err error) {
	m, s := h.m, h.m.s
	s.cleaner.mu.Lock()
	defer s.cleaner.mu.Unlock()
	m.c = c
	if _, here := m.look(); !here {
		return false, nil
	}
	r, err := m.decode(head, payload, off)
	if err != nil {
		return false, err
	}
	if ok, err = m.find(&r); !ok || err != nil {
		return false, err
	}
	_, err = m.moveAgain(&r)
	return err == nil, err
}
