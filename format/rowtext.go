package format

import (
	"bytes"
	"encoding"
	"math"
)

// Opening a store decodes a row for each volume, snapshot and branch, and encoding/json takes most of that time. So the
// text that AppendRow writes for a usual row is read here, in one pass: the fields in their order, without escapes, holds,
// properties or a reception. Any other text is not refused but left to decodeJSON. FuzzRow holds both to the same rows.

// usual is implemented by rows that may have a usual text.
type usual interface {
	// readUsual decodes text, and reports whether it was usual. If not, the row has any content.
	readUsual(text []byte) bool
}

func (v *Volume) readUsual(text []byte) bool {
	r := rowReader{text, true}
	r.skip(`{"id":`)
	v.ID = r.uint32()
	r.skip(`,"name":`)
	v.Name = string(r.text())
	r.skip(`,"size":`)
	v.Size = int64(r.number(math.MaxInt64))
	r.skip(`,"codec":`)
	r.into(&v.Codec)
	r.skip(`,"level":`)
	v.Level = int(r.number(math.MaxInt32))
	r.skip(`,"logical_block":`)
	v.LogicalBlock = int(r.number(math.MaxInt32))
	r.skip(`,"branch":`)
	v.Branch = r.uint32()
	r.skip(`,"created":`)
	r.into(&v.Created)
	return r.end()
}

func (s *Snapshot) readUsual(text []byte) bool {
	r := rowReader{text, true}
	r.skip(`{"id":`)
	s.ID = r.uint32()
	r.skip(`,"volume":`)
	s.Volume = r.uint32()
	r.skip(`,"name":`)
	s.Name = string(r.text())
	r.skip(`,"branch":`)
	s.Branch = r.uint32()
	r.skip(`,"epoch":`)
	s.Epoch = r.uint32()
	r.skip(`,"size":`)
	s.Size = int64(r.number(math.MaxInt64))
	r.skip(`,"created":`)
	r.into(&s.Created)
	r.skip(`,"guid":`)
	r.into(&s.GUID)
	return r.end()
}

func (b *Branch) readUsual(text []byte) bool {
	r := rowReader{text, true}
	r.skip(`{"id":`)
	b.ID = r.uint32()
	r.skip(`,"epoch":`)
	b.Epoch = r.uint32()
	r.skip(`,"origin_branch":`)
	b.OriginBranch = r.uint32()
	r.skip(`,"origin_epoch":`)
	b.OriginEpoch = r.uint32()
	return r.end()
}

// rowReader reads the text of a row from its front. Once something is not as it is asked for, ok is false for good, and
// what is returned means nothing.
type rowReader struct {
	left []byte
	ok   bool
}

// skip goes over a given text.
func (r *rowReader) skip(text string) {
	if r.ok = r.ok && len(r.left) >= len(text) && string(r.left[:len(text)]) == text; r.ok {
		r.left = r.left[len(text):]
	}
}

// end reports whether all was as it was asked for, and the row ends here.
func (r *rowReader) end() bool { return r.ok && string(r.left) == "}" }

func (r *rowReader) uint32() uint32 { return uint32(r.number(math.MaxUint32)) }

// number reads a number of digits. most is at least 9.
func (r *rowReader) number(most uint64) (n uint64) {
	i := 0
	for ; i < len(r.left) && r.left[i] >= '0' && r.left[i] <= '9'; i++ {
		digit := uint64(r.left[i] - '0')
		if i > 0 && n == 0 || n > (most-digit)/10 { // JSON has no leading zeros
			r.ok = false
			return 0
		}
		n = n*10 + digit
	}
	r.ok = r.ok && i > 0
	r.left = r.left[i:]
	return n
}

// text reads a string of printable ASCII without escapes.
func (r *rowReader) text() []byte {
	r.skip(`"`)
	n := bytes.IndexByte(r.left, '"')
	if r.ok = r.ok && n >= 0; !r.ok {
		return nil
	}
	text := r.left[:n]
	for _, c := range text {
		r.ok = r.ok && c >= ' ' && c <= '~' && c != '\\'
	}
	r.left = r.left[n+1:]
	return text
}

// into reads a string, and gives it to a value that decodes itself.
func (r *rowReader) into(v encoding.TextUnmarshaler) {
	if text := r.text(); r.ok {
		r.ok = v.UnmarshalText(text) == nil
	}
}
