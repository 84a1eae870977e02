package cow

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	bufferSize  = 1 << 20
	bufferCount = 16 // 16 MiB of acknowledged, unwritten data; beyond that, writers wait for the disk

	// maxEvent bounds the JSON of one event, so that it fits a buffer.
	maxEvent = bufferSize / 2

	// eventRoom is the space that data leaves free at the end of a chunk while there is no next chunk, so
	// that names can be deleted and blocks discarded on a full disk.
	eventRoom = 64 << 10

	// spare is the free space of the file system below which no chunk is made for data or for the cleaner:
	// checkpoints, deletes and discards use it to go on. The cleaner has room for one chunk more than data
	// has.
	spare = 64 << 20

	minChunkSize   = 4 << 20 // for data, on a disk that is nearly full
	eventChunkSize = 1 << 20 // for events, from the reserve
)

// purpose says what room in the log is wanted for. A higher purpose may use more of the space that is kept
// free.
type purpose uint8

const (
	forData   purpose = iota
	forMoves          // for the cleaner, which gives back more than it takes
	forEvents         // for events and holes: deleting gives back room
)

// buffer holds records on their way to one chunk file. Bytes before the log's end never change. The buffer is
// reused once its bytes are in the file.
type buffer struct {
	chunk *chunk
	off   uint32 // offset of data[0] in the chunk
	n     int    // bytes used; guarded by Store.mu until the buffer is cut, constant from then on
	data  []byte
	head  *slotHead // tells the next owner what the buffer holds; nil: the memory is private to this process

	summary *format.SummaryFooter // not nil: the buffer holds the chunk's summary, not records
}

// begin assigns an empty buffer to the end of chunk c.
func (b *buffer) begin(c *chunk) {
	b.chunk, b.off, b.n = c, c.end, 0
	if b.head != nil {
		b.head.seq, b.head.slot, b.head.off = c.seq, c.slot, c.end
	}
}

// use marks the first n bytes as holding records.
func (b *buffer) use(n int) {
	b.n = n
	if b.head != nil {
		b.head.used.Store(uint32(n))
	}
}

// recordLog is the append end of the log. Records enter it under Store.mu, in the order of their sequence
// numbers; buffers leave it in the same order.
//
//	append → active buffer → (cut) → queue → (drain) → chunk file → (sync) → durable
type recordLog struct {
	fs         storage.FS
	mu         *sync.Mutex // Store.mu
	uuid       [16]byte
	slots      *slotTable
	pool       chunkPool
	stock      reserve
	mark       durableMark  // the file that records durable
	kept       func() int64 // returns the part of the space to keep free that the store already holds
	workKept   func() int64 // returns the space that data leaves to the cleaner; mu is held
	chunkBytes int64        // size of a new chunk, if there is room
	failed     atomic.Pointer[error]

	// Guarded by mu.
	space        *sync.Cond // a buffer became available, or an attempt to make a chunk ended
	active       *buffer
	queue        []*buffer // cut buffers, in order
	free         []*buffer
	current      *chunk   // takes the records; nil until the first record
	sealed       []*chunk // chunks sealed since the last checkpoint
	next         *chunk   // made in advance
	making       bool
	madeRound    uint64        // counts the attempts to make a chunk
	makeErr      error         // error of the last attempt
	closed       bool          // nothing more is appended
	wanted       purpose       // highest purpose that waits for a new chunk
	capacity     int64         // room in bytes, used or not, when a chunk was last made; 0: not known
	limit        int64         // most bytes in all chunk files; 0: the file system sets the limit
	cleaner      func() bool   // wakes the cleaner; returns false if the cleaner can give back no room
	rotated      func(purpose) // called for each full chunk, with the purpose of the next one
	nextSeq      uint64        // sequence number of the next record
	nextChunk    uint64        // sequence number of the next chunk to be made
	appended     uint64        // bytes appended over the life of the process
	durable      uint64        // every record before this sequence number is durable
	committed    uint64        // the table is as of this sequence number
	entries      []byte        // summary entries of the current chunk
	spareEntries []byte        // memory for the entries of the next chunk

	// bufMu guards buffered and chunk.written, for readers of records that are not in their file yet.
	bufMu    sync.RWMutex
	buffered []*buffer

	writeMu  sync.Mutex // held while buffers are written, so that they are written one at a time and in order
	unsynced []*chunk   // chunks written to since their last sync; guarded by writeMu
	out      uint64     // the part of appended that writeOut has put into the chunk files; guarded by writeMu
	syncMu   sync.Mutex // held during a sync; callers that arrive meanwhile share the next one
	synced   atomic.Uint64

	flushWork, makeWork, syncWork chan struct{} // capacity 1: a value means that there is work
	quit                          chan struct{}
	wg                            sync.WaitGroup
}

func newRecordLog(fs storage.FS, mu *sync.Mutex, uuid [16]byte, slots *slotTable) *recordLog {
	l := &recordLog{
		cleaner: func() bool { return false }, kept: func() int64 { return 0 }, workKept: func() int64 { return 0 }, rotated: func(purpose) {}, fs: fs, mu: mu, uuid: uuid, slots: slots, space: sync.NewCond(mu),
		pool:      chunkPool{fs: fs, slots: slots, mu: mu},
		flushWork: make(chan struct{}, 1), makeWork: make(chan struct{}, 1), syncWork: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	for range bufferCount {
		l.free = append(l.free, &buffer{}) // the memory is allocated at the first use
	}
	return l
}

// share gives the buffers memory that outlives the process. It must be called before the first record.
func (l *recordLog) share(m *sharedBuffers) {
	for i, b := range l.free {
		b.data, b.head = m.data(i), m.head(i)
	}
}

// start starts the goroutines that write buffers, make chunks, sync sealed chunks, and push the durable mark.
func (l *recordLog) start() {
	l.wg.Go(func() { forEach(l.flushWork, l.quit, func() { _ = l.drain() }) }) // drain keeps its error in failed
	l.wg.Go(func() { forEach(l.makeWork, l.quit, l.makeChunk) })
	l.wg.Go(func() { forEach(l.syncWork, l.quit, func() { _ = l.sync() }) }) // sync does, too
	l.wg.Go(func() {
		tick := time.NewTicker(markEvery)
		defer tick.Stop()
		forEach(tick.C, l.quit, l.mark.push)
	})
}

// close ends appending: all current and later waiters for room get ErrClosed. The caller holds mu.
func (l *recordLog) close() {
	l.closed = true
	l.space.Broadcast()
}

// stop ends the goroutines that start has started, and waits for them.
func (l *recordLog) stop() {
	close(l.quit)
	l.wg.Wait()
}

// forEach calls fn for each value from work until quit is closed.
func forEach[T any](work <-chan T, quit <-chan struct{}, fn func()) {
	for {
		select {
		case <-work:
			fn()
		case <-quit:
			return
		}
	}
}

// poke signals on c that there is work, unless that is signalled already.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// fail makes err final: nothing is appended, written or synced any more. It returns the first such error.
func (l *recordLog) fail(err error) error {
	err = fmt.Errorf("%w: %w", ErrFailed, err)
	l.failed.CompareAndSwap(nil, &err)
	l.mu.Lock()
	l.space.Broadcast()
	l.mu.Unlock()
	return *l.failed.Load()
}

// err returns the final error, or nil if the log has not failed.
func (l *recordLog) err() error {
	if p := l.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// reserve makes room for a record of n bytes. The caller holds mu; reserve releases it while it waits for a
// buffer or a chunk. If there is no room for data, reserve waits for the cleaner as long as the cleaner has
// something to give back. It returns the log's final error, ErrClosed, or the error of making a chunk.
func (l *recordLog) reserve(n int, p purpose) error {
	tries := 0
	for {
		if err := l.err(); err != nil {
			return err
		}
		if l.closed {
			return ErrClosed
		}
		if l.current == nil || !l.fits(n, p) {
			if l.next != nil && (p != forData || !l.next.reserved) {
				l.rotate(p)
				continue
			}
			if tries > 0 && l.makeErr != nil {
				if p != forData || !l.cleaner() {
					return l.makeErr
				}
				l.space.Wait()
			}
			tries++
			l.waitForChunk(p)
			continue
		}
		if l.active != nil && l.active.n+n <= bufferSize {
			return nil
		}
		l.cut()
		if len(l.free) == 0 {
			l.space.Wait()
			continue
		}
		l.activate()
	}
}

// fits reports whether a record of n bytes may go into the current chunk.
func (l *recordLog) fits(n int, p purpose) bool {
	// Leave room for the summary, with one more entry for this record.
	room := int(l.current.size) - int(l.current.end) - len(l.entries) - format.SummaryEntrySize - format.SummaryFooterSize
	switch {
	case p == forEvents:
	case p == forData && l.current.reserved, p == forMoves && l.current.reserved && l.current.forEvents:
		room = 0
	case l.next != nil:
	default:
		room -= eventRoom
	}
	return n <= room
}

// waitForChunk asks for a chunk for p, and waits until there is one or an attempt to make one has ended. For
// a higher purpose than data it also waits for an attempt that is still under way. The caller holds mu, which
// is released while it waits.
func (l *recordLog) waitForChunk(p purpose) {
	l.wanted = max(l.wanted, p)
	round := l.madeRound
	l.wantChunk()
	for !l.suits(p) && (l.madeRound == round || p > forData && l.making) && l.err() == nil && !l.closed {
		l.space.Wait()
	}
}

// suits reports whether the next chunk exists and may be used for p.
func (l *recordLog) suits(p purpose) bool { return l.next != nil && (p > forData || !l.next.reserved) }

// wantChunk wakes the goroutine that makes chunks, unless it is at work or there is a next chunk for data.
// The caller holds mu.
func (l *recordLog) wantChunk() {
	if !l.making && !l.suits(forData) {
		l.making = true
		poke(l.makeWork)
	}
}

// rotate seals the current chunk, and goes on in the next for a record of purpose p. The caller holds mu.
func (l *recordLog) rotate(p purpose) {
	l.cut()
	l.seal()
	l.current, l.next = l.next, nil
	l.rotated(p)
}

// activate makes a free buffer the active one, at the end of the current chunk. The caller holds mu.
func (l *recordLog) activate() {
	b := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	if b.data == nil {
		b.data = make([]byte, bufferSize)
	}
	b.begin(l.current)
	l.active = b
	l.bufMu.Lock()
	l.buffered = append(l.buffered, b)
	l.bufMu.Unlock()
}

// cut closes the active buffer and wakes the flusher to write it. The caller holds mu.
func (l *recordLog) cut() {
	if l.enqueue() {
		poke(l.flushWork)
	}
}

// enqueue closes the active buffer and, if it holds anything, queues it for writing. It reports whether it
// queued a buffer. The caller holds mu.
func (l *recordLog) enqueue() bool {
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
func (l *recordLog) forget(b *buffer) {
	l.buffered = slices.DeleteFunc(l.buffered, func(x *buffer) bool { return x == b })
}

// append adds a record for which reserve has made room, gives it the next sequence number, and returns its
// place. The caller holds mu.
func (l *recordLog) append(h *format.RecordHeader, payload []byte) (c *chunk, off uint32) {
	h.Seq = l.nextSeq
	l.nextSeq++
	b, size := l.active, h.Size()
	c, off = l.current, l.current.end
	rec := b.data[b.n : b.n+size]
	h.Encode(rec, c.seq, off)
	clear(rec[format.RecordHeaderSize+copy(rec[format.RecordHeaderSize:], payload):])
	b.use(b.n + size)
	l.summarize(h, payload)
	c.end += uint32(size)
	l.appended += uint64(size)
	if l.next == nil && c.end > c.size/2 {
		l.wantChunk()
	}
	return c, off
}

// retire seals the current chunk, so that the log goes on in another, and returns it; nil if there is none.
// It reduces the chunk's size to what the chunk holds. The caller must truncate the file to that size. The
// caller holds mu.
func (l *recordLog) retire() *chunk {
	l.cut()
	c := l.current
	if c != nil {
		c.size = c.end
		if n := len(l.entries); n > 0 {
			c.size += uint32(n) + format.SummaryFooterSize
		}
	}
	l.seal()
	l.current = nil
	return c
}

// seal ends the current chunk and queues its summary. The caller holds mu.
func (l *recordLog) seal() {
	c := l.current
	if c == nil {
		return
	}
	c.sealed = true
	l.slots.recount(c)
	l.sealed = append(l.sealed, c)
	l.queueSummary(c)
	poke(l.syncWork) // so that the header of a later chunk can say that this one is durable
}

// waitIdle waits until no chunk is being made.
func (l *recordLog) waitIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.making {
		l.space.Wait()
	}
}

// position returns the place of the next record, which is the replay position for a checkpoint of the present
// state. The caller holds mu.
func (l *recordLog) position() (chunkSeq uint64, off uint32) {
	switch {
	case l.current != nil:
		return l.current.seq, l.current.end
	case l.next != nil:
		return l.next.seq, format.ChunkHeaderSize
	default:
		return l.nextChunk, format.ChunkHeaderSize
	}
}

// read copies a record into p if the record is still in a buffer, and reports whether it was.
func (l *recordLog) read(c *chunk, off uint32, p []byte) bool {
	l.bufMu.RLock()
	defer l.bufMu.RUnlock()
	if off+uint32(len(p)) <= c.written {
		return false
	}
	// Search from the newest buffer back. A buffer that was cut before it was full does not have the bytes
	// behind its end; the next buffer has them.
	for _, b := range slices.Backward(l.buffered) {
		if b.chunk == c && off >= b.off {
			copy(p, b.data[off-b.off:])
			return true
		}
	}
	return false
}

// cutIdle queues the active buffer, so that a process that is killed loses little of what it acknowledged
// without a flush.
func (l *recordLog) cutIdle() {
	l.mu.Lock()
	l.cut()
	l.mu.Unlock()
}
