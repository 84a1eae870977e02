package format

// A chunk's summary has an entry for each of its records, in order, and then the footer, with which the file ends
// (docs/format.md, Summary).
const (
	// SummaryEntrySize is the size in bytes of the entry of one record.
	SummaryEntrySize = 12
	// SummaryFooterSize is the size in bytes of the footer.
	SummaryFooterSize = 64

	summaryMagic     = "VDISKSUM"
	summaryFooterEnd = 40 // where the zeros begin

	// The bits of an entry's first 8 bytes, from the lowest. They begin with the first block, or with the length of an
	// event's payload. Blocks - 1 and the kind follow. The last are the share of a data or moved record, in units of
	// RecordAlign, or the number of blocks of a hole.
	summaryBlocksAt = 40
	summaryKindAt   = 44
	summaryCountAt  = 48
)

// SummaryFooter is the footer of a summary. It says which records the summary lists.
type SummaryFooter struct {
	// FirstSeq is the sequence number of the chunk's first record.
	FirstSeq uint64
	// Records is the number of records, and so of entries. It is at least 1.
	Records int
	// End is the offset in the chunk at which the last record ends.
	End uint32
	// EntriesCRC is the Checksum of the entries.
	EntriesCRC uint32
}

// Size returns the size of the summary in bytes: the entries and the footer.
func (f *SummaryFooter) Size() int { return f.Records*SummaryEntrySize + SummaryFooterSize }

// Encode writes the footer to the first SummaryFooterSize bytes of dst. The summary ends at the offset end, where the
// file ends, in the chunk with sequence number chunkSeq. Encode panics if dst is shorter.
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

// DecodeSummaryFooter decodes the footer at the front of src, which are the last bytes of a file of end bytes. The file
// is the chunk with sequence number chunkSeq. The error matches ErrCorrupt or ErrVersion.
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

// VerifyEntries returns nil if entries, which lie right before the footer, have the length and the checksum in the
// footer. Otherwise it returns an error that matches ErrCorrupt.
func (f *SummaryFooter) VerifyEntries(entries []byte) error {
	if len(entries) != f.Records*SummaryEntrySize {
		return corrupt("summary", "%d bytes of entries of %d records", len(entries), f.Records)
	}
	if got := Checksum(entries); got != f.EntriesCRC {
		return corrupt("summary", "checksum of the entries %08x, want %08x", got, f.EntriesCRC)
	}
	return nil
}

// AppendSummary appends the entry of a record to dst and returns the extended slice. holeBlocks is the number of blocks
// of a hole, at most LeafBlocks. It is not used for other kinds.
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

// SummaryEntry is what a replay needs to know of one record.
type SummaryEntry struct {
	Kind   Kind
	Branch uint32
	Block  uint64 // the first block; 0 for an event
	Blocks int    // the number of blocks of the unit or the hole; 1 for an event
	Size   int    // the size of the whole record in bytes
}

// DecodeSummaryEntry decodes the entry at the front of src. The error matches ErrCorrupt. It panics if src has less
// than SummaryEntrySize bytes.
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
