package wal

import "time"

// This file is for the tests of the engine, which look inside the log and bring about what is rare.

// Spares returns the slots of the files that the pool keeps. The caller holds mu.
func (p *Pool) Spares() (slots []uint32) {
	for _, c := range p.spares {
		slots = append(slots, c.Slot)
	}
	return slots
}

// Reused returns how many files were reused over the life of the process. The caller holds mu.
func (p *Pool) Reused() int { return p.reused }

// Age makes the pool as old as if nothing had come or gone for d. The caller holds mu.
func (p *Pool) Age(d time.Duration) { p.touched = p.touched.Add(-d) }

// Fits reports whether a record of n bytes may go into the current chunk. The caller holds mu.
func (l *Log) Fits(n int, p Purpose) bool { return l.fits(n, p) }

// SkipChunk leaves the rest of the current chunk, or all of it, without records. The caller holds mu.
func (l *Log) SkipChunk() error {
	for l.next == nil {
		l.waitForChunk(ForData)
		if err := l.Err(); err != nil {
			return err
		}
		if l.makeErr != nil {
			return l.makeErr
		}
	}
	l.rotate(ForData)
	return nil
}

// NextByHand stops the log from making chunks in advance until MakeNext is called. The caller holds mu.
func (l *Log) NextByHand() { l.making = true }

// MakeNext makes the next chunk.
func (l *Log) MakeNext() { l.makeChunk() }

// HoldWrites lets nothing be written to the chunk files until release is called.
func (l *Log) HoldWrites() (release func()) {
	l.writeMu.Lock()
	return l.writeMu.Unlock
}

// SizeFor returns the size that a new chunk for data would have.
func (l *Log) SizeFor() (uint32, error) { return l.chunkSize(ForData, 0) }
