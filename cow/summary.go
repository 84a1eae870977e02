package cow

import (
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// A chunk's summary says what a replay needs to know of its records: docs/format.md, Summary.

// summarize notes a record that is being appended. mu is held.
func (l *recordLog) summarize(h *format.RecordHeader, payload []byte) {
	holes := 0
	if h.Kind == format.KindHole {
		n, _ := format.DecodeHole(payload, h.Block) // our own
		holes = int(n)
	}
	l.entries = format.AppendSummary(l.entries, h, holes)
}

// queueSummary has the summary of a chunk that is full written behind its records. It ends where
// the file does. Its memory is its own, not one of the buffers that outlive the process: it means
// nothing until it is durable, and then it is in the file. mu is held.
func (l *recordLog) queueSummary(c *chunk) {
	if len(l.entries) == 0 {
		return
	}
	f := &format.SummaryFooter{Records: len(l.entries) / format.SummaryEntrySize, End: c.end}
	f.FirstSeq = l.nextSeq - uint64(f.Records)
	b := &buffer{chunk: c, n: f.Size(), data: l.entries, summary: f}
	b.off = c.size - uint32(b.n)
	l.entries, l.spareEntries = l.spareEntries, nil
	l.appended += uint64(b.n) // a sync that has not seen it is not enough
	l.queue = append(l.queue, b)
	poke(l.flushWork)
}

// finishSummary adds the footer.
func (b *buffer) finishSummary() {
	b.summary.EntriesCRC = format.Checksum(b.data)
	var footer [format.SummaryFooterSize]byte
	b.summary.Encode(footer[:], b.chunk.seq, b.off+uint32(b.n))
	b.data = append(b.data, footer[:]...)
}

// summary is one that was read: a footer that verifies, and the entries.
type summary struct {
	format.SummaryFooter
	entries []byte
}

// readSummary reads the summary of a chunk's file of size bytes; nil if there is none that verifies: then the records
// are read. That must not come and go: an error of the disk is an error.
func readSummary(f storage.File, c *chunk, size uint32) (*summary, error) {
	if size < format.ChunkHeaderSize+format.SummaryFooterSize {
		return nil, nil
	}
	var footer [format.SummaryFooterSize]byte
	at := int64(size) - format.SummaryFooterSize
	if n, err := readFull(f, footer[:], at); err != nil || n < len(footer) {
		return nil, err
	}
	h, err := format.DecodeSummaryFooter(footer[:], c.seq, size)
	if err != nil {
		return nil, nil
	}
	sum := &summary{h, make([]byte, h.Records*format.SummaryEntrySize)}
	n, err := readFull(f, sum.entries, at-int64(len(sum.entries)))
	if err != nil || n < len(sum.entries) || h.VerifyEntries(sum.entries) != nil {
		return nil, err
	}
	return sum, nil
}

// each calls fn with the records in order until it returns false. It fails where the entries are not what appending
// records makes.
func (m *summary) each(fn func(seq uint64, off uint32, e *format.SummaryEntry) bool) error {
	off, seq := uint32(format.ChunkHeaderSize), m.FirstSeq
	var e format.SummaryEntry
	var err error
	for b := m.entries; len(b) > 0; b = b[format.SummaryEntrySize:] {
		if e, err = format.DecodeSummaryEntry(b); err != nil {
			return err
		}
		if !fn(seq, off, &e) {
			return nil
		}
		off += uint32(e.Size)
		seq++
	}
	if off != m.End {
		return corruptf("the summary's records end at %d, not at %d", off, m.End)
	}
	return nil
}

// before reports whether every record of the summary is before seq.
func (m *summary) before(seq uint64) bool { return m.FirstSeq+uint64(m.Records) <= seq }
