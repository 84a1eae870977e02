package format

import "math/bits"

// Packed is a leaf in memory, as small as it can be and still be looked up in. It never changes, and any number of
// goroutines may read it. The words of the slice, of 64 bits each:
//
//	+--------+------------------+-------- ... --------+
//	| word 0 | changed (0 or 4) | a sequence or groups |
//	+--------+------------------+-------- ... --------+
//
// A sequence is a leaf whose blocks are all mapped, to records of 1, 2, 4, 8 or 16 blocks that follow one another in
// the log without a gap. Bit 63 of word 0 tells a sequence (1) from groups (0).
//
//	word 0     sequence: the entry of block 0, with the smallest share of all records
//	           groups: the smallest slot of the single-block records
//	           both: the bits of the index say how the changed bits are kept (changedNone, ...)
//	changed    the changed bits, if they are listed
//	sequence   0, 1, 2, 4 or 8 bits a record: its share less the smallest share, in units of RecordAlign
//	groups     a word of 16 codes of 4 bits, then the words of each group of 16 blocks, by its code:
//
//	           0        none: all blocks are holes
//	           1        the entry of a record that is the whole group
//	           2..11    a word of 16 selectors of 4 bits, then code - 1 words: the entries that the selectors
//	                    choose, from 1; 0 is a hole
//	           12       single-block records, 16 × 48 bits: 31 bits of offset and share, a set bit, and 16
//	                    bits of the slot less the smallest slot; 0 is a hole
//	           13       16 entries
type Packed []uint64

// MaxPacked bounds the number of words of a Packed.
const MaxPacked = 2 + 4 + LeafBlocks

// How the changed bits are kept.
const (
	changedNone   = 0 // no bit is set
	changedMapped = 1 // the bits of exactly the blocks that are not holes are set
	changedListed = 2 // the bits follow word 0
)

const (
	groupBlocks = UnitBlocks
	groupCount  = LeafBlocks / groupBlocks

	groupUnit    = 1
	groupFew     = 1 // plus the number of records
	groupMaxFew  = 10
	groupSingles = 12
	groupEntries = 13

	singlesWords = 12
	slotMask     = MaxSlots - 1
)

// AppendPacked appends the packed leaf to dst and returns the extended slice. All entries of the leaf must be Valid. It
// does not allocate if dst has room for MaxPacked words.
func AppendPacked(dst []uint64, l *Leaf) Packed {
	mode := uint64(changedMode(l))
	from := len(dst)
	dst = append(dst, mode<<entryIndexAt)
	if mode == changedListed {
		dst = append(dst, l.Changed[:]...)
	}
	if out, base := appendSequence(dst, l); base != 0 {
		out[from] |= uint64(base)
		return out
	}
	slot := uint32(slotMask)
	for _, e := range l.Entries {
		if e != 0 && e.Blocks() == 1 {
			slot = min(slot, e.Slot())
		}
	}
	dst[from] |= uint64(slot)
	at := len(dst)
	dst = append(dst, 0)
	for g := range groupCount {
		var code int
		code, dst = appendGroup(dst, (*[groupBlocks]Entry)(l.Entries[g*groupBlocks:]), slot)
		dst[at] |= uint64(code) << (4 * g)
	}
	return dst
}

func changedMode(l *Leaf) int {
	switch l.Changed {
	case [4]uint64{}:
		return changedNone
	case mappedBits(l):
		return changedMapped
	}
	return changedListed
}

// mappedBits returns a bit for each block that is not a hole.
func mappedBits(l *Leaf) (set [LeafBlocks / 64]uint64) {
	for w := range set {
		for i, e := range l.Entries[w*64 : w*64+64] {
			set[w] |= uint64(e>>63) << i
		}
	}
	return set
}

// appendSequence appends the shares of a sequence, and returns the extended slice and the bits of word 0. If the leaf
// is no sequence, the bits are 0.
func appendSequence(dst []uint64, l *Leaf) ([]uint64, Entry) {
	first := l.Entries[0]
	n := first.Blocks()
	if first == 0 || first.Index() != 0 || n&(n-1) != 0 {
		return nil, 0
	}
	const shares = Entry(entryShareMask) << entryShareAt
	low, high := uint64(entryShareMask), uint64(0)
	want := first
	for i := 0; i < LeafBlocks; i += n {
		e := l.Entries[i]
		if (e^want)&^shares != 0 {
			return nil, 0
		}
		for j := 1; j < n; j++ {
			if l.Entries[i+j] != e.WithIndex(j) {
				return nil, 0
			}
		}
		share := e & shares >> entryShareAt
		low, high = min(low, uint64(share)), max(high, uint64(share))
		want = e + share*Entry(n) // carries out of the offset only to 0, which is not Valid; see follows
	}
	if high-low > 0xff {
		return nil, 0
	}
	width := shareWidth(high-low, n)
	for i := 0; width > 0 && i < LeafBlocks; i += 64 / width * n {
		var w uint64
		for j := range 64 / width {
			w |= (uint64(l.Entries[i+j*n]>>entryShareAt&entryShareMask) - low) << (width * j)
		}
		dst = append(dst, w)
	}
	return dst, first&^shares | Entry(low)<<entryShareAt
}

// shareWidth returns the number of bits for each share of the records of n blocks. It is the smallest width that holds
// most and fills whole words. A reader derives it from the number of words, which is LeafBlocks / n × width / 64.
func shareWidth(most uint64, n int) int {
	if most == 0 {
		return 0
	}
	for width := 1; ; width *= 2 {
		if most < 1<<width && width*LeafBlocks/n >= 64 {
			return width
		}
	}
}

// appendGroup appends a group and returns its code. slot is the smallest slot of the single-block records.
func appendGroup(dst []uint64, es *[groupBlocks]Entry, slot uint32) (code int, out []uint64) {
	mapped, singles := 0, true
	for _, e := range es {
		if e != 0 {
			mapped++
			singles = singles && e.Blocks() == 1 && e.Slot()-slot < 1<<16
		}
	}
	if mapped == 0 {
		return 0, dst
	}
	if !singles || mapped <= groupMaxFew { // otherwise all records differ, and are too many
		if code, out = appendFew(dst, es); code != 0 {
			return code, out
		}
	}
	if !singles {
		for _, e := range es {
			dst = append(dst, uint64(e))
		}
		return groupEntries, dst
	}
	var w [singlesWords]uint64
	for i, e := range es {
		if e != 0 {
			v := uint64(e&entryPlaceMask) | 1<<31 | uint64(e.Slot()-slot)<<32
			at, shift := singleAt(i)
			w[at] |= v << shift
			if shift > 64-singleBits {
				w[at+1] = v >> (64 - shift)
			}
		}
	}
	return groupSingles, append(dst, w[:]...)
}

// appendFew appends a group of at most groupMaxFew records. It returns the code 0 if there are more.
func appendFew(dst []uint64, es *[groupBlocks]Entry) (code int, out []uint64) {
	var few [groupMaxFew]Entry
	n, selectors := 0, uint64(0)
	for i, e := range es {
		if e == 0 {
			continue
		}
		e = e.WithIndex((e.Index() - i) & (groupBlocks - 1)) // the same for all blocks of the record
		j := n - 1
		for j >= 0 && few[j] != e {
			j--
		}
		if j < 0 {
			if n == groupMaxFew {
				return 0, dst
			}
			few[n] = e
			j, n = n, n+1
		}
		selectors |= uint64(j+1) << (4 * i)
	}
	if n == 1 && few[0].Blocks() == groupBlocks && selectors == 0x1111_1111_1111_1111 {
		return groupUnit, append(dst, uint64(few[0]))
	}
	dst = append(dst, selectors)
	for _, e := range few[:n] {
		dst = append(dst, uint64(e))
	}
	return groupFew + n, dst
}

func (p Packed) mode() int { return int(p[0] >> entryIndexAt & 3) }

// body returns the index of the word behind the changed bits.
func (p Packed) body() int {
	if p.mode() == changedListed {
		return 5
	}
	return 1
}

// Entry returns the entry of block i. i must be less than LeafBlocks.
func (p Packed) Entry(i int) Entry {
	at := p.body()
	if p[0]>>63 != 0 {
		return sequenceEntry(Entry(p[0]), p[at:], i)
	}
	codes := p[at]
	g := uint(i) / groupBlocks % groupCount
	return p.groupEntry(at+1+groupOffset(codes, g), int(codes>>(4*g)&15), i%groupBlocks)
}

// groupOffset returns the number of words of the groups before g: the sum of their codes, and 3 more for each
// groupEntries.
func groupOffset(codes uint64, g uint) int {
	codes &= 1<<(4*g) - 1
	const nibbles = 0x0f0f_0f0f_0f0f_0f0f
	sum := int((codes&nibbles + codes>>4&nibbles) * 0x0101_0101_0101_0101 >> 56)
	x := codes ^ groupEntries*0x1111_1111_1111_1111
	x = (x | x>>1 | x>>2 | x>>3) & 0x1111_1111_1111_1111
	return sum + (groupBlocks-groupEntries)*(groupCount-bits.OnesCount64(x))
}

func (p Packed) groupEntry(at, code, i int) Entry {
	switch code {
	case 0:
		return 0
	case groupUnit:
		return Entry(p[at]).WithIndex(i)
	case groupEntries:
		return Entry(p[at+i])
	case groupSingles:
		return singleEntry((*[singlesWords]uint64)(p[at:]), i, uint32(p[0]&slotMask))
	}
	sel := int(p[at] >> (4 * i) & 15)
	if sel == 0 {
		return 0
	}
	e := Entry(p[at+sel])
	return e.WithIndex((e.Index() + i) & (groupBlocks - 1))
}

const singleBits = 48

// singleAt returns where the 48 bits of a single-block record begin in its group.
func singleAt(i int) (word int, shift uint) { return i * singleBits / 64, uint(i * singleBits % 64) }

func singleEntry(w *[singlesWords]uint64, i int, slot uint32) Entry {
	at, shift := singleAt(i)
	v := w[at] >> shift
	if shift > 64-singleBits {
		v |= w[at+1] << (64 - shift)
	}
	if v&(1<<31) == 0 {
		return 0
	}
	return entrySet | Entry(slot+uint32(v>>32&0xffff))<<entrySlotAt | Entry(v&entryPlaceMask)
}

// sequenceEntry returns the entry of block i. The record of the block begins where the records before it end, so their
// shares are added up.
func sequenceEntry(base Entry, shares []uint64, i int) Entry {
	n := uint(base.Blocks())
	log := uint(bits.TrailingZeros(n))
	r := uint(i) >> log
	low := uint64(base >> entryShareAt & entryShareMask)
	sum, share := low*uint64(r), uint64(0)
	if width := uint(len(shares)) << log / 4; width > 0 {
		at, shift := r*width/64, r*width%64
		for _, w := range shares[:at] {
			sum += addFields(w, width)
		}
		w := shares[at]
		sum += addFields(w&(1<<shift-1), width)
		share = w >> shift & (1<<width - 1)
	}
	return base&^entryIndexMask + Entry(sum<<log) + Entry(share)<<entryShareAt + Entry(uint(i)&(n-1))<<entryIndexAt
}

// addFields adds up the fields of a word, which have 1, 2, 4 or 8 bits each.
func addFields(w uint64, width uint) uint64 {
	const pairs, nibbles, bytes = 0x3333_3333_3333_3333, 0x0f0f_0f0f_0f0f_0f0f, 0x00ff_00ff_00ff_00ff
	switch width {
	case 1:
		return uint64(bits.OnesCount64(w))
	case 2:
		w = w&pairs + w>>2&pairs
		fallthrough
	case 4:
		w = w&nibbles + w>>4&nibbles
	}
	return (w&bytes + w>>8&bytes) * 0x0001_0001_0001_0001 >> 48
}

// IsChanged reports whether the changed bit of block i is set. i must be less than LeafBlocks.
func (p Packed) IsChanged(i int) bool {
	switch p.mode() {
	case changedNone:
		return false
	case changedMapped:
		return p.Entry(i) != 0
	}
	return p[1+uint(i)/64%4]>>(uint(i)%64)&1 != 0
}

// Unpack writes the whole leaf into l.
func (p Packed) Unpack(l *Leaf) {
	if at := p.body(); p[0]>>63 != 0 {
		unpackSequence(Entry(p[0]), p[at:], l)
	} else {
		p.unpackGroups(at, l)
	}
	switch p.mode() {
	case changedNone:
		l.Changed = [4]uint64{}
	case changedListed:
		copy(l.Changed[:], p[1:5])
	default:
		l.Changed = mappedBits(l)
	}
}

func unpackSequence(base Entry, shares []uint64, l *Leaf) {
	n := base.Blocks()
	low := base >> entryShareAt & entryShareMask
	base &^= entryIndexMask | entryShareMask<<entryShareAt
	width := len(shares) * n / 4
	for i, at := 0, 0; i < LeafBlocks; i, at = i+n, at+width {
		share := low
		if width > 0 {
			share += Entry(shares[at/64] >> (at % 64) & (1<<width - 1))
		}
		e := base | share<<entryShareAt
		for j := range n {
			l.Entries[i+j] = e | Entry(j)<<entryIndexAt
		}
		base += share * Entry(n)
	}
}

func (p Packed) unpackGroups(at int, l *Leaf) {
	codes, slot := p[at], uint32(p[0]&slotMask)
	at++
	for g := range groupCount {
		es := (*[groupBlocks]Entry)(l.Entries[g*groupBlocks:])
		code := int(codes >> (4 * g) & 15)
		switch code {
		case 0:
			*es = [groupBlocks]Entry{}
		case groupSingles:
			w := (*[singlesWords]uint64)(p[at:])
			for i := range es {
				es[i] = singleEntry(w, i, slot)
			}
		case groupEntries:
			for i := range es {
				es[i] = Entry(p[at+i])
			}
			at += groupBlocks - groupEntries
		default:
			for i := range es {
				es[i] = p.groupEntry(at, code, i)
			}
		}
		at += code
	}
}
