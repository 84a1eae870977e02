package wal

import (
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

const (
	// BufferSize is the size of a buffer of the log, in bytes.
	BufferSize = 1 << 20
	// BufferCount is the number of buffers: 16 MiB of acknowledged, unwritten data. Beyond that, writers wait for the
	// disk.
	BufferCount = 16
	// MaxEvent bounds the JSON of one event, so that it fits a buffer.
	MaxEvent = BufferSize / 2
)

// buffer holds records on their way to one chunk file. Bytes before the log's end never change. The buffer is reused
// once its bytes are in the file.
type buffer struct {
	chunk *Chunk
	off   uint32 // offset of data[0] in the chunk
	n     int    // bytes used; guarded by mu until the buffer is cut, constant from then on
	data  []byte
	head  *BufferHead // tells the next owner what the buffer holds; nil: the memory is private to this process

	summary *format.SummaryFooter // not nil: the buffer holds the chunk's summary, not records
}

// BufferHead says where the bytes of a shared buffer belong: in a chunk, at an offset. used is stored after the bytes,
// and set to 0 before any other field changes. It lies in shared memory, which the next owner reads.
type BufferHead struct {
	Seq  uint64 // sequence number of the chunk
	Slot uint32
	Off  uint32
	Used atomic.Uint32
	_    [3]uint32
}

// begin assigns an empty buffer to the end of chunk c.
func (b *buffer) begin(c *Chunk) {
	b.chunk, b.off, b.n = c, c.End, 0
	if b.head != nil {
		b.head.Seq, b.head.Slot, b.head.Off = c.Seq, c.Slot, c.End
	}
}

// use marks the first n bytes as holding records.
func (b *buffer) use(n int) {
	b.n = n
	if b.head != nil {
		b.head.Used.Store(uint32(n))
	}
}

// activate makes a free buffer the active one, at the end of the current chunk. The caller holds mu.
func (l *Log) activate() {
	b := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	if b.data == nil {
		b.data = make([]byte, BufferSize)
	}
	b.begin(l.current)
	l.active = b
	l.bufMu.Lock()
	l.buffered = append(l.buffered, b)
	l.bufMu.Unlock()
}

// cut closes the active buffer and wakes the flusher to write it. The caller holds mu.
func (l *Log) cut() {
	if l.enqueue() {
		Poke(l.flushWork)
	}
}

// enqueue closes the active buffer and, if it holds anything, queues it for writing. It reports whether it queued a
// buffer. The caller holds mu.
func (l *Log) enqueue() bool {
	b := l.active
	l.active = nil
	switch {
	case b == nil:
	case b.n == 0:
		l.bufMu.Lock()
		l.forget(b)
		l.bufMu.Unlock()
		l.free = append(l.free, b)
	default:
		l.queue = append(l.queue, b)
		return true
	}
	return false
}

// forget removes a buffer from those that readers search. The caller holds bufMu.
func (l *Log) forget(b *buffer) {
	l.buffered = slices.DeleteFunc(l.buffered, func(x *buffer) bool { return x == b })
}

// Read copies a record into p if the record is still in a buffer, and reports whether it was.
func (l *Log) Read(c *Chunk, off uint32, p []byte) bool {
	l.bufMu.RLock()
	defer l.bufMu.RUnlock()
	if off+uint32(len(p)) <= c.written {
		return false
	}
	// Search from the newest buffer back. If a buffer was cut before it was full, the bytes behind its end are in the
	// next buffer.
	for _, b := range slices.Backward(l.buffered) {
		if b.chunk == c && off >= b.off {
			copy(p, b.data[off-b.off:])
			return true
		}
	}
	return false
}

// CutIdle queues the active buffer, so that a process that is killed loses little of what it acknowledged without a
// flush.
func (l *Log) CutIdle() {
	l.mu.Lock()
	l.cut()
	l.mu.Unlock()
}
