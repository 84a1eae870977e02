package wal

import (
	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
)

// A chunk's summary holds what a replay needs to know of the chunk's records: docs/format.md, Summary.

// summarize adds a record that is being appended to the summary. The caller holds mu.
func (l *Log) summarize(h *format.RecordHeader, payload []byte) {
	holes := 0
	if h.Kind == format.KindHole {
		n, _ := format.DecodeHole(payload, h.Block) // cannot fail: the payload is our own
		holes = int(n)
	}
	l.entries = format.AppendSummary(l.entries, h, holes)
}

// queueSummary queues the summary of a full chunk to be written behind its records. The summary ends where the file
// ends. Its memory is not one of the buffers that outlive the process: the summary means nothing until it is durable,
// and then it is in the file. The caller holds mu.
func (l *Log) queueSummary(c *Chunk) {
	if len(l.entries) == 0 {
		return
	}
	f := &format.SummaryFooter{Records: len(l.entries) / format.SummaryEntrySize, End: c.End}
	f.FirstSeq = l.nextSeq - uint64(f.Records)
	b := &buffer{chunk: c, n: f.Size(), data: l.entries, summary: f}
	b.off = c.Size - uint32(b.n)
	l.entries, l.spareEntries = l.spareEntries, nil
	l.appended += uint64(b.n) // a sync that did not include the summary is not enough
	l.queue = append(l.queue, b)
	Poke(l.flushWork)
}

// finishSummary appends the footer to the entries.
func (b *buffer) finishSummary() {
	b.summary.EntriesCRC = format.Checksum(b.data)
	var footer [format.SummaryFooterSize]byte
	b.summary.Encode(footer[:], b.chunk.Seq, b.off+uint32(b.n))
	b.data = append(b.data, footer[:]...)
}

// Summary is a summary that was read: the entries, and a footer that verifies.
type Summary struct {
	format.SummaryFooter
	entries []byte
}

// Summary reads the chunk's summary, from the end of its file. It returns nil if there is no summary that verifies;
// then the caller reads the records. That choice must not vary from one time to the next, so a read error is returned
// as an error.
func (c *Chunk) Summary() (*Summary, error) { return c.summary(c.Size) }

// SummaryInFile is Summary for a chunk that is not being replayed, whose file may be larger than Size says.
func (c *Chunk) SummaryInFile() (*Summary, error) {
	f, err := c.Handle()
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return c.summary(uint32(min(size, format.MaxChunkSize)))
}

// summary reads the summary of a file of size bytes.
func (c *Chunk) summary(size uint32) (*Summary, error) {
	if size < format.ChunkHeaderSize+format.SummaryFooterSize {
		return nil, nil
	}
	f, err := c.Handle()
	if err != nil {
		return nil, err
	}
	var footer [format.SummaryFooterSize]byte
	at := int64(size) - format.SummaryFooterSize
	if n, err := ReadFull(f, footer[:], at); err != nil || n < len(footer) {
		return nil, err
	}
	h, err := format.DecodeSummaryFooter(footer[:], c.Seq, size)
	if err != nil {
		return nil, nil
	}
	sum := &Summary{h, make([]byte, h.Records*format.SummaryEntrySize)}
	n, err := ReadFull(f, sum.entries, at-int64(len(sum.entries)))
	if err != nil || n < len(sum.entries) || h.VerifyEntries(sum.entries) != nil {
		return nil, err
	}
	return sum, nil
}

// Each calls fn with the records in order until fn returns false. It returns an error if the entries are not what
// appending records can produce.
func (m *Summary) Each(fn func(seq uint64, off uint32, e *format.SummaryEntry) bool) error {
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
		return fault.Corruptf("the summary's records end at %d, not at %d", off, m.End)
	}
	return nil
}

// Before reports whether all records of the summary have numbers below seq.
func (m *Summary) Before(seq uint64) bool { return m.FirstSeq+uint64(m.Records) <= seq }
