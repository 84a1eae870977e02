package format

// Leaf is the map of LeafBlocks blocks of one branch as of the end of an epoch.
type Leaf struct {
	// Entries has the entry of each block.
	Entries [LeafBlocks]Entry
	// Changed has a bit for each block, the lowest of the first word for block 0. It is set if the entry was put in
	// this epoch.
	Changed [LeafBlocks / 64]uint64
}

// IsChanged reports whether the changed bit of block i is set. i is less than LeafBlocks.
func (l *Leaf) IsChanged(i int) bool { return l.Changed[uint(i)/64%4]>>(uint(i)%64)&1 != 0 }

// SetChanged sets the changed bit of block i. i is less than LeafBlocks.
func (l *Leaf) SetChanged(i int) { l.Changed[uint(i)/64%4] |= 1 << (uint(i) % 64) }

// The kinds of runs, as the package comment draws them. A run begins with a byte. Its high 2 bits are the kind. Its low
// 6 bits are the count less one, or runLong if one more byte holds the count less one.
const (
	runHoles   = 0
	runSingles = 1 // records of one block each
	runUnit    = 2 // consecutive blocks of one record
	runLog     = 3 // records of one block and one size, end to end in the log

	runLong = 63
)

const (
	leafHeaderSize = 40
	// MaxLeafSize bounds the size in bytes of an encoded leaf. In the worst case each block is a run of its own, of
	// another unit, and the distances between slots are the longest.
	MaxLeafSize = leafHeaderSize + LeafBlocks*(1+1+4+maxSlotVarint)
	// A zig-zag distance of slots has 25 bits: 4 bytes of 7 bits.
	maxSlotVarint = 4
)

// AppendLeaf appends the encoding of the leaf to dst and returns the extended slice. All entries of the leaf must be
// Valid.
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
		dst, slot = appendRun(dst, kind, l.Entries[i:i+n], slot)
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

// appendRun appends the body of a run. It returns the slot of its last place, or prev if it has none.
func appendRun(dst []byte, kind int, run []Entry, prev uint32) ([]byte, uint32) {
	first := run[0]
	switch kind {
	case runSingles:
		for _, e := range run {
			dst, prev = appendPlace(dst, e, prev)
		}
	case runUnit:
		dst = append(dst, byte(first.Blocks()-1)<<4|byte(first.Index()))
		dst, prev = appendPlace(dst, first, prev)
	case runLog:
		dst, prev = appendPlace(dst, first, prev)
	}
	return dst, prev
}

// appendPlace appends an entry's offset and share, and the distance of its slot from the slot prev. It returns the
// entry's slot.
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

// nextRun returns the kind and the length of the run that entries begin with. entries is not empty.
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

// follows reports whether b's record has one block and the size of a's record, and begins where a's record ends.
func follows(a, b Entry) bool {
	// Both are Valid. So the sum carries out of the offset only if the record of a ends its chunk. Then b would have
	// offset 0, and would not be Valid.
	return b.Blocks() == 1 && b == a+Entry(a.Share()/RecordAlign)
}

// DecodeLeaf decodes a leaf, which is all of src, into l. The error matches ErrCorrupt or ErrVersion. After an error
// the content of l is undefined.
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

// decodeRuns decodes runs until all entries are covered or a run is invalid. It returns the bytes behind the last valid
// run, and the number of entries that the valid runs cover.
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

// decodeRun decodes the body of a run into out, which is not empty. slot is the slot of the place before the run;
// decodeRun sets it to the slot of the last place in the run. It returns the bytes behind the run, or nil if the run is
// invalid.
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

// decodeSingles decodes one place for each entry of out. A leaf that was written at random consists of little else.
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

// validSingle is Valid for entries that decodePlace returns, in half the time.
func (e Entry) validSingle() bool {
	offset, share := uint32(e&entryOffsetMask), uint32(e>>entryShareAt&entryShareMask)
	return share >= minRecord/RecordAlign && share <= maxShare &&
		offset >= ChunkHeaderSize/RecordAlign && offset+share <= 1<<entryOffsetBits
}

// decodePlace decodes what appendPlace wrote: the entry of a single-block record, which may not be Valid, and the bytes
// behind it. It returns nil bytes if src is invalid.
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

// slotVarint decodes a varint of 2 to maxSlotVarint bytes and returns its length, or 0 if it is invalid.
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
