package wal

import "time"

// UUID returns the store's id.
func (l *Log) UUID() [16]byte { return l.uuid }

// The state of the log. The caller of each method holds mu, or is alone with the log, as in a replay.

// NextSeq returns the sequence number of the next record.
func (l *Log) NextSeq() uint64 { return l.nextSeq }

// NextChunk returns the sequence number of the next chunk to be made.
func (l *Log) NextChunk() uint64 { return l.nextChunk }

// Durable returns the sequence number before which every record is durable.
func (l *Log) Durable() uint64 { return l.durable }

// Appended returns the number of bytes that were appended over the life of the process.
func (l *Log) Appended() uint64 { return l.appended }

// Capacity returns the room for chunk files in bytes, used or not, when a chunk was last made; 0: not known.
func (l *Log) Capacity() int64 { return l.capacity }

// Current returns the chunk that takes the records; nil until the first record.
func (l *Log) Current() *Chunk { return l.current }

// Next returns the chunk that was made in advance; nil if there is none.
func (l *Log) Next() *Chunk { return l.next }

// Committed notes that the table is as of record seq.
func (l *Log) Committed(seq uint64) { l.committed = seq }

// Resume makes the log go on where the table's last checkpoint ends: the next record is seq, and a new chunk gets the
// number chunkSeq, or a higher one.
func (l *Log) Resume(seq, chunkSeq uint64) {
	l.nextSeq, l.nextChunk, l.committed = seq, chunkSeq, seq
}

// KnowDurable notes that every record before seq was made durable.
func (l *Log) KnowDurable(seq uint64) { l.durable = max(l.durable, seq) }

// Replayed moves the end of the log behind the record that follows, of size bytes, in chunk c.
func (l *Log) Replayed(c *Chunk, size int) {
	l.nextSeq++
	c.End += uint32(size)
}

// EndReplay notes that the log ends where the replay has stopped. Records before seq are in the table.
func (l *Log) EndReplay(seq uint64) {
	l.durable = max(min(l.durable, l.nextSeq), seq)
}

// TakeSealed returns the chunks that were sealed since the last call. The caller holds mu.
func (l *Log) TakeSealed() []*Chunk {
	sealed := l.sealed
	l.sealed = nil
	return sealed
}

// Syncs returns how often chunk files were synced, and how long that took.
func (l *Log) Syncs() (n uint64, took time.Duration) { return l.syncs.Get() }
