package format

// Leaf is the map of LeafBlocks blocks of one branch as of the end of an epoch.
type Leaf struct {
	// Entries say where the blocks are.
	Entries [LeafBlocks]Entry
	// Changed has a bit for each block: whether its entry was put in this epoch.
	Changed [LeafBlocks / 64]uint64
}

// IsChanged reports the changed bit of block i of the leaf.
func (l *Leaf) IsChanged(i int) bool { return l.Changed[uint(i)/64%4]>>(uint(i)%64)&1 != 0 }

// SetChanged sets the changed bit of block i of the leaf.
func (l *Leaf) SetChanged(i int) { l.Changed[uint(i)/64%4] |= 1 << (uint(i) % 64) }

// The kinds of runs (docs/format.md, Leaf), in the high 2 bits of a byte whose
// low 6 hold the count less one, or runLong and one more byte with the count
// less one.
const (
	runHoles   = 0
	runSingles = 1 // records of one block each
	runUnit    = 2 // blocks of one record, with consecutive places in it
	runLog     = 3 // records of one block and one size, end to end in the log

	runLong = 63
)

const (
	leafHeaderSize = 40
	// MaxLeafSize bounds an encoded leaf: every block a run of its own, of
	// another unit, with the longest distances between slots.
	MaxLeafSize = leafHeaderSize + LeafBlocks*(1+1+4+maxSlotVarint)
	// A zig-zag of a distance of slots has 25 bits: 4 bytes of 7.
	maxSlotVarint = 4
)

// AppendLeaf appends the leaf's encoding to dst. Each entry is Valid.
func AppendLeaf(dst []byte, l *Leaf) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, layoutVersion, 0, 0, 0)
	for _, w := range l.Changed {
		dst = le.AppendUint64(dst, w)
	}
	var slot uint32
	for i := 0; i < LeafBlocks; {
		kind, n := nextRun(l.Entries[i:])
		dst = appendRunHead(dst, kind, n)
		first := l.Entries[i]
		switch kind {
		case runSingles:
			for _, e := range l.Entries[i : i+n] {
				dst, slot = appendPlace(dst, e, slot)
			}
		case runUnit:
			dst = append(dst, byte(first.Blocks()-1)<<4|byte(first.Index()))
			dst, slot = appendPlace(dst, first, slot)
		case runLog:
			dst, slot = appendPlace(dst, first, slot)
		}
		i += n
	}
	le.PutUint32(dst[start:], Checksum(dst[start+4:]))
	return dst
}

func appendRunHead(dst []byte, kind, n int) []byte {
	if n-1 < runLong {
		return append(dst, byte(kind<<6|(n-1)))
	}
	return append(dst, byte(kind<<6|runLong), byte(n-1))
}

// appendPlace appends an entry's offset and share, and its slot as the distance
// from the slot before it.
func appendPlace(dst []byte, e Entry, prev uint32) ([]byte, uint32) {
	dst = le.AppendUint32(dst, uint32(e&entryPlaceMask))
	d := int32(e.Slot()) - int32(prev)
	z := uint32(d<<1) ^ uint32(d>>31)
	for z >= 0x80 {
		dst = append(dst, byte(z)|0x80)
		z >>= 7
	}
	return append(dst, byte(z)), e.Slot()
}

// nextRun returns the run that entries, which are not none, begin with.
func nextRun(entries []Entry) (kind, n int) {
	first := entries[0]
	n = 1
	switch {
	case first == 0:
		for n < len(entries) && entries[n] == 0 {
			n++
		}
		return runHoles, n
	case first.Blocks() > 1:
		for n < len(entries) && first.Index()+n < first.Blocks() && entries[n] == first.WithIndex(first.Index()+n) {
			n++
		}
		return runUnit, n
	}
	for n < len(entries) && follows(entries[n-1], entries[n]) {
		n++
	}
	if n > 1 {
		return runLog, n
	}
	for n < len(entries) && entries[n] != 0 && entries[n].Blocks() == 1 &&
		(n+1 == len(entries) || !follows(entries[n], entries[n+1])) {
		n++
	}
	return runSingles, n
}

// follows reports whether b's record has one block and a's size, and begins
// where a's ends.
func follows(a, b Entry) bool {
	// Both are Valid, so the sum does not carry out of the offset unless the
	// record a ends its chunk, and then b would have offset 0, which is not.
	return b.Blocks() == 1 && b == a+Entry(a.Share()/RecordAlign)
}

// DecodeLeaf reads an encoded leaf, which is all of src, into l. After an error
// l holds nothing of use.
func DecodeLeaf(src []byte, l *Leaf) error {
	const what = "leaf"
	if len(src) < leafHeaderSize || len(src) > MaxLeafSize {
		return corrupt(what, "%d bytes", len(src))
	}
	if got, want := Checksum(src[4:]), le.Uint32(src); got != want {
		return corrupt(what, "checksum %08x, want %08x", got, want)
	}
	if err := checkVersion(what, int(src[4]), layoutVersion); err != nil {
		return err
	}
	if src[5]|src[6]|src[7] != 0 {
		return corrupt(what, "flags %x", src[5:8])
	}
	for i := range l.Changed {
		l.Changed[i] = le.Uint64(src[8+8*i:])
	}
	rest, covered := decodeRuns(src[leafHeaderSize:], &l.Entries)
	if covered != LeafBlocks || len(rest) != 0 {
		return corrupt(what, "invalid run at block %d, byte %d", covered, len(src)-len(rest))
	}
	return nil
}

// decodeRuns reads runs until the entries are covered or a run is invalid; it
// returns what follows the last good run and the number of entries it covered.
func decodeRuns(src []byte, entries *[LeafBlocks]Entry) (rest []byte, covered int) {
	var slot uint32
	for covered < LeafBlocks {
		kind, n, tail := decodeRunHead(src)
		if n == 0 || n > LeafBlocks-covered {
			return src, covered
		}
		tail = decodeRun(tail, kind, &slot, entries[covered:covered+n])
		if tail == nil {
			return src, covered
		}
		src, covered = tail, covered+n
	}
	return src, covered
}

func decodeRunHead(src []byte) (kind, n int, tail []byte) {
	if len(src) == 0 {
		return 0, 0, nil
	}
	kind, n, src = int(src[0]>>6), int(src[0]&runLong)+1, src[1:]
	if n == runLong+1 {
		if len(src) == 0 {
			return 0, 0, nil
		}
		n, src = int(src[0])+1, src[1:]
	}
	return kind, n, src
}

// decodeRun reads the body of a run into out, which is not empty; slot is the
// slot of the entry before, and then of the run's last. It returns what follows
// the run, which is not nil, or nil.
func decodeRun(src []byte, kind int, slot *uint32, out []Entry) []byte {
	switch kind {
	case runHoles:
		clear(out)
		return src
	case runSingles:
		return decodeSingles(src, slot, out)
	case runLog:
		if src = decodeSingles(src, slot, out[:1]); src == nil {
			return nil
		}
		e, step := out[0], Entry(out[0].Share()/RecordAlign)
		for i := 1; i < len(out); i++ {
			if e += step; !e.Valid() {
				return nil
			}
			out[i] = e
		}
		return src
	default:
		return decodeUnit(src, slot, out)
	}
}

func decodeUnit(src []byte, slot *uint32, out []Entry) []byte {
	if len(src) == 0 {
		return nil
	}
	blocks, index := int(src[0]>>4)+1, int(src[0]&0xf)
	if blocks < 2 || index+len(out) > blocks {
		return nil
	}
	e, src := decodePlace(src[1:], slot)
	e |= Entry(blocks-1)<<entryBlocksAt | Entry(index)<<entryIndexAt
	if src == nil || !e.Valid() {
		return nil
	}
	for i := range out {
		out[i] = e.WithIndex(index + i)
	}
	return src
}

// decodeSingles is what nearly all of a leaf written at random is made of.
func decodeSingles(src []byte, slot *uint32, out []Entry) []byte {
	prev := *slot
	for i := range out {
		var e Entry
		e, src = decodePlace(src, &prev)
		if src == nil || !e.validSingle() {
			return nil
		}
		out[i] = e
	}
	*slot = prev
	return src
}

// validSingle is Valid for what decodePlace returns, in half the time.
func (e Entry) validSingle() bool {
	offset, share := uint32(e&entryOffsetMask), uint32(e>>entryShareAt&entryShareMask)
	return share >= minRecord/RecordAlign && share <= maxShare &&
		offset >= ChunkHeaderSize/RecordAlign && offset+share <= 1<<entryOffsetBits
}

// decodePlace reads what appendPlace wrote: the entry of a single-block record,
// which may not be Valid, and what follows it, or nil.
func decodePlace(src []byte, slot *uint32) (Entry, []byte) {
	if len(src) < 5 {
		return 0, nil
	}
	place := le.Uint32(src)
	z, n := uint32(src[4]), 5
	if z >= 0x80 {
		if z, n = slotVarint(src[4:]); n == 0 {
			return 0, nil
		}
		n += 4
	}
	s := *slot + (z>>1 ^ -(z & 1))
	if s >= MaxSlots || place>>entryBlocksAt != 0 {
		return 0, nil
	}
	*slot = s
	return entrySet | Entry(s)<<entrySlotAt | Entry(place), src[n:]
}

// slotVarint reads a varint of 2 to maxSlotVarint bytes and returns their
// number, or 0.
func slotVarint(src []byte) (z uint32, n int) {
	if len(src) >= maxSlotVarint {
		w := le.Uint32(src)
		switch {
		case w&0x8000 == 0:
			return w&0x7f | w>>1&(0x7f<<7), 2
		case w&0x800000 == 0:
			return w&0x7f | w>>1&(0x7f<<7) | w>>2&(0x7f<<14), 3
		case w&0x80000000 == 0:
			return w&0x7f | w>>1&(0x7f<<7) | w>>2&(0x7f<<14) | w>>3&(0x7f<<21), 4
		}
		return 0, 0
	}
	for n < len(src) {
		b := uint32(src[n])
		z |= b & 0x7f << (7 * n)
		n++
		if b < 0x80 {
			return z, n
		}
	}
	return 0, 0
}
