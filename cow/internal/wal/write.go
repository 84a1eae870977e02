package wal

import (
	"fmt"
	"time"
)

// drain writes every cut buffer to its chunk file.
func (l *Log) drain() error {
	for {
		l.writeMu.Lock()
		err := l.drainLocked(1)
		l.writeMu.Unlock()
		l.mu.Lock()
		idle := len(l.queue) == 0
		l.mu.Unlock()
		if err != nil || idle {
			return err
		}
	}
}

// drainLocked writes the first n cut buffers, or all if there are fewer. The caller holds writeMu.
func (l *Log) drainLocked(n int) error {
	for i := 0; ; i++ {
		if err := l.Err(); err != nil || i == n {
			return err // also the error of a write that another drain had begun
		}
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.mu.Unlock()
			return nil
		}
		b := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()

		c := b.chunk
		if !c.unsynced {
			c.unsynced = true
			c.Acquire() // released once the chunk is synced
			l.unsynced = append(l.unsynced, c)
		}
		if b.summary != nil {
			b.finishSummary()
		}
		if err := l.write(b); err != nil {
			return l.Fail(fmt.Errorf("write chunk %s: %w", c.Name(), err))
		}
		if b.summary != nil {
			l.mu.Lock()
			l.spareEntries = b.data[:0]
			l.mu.Unlock()
			continue
		}
		l.bufMu.Lock()
		c.written = b.off + uint32(b.n)
		l.forget(b)
		l.bufMu.Unlock()
		l.mu.Lock()
		b.use(0)
		l.free = append(l.free, b)
		l.progress.Broadcast()
		l.mu.Unlock()
	}
}

// pageSize is the size of a page. To write part of a page, the page cache has to read all of it first.
const pageSize = 4096

// write writes a buffer to its place in the chunk file. It also writes zeros behind the buffer, which makes later
// writes and flushes cheaper (docs/engine.md, Blocks under the log). The log has nothing there yet, since buffers are
// written in order. The caller holds writeMu.
func (l *Log) write(b *buffer) error {
	c, data := b.chunk, b.data[:b.n]
	if b.summary != nil {
		_, err := c.file.WriteAt(data, int64(b.off))
		return err
	}
	end := b.off + uint32(b.n)
	pad := min(int(-end%pageSize), len(b.data)-b.n, int(c.fileSize-end))
	clear(b.data[b.n : b.n+pad])
	if _, err := c.file.WriteAt(b.data[:b.n+pad], int64(b.off)); err != nil {
		return err
	}
	end += uint32(pad)
	if b.n >= BufferSize/2 {
		c.file.StartWrite(int64(b.off), int64(b.n)) // so that a flush need not write it all
	} else if end > c.prepared {
		ahead := min(uint32(l.ChunkBytes/64), aheadMost, c.fileSize-end)
		if _, err := c.file.WriteAt(zerosAhead[:ahead], int64(end)); err != nil {
			return err
		}
		end += ahead
	}
	c.prepared = max(c.prepared, end)
	return nil
}

// aheadMost is the most that is written ahead at once.
const aheadMost = 1 << 20

var zerosAhead [aheadMost]byte

// Sync makes every record appended before the call durable.
func (l *Log) Sync() error {
	l.mu.Lock()
	target := l.appended
	l.mu.Unlock()

	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	if err := l.Err(); err != nil {
		return err
	}
	if l.synced.Load() >= target {
		return nil // the sync that this call waited for began after our records were appended
	}
	l.mu.Lock()
	goal, seq := l.appended, l.nextSeq
	l.enqueue()
	n := len(l.queue) // buffers that are cut after this are not part of this sync
	l.mu.Unlock()

	l.writeMu.Lock()
	err := l.drainLocked(n)
	todo := l.unsynced
	l.unsynced = nil
	for _, c := range todo {
		c.unsynced = false
	}
	l.writeMu.Unlock()
	if err != nil {
		return err
	}
	start := time.Now()
	for _, c := range todo {
		if err := c.file.Sync(); err != nil {
			return l.Fail(fmt.Errorf("sync chunk %s: %w", c.Name(), err))
		}
		c.Release()
	}
	l.syncs.Since(start)
	l.mark.set(seq)
	l.synced.Store(goal)
	l.mu.Lock()
	l.durable = seq
	l.mu.Unlock()
	return nil
}

// WriteOut writes every record that was appended before the call to its chunk file, so that none is lost if this
// process is killed. It does not make them durable.
func (l *Log) WriteOut() error {
	l.mu.Lock()
	target := l.appended
	l.mu.Unlock()
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	if l.out >= target {
		return l.Err() // the previous writer has written our records, too
	}
	l.mu.Lock()
	goal := l.appended
	l.enqueue()
	n := len(l.queue)
	l.mu.Unlock()
	if err := l.drainLocked(n); err != nil {
		return err
	}
	l.out = goal
	return nil
}

// NeedSync marks a chunk that replay has read as not synced: after a crash of the process, its bytes may be only in the
// page cache.
func (l *Log) NeedSync(c *Chunk) {
	l.writeMu.Lock()
	defer l.writeMu.Unlock()
	c.unsynced = true
	c.Acquire()
	l.unsynced = append(l.unsynced, c)
	l.mu.Lock()
	l.appended++ // so that sync does not take the log to be durable
	l.mu.Unlock()
}
