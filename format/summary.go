package format

// A chunk's summary (docs/format.md, Summary): an entry for each of its records, in order, and
// then the footer, with which the file ends.
const (
	// SummaryEntrySize is the size of a record's entry.
	SummaryEntrySize = 12
	// SummaryFooterSize is the size of the footer.
	SummaryFooterSize = 64

	summaryMagic     = "VDISKSUM"
	summaryFooterEnd = 40 // what the footer uses; the rest is zero

	// The bits of an entry's first 8 bytes, from the lowest: the first block (for an event, the
	// length of the payload), blocks - 1, kind, and then the size of a data or moved record / 16 / blocks
	// or the number of blocks of a hole.
	summaryBlocksAt = 40
	summaryKindAt   = 44
	summaryCountAt  = 48
)

// SummaryFooter says what a chunk's summary is about.
type SummaryFooter struct {
	// FirstSeq is the sequence number of the chunk's first record.
	FirstSeq uint64
	// Records is the number of records, and so of entries.
	Records int
	// End is where the last record ends in the chunk.
	End uint32
	// EntriesCRC is the Checksum of the entries.
	EntriesCRC uint32
}

// Size returns the size of the summary: the entries and the footer.
func (f *SummaryFooter) Size() int { return f.Records*SummaryEntrySize + SummaryFooterSize }

// Encode writes the footer to the front of dst, SummaryFooterSize bytes, for a summary that ends
// at end in the chunk with sequence number chunkSeq.
func (f *SummaryFooter) Encode(dst []byte, chunkSeq uint64, end uint32) {
	dst = dst[:SummaryFooterSize]
	clear(dst)
	copy(dst[4:], summaryMagic)
	le.PutUint32(dst[12:], layoutVersion)
	le.PutUint64(dst[16:], f.FirstSeq)
	le.PutUint32(dst[24:], uint32(f.Records))
	le.PutUint32(dst[28:], f.End)
	le.PutUint32(dst[32:], f.EntriesCRC)
	le.PutUint32(dst, saltedChecksum(chunkSeq, end, dst[4:summaryFooterEnd]))
}

// DecodeSummaryFooter reads the footer at the front of src, the last bytes of a file of end bytes that
// is the chunk with sequence number chunkSeq.
func DecodeSummaryFooter(src []byte, chunkSeq uint64, end uint32) (SummaryFooter, error) {
	const what = "summary"
	var f SummaryFooter
	if len(src) < SummaryFooterSize {
		return f, corrupt(what, "%d bytes of footer", len(src))
	}
	src = src[:summaryFooterEnd]
	if got, want := saltedChecksum(chunkSeq, end, src[4:]), le.Uint32(src); got != want {
		return f, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	if string(src[4:12]) != summaryMagic {
		return f, corrupt(what, "magic %q", src[4:12])
	}
	if err := checkVersion(what, int(le.Uint32(src[12:])), layoutVersion); err != nil {
		return f, err
	}
	f.FirstSeq, f.Records, f.End = le.Uint64(src[16:]), int(le.Uint32(src[24:])), le.Uint32(src[28:])
	f.EntriesCRC = le.Uint32(src[32:])
	if f.FirstSeq == 0 || f.Records == 0 || f.End <= ChunkHeaderSize || f.End > MaxChunkSize ||
		f.Records > int(f.End-ChunkHeaderSize)/minRecord || int64(f.End)+int64(f.Size()) > int64(end) || le.Uint32(src[36:]) != 0 {
		return SummaryFooter{}, corrupt(what, "%+v in a file of %d bytes", f, end)
	}
	return f, nil
}

// VerifyEntries checks the entries, which lie right before the footer, against it.
func (f *SummaryFooter) VerifyEntries(entries []byte) error {
	if len(entries) != f.Records*SummaryEntrySize {
		return corrupt("summary", "%d bytes of entries of %d records", len(entries), f.Records)
	}
	if got := Checksum(entries); got != f.EntriesCRC {
		return corrupt("summary", "checksum of the entries %08x, want %08x", got, f.EntriesCRC)
	}
	return nil
}

// AppendSummary appends a record's entry to dst. holeBlocks is the number of blocks of a hole, at
// most LeafBlocks.
func AppendSummary(dst []byte, h *RecordHeader, holeBlocks int) []byte {
	w := h.Block
	switch h.Kind {
	case KindEvent:
		w = uint64(h.PayloadLen)
	case KindHole:
		w |= uint64(holeBlocks) << summaryCountAt
	default:
		w |= uint64(h.Size()/RecordAlign/h.Blocks) << summaryCountAt
	}
	w |= uint64(h.Blocks-1)<<summaryBlocksAt | uint64(h.Kind)<<summaryKindAt
	return le.AppendUint32(le.AppendUint64(dst, w), h.Branch)
}

// SummaryEntry is what a summary says of a record: what a replay needs.
type SummaryEntry struct {
	Kind   Kind
	Branch uint32
	Block  uint64 // the first
	Blocks int    // of the unit or the hole; 1 for an event
	Size   int    // of the whole record
}

// DecodeSummaryEntry reads the entry at the front of src, SummaryEntrySize bytes.
func DecodeSummaryEntry(src []byte) (SummaryEntry, error) {
	w := le.Uint64(src)
	n := int(w>>summaryBlocksAt&(UnitBlocks-1)) + 1
	count := int(w >> summaryCountAt)
	e := SummaryEntry{Kind: Kind(w >> summaryKindAt & 0xf), Branch: le.Uint32(src[8:]), Block: w & (MaxBlocks - 1), Blocks: n}
	ok := false
	switch e.Kind {
	case KindData, KindMoved:
		e.Size = count * RecordAlign * n
		ok = e.Branch != 0 && int(e.Block%UnitBlocks)+n <= UnitBlocks && e.Size >= minRecord && count <= maxShare
	case KindHole:
		e.Blocks, e.Size = count, recordSize(HoleSize, 1)
		ok = e.Branch != 0 && n == 1 && count > 0 && count <= LeafBlocks && e.Block+uint64(count) <= MaxBlocks
	case KindEvent:
		e.Block, e.Size = 0, recordSize(int(w&MaxPayload), 1)
		ok = e.Branch == 0 && n == 1 && count == 0 && w&MaxPayload != 0 && w&(MaxBlocks-1) <= MaxPayload
	}
	if !ok {
		return SummaryEntry{}, corrupt("summary", "entry %x", src[:SummaryEntrySize])
	}
	return e, nil
}
