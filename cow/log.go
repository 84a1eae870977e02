package cow

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

const (
	bufferSize  = 1 << 20
	bufferCount = 16 // 16 MiB of acknowledged, unwritten data; then writers wait for the disk

	// maxEvent bounds the JSON of one event, so that it fits a buffer.
	maxEvent = bufferSize / 2

	// eventRoom is what data leaves free at the end of a chunk when the next
	// chunk is not there, so that names can be deleted and blocks discarded on a full disk.
	eventRoom = 64 << 10

	// spare is the free space of the file system below which no chunk is made for data or by the cleaner:
	// checkpoints, deletes and discards go on from it. The cleaner has room for one chunk more than data.
	spare = 64 << 20

	minChunkSize   = 4 << 20 // for data, on a disk that is nearly full
	eventChunkSize = 1 << 20 // for events, from the reserve
)

// purpose is what room in the log is for: the higher, the further it may go into what is kept free.
type purpose uint8

const (
	forData   purpose = iota
	forMoves          // the cleaner's, which give back more than they take
	forEvents         // and holes: what is deleted gives room
)

// buffer holds records on their way to one chunk file. Bytes before the log's end
// never change; the buffer is recycled when they are in the file.
type buffer struct {
	chunk *chunk
	off   uint32 // in the chunk, of data[0]
	n     int    // bytes used; guarded by Store.mu until the buffer is cut, constant then
	data  []byte
	head  *slotHead // what the next owner is told of it; nil: nothing, the memory is this process's

	summary *format.SummaryFooter // not nil: it holds no records, but the chunk's summary
}

// begin says what the buffer is for, which must hold nothing.
func (b *buffer) begin(c *chunk) {
	b.chunk, b.off, b.n = c, c.end, 0
	if b.head != nil {
		b.head.seq, b.head.slot, b.head.off = c.seq, c.slot, c.end
	}
}

// use says that the first n bytes hold records.
func (b *buffer) use(n int) {
	b.n = n
	if b.head != nil {
		b.head.used.Store(uint32(n))
	}
}

// recordLog is the append end of the log. Records enter it under Store.mu, in
// sequence order; buffers leave it in the same order.
//
//	append → active buffer → (cut) → queue → (drain) → chunk file → (sync) → durable
type recordLog struct {
	fs         storage.FS
	mu         *sync.Mutex // Store.mu
	uuid       [16]byte
	slots      *slotTable
	pool       chunkPool
	stock      reserve
	mark       durableMark  // of durable
	kept       func() int64 // what of the space that is to stay free the store has already
	workKept   func() int64 // what data leaves for the cleaner; mu is held
	chunkBytes int64        // of a new chunk, where there is room
	failed     atomic.Pointer[error]

	// Guarded by mu.
	space        *sync.Cond // a buffer or a chunk became available, or the attempt failed
	active       *buffer
	queue        []*buffer // cut, in order
	free         []*buffer
	current      *chunk   // takes records; nil until the first
	sealed       []*chunk // since the last checkpoint
	next         *chunk   // made in advance
	making       bool
	madeRound    uint64        // counts the maker's attempts
	makeErr      error         // of the last attempt
	closed       bool          // nothing is appended any more
	wanted       purpose       // what the chunk is wanted for
	capacity     int64         // bytes that there is room for, used or not, as of the last chunk that was made; 0: not known
	limit        int64         // bytes that the chunk files may take together; 0: as the file system has room
	cleaner      func() bool   // wakes the cleaner; false: it can give no room back
	rotated      func(purpose) // is told of each chunk that is full, and what the next one is for
	nextSeq      uint64        // of the next record
	nextChunk    uint64        // sequence of the next chunk to be made
	appended     uint64        // bytes, over the life of the process
	durable      uint64        // every record before this sequence number is
	committed    uint64        // the table is as of this sequence number
	entries      []byte        // of the summary of current
	spareEntries []byte        // for the next chunk's

	// bufMu guards buffered and chunk.written, for readers of records that are
	// not in their file yet.
	bufMu    sync.RWMutex
	buffered []*buffer

	writeMu  sync.Mutex // one writes buffers at a time, in order
	unsynced []*chunk   // written to since their last sync; guarded by writeMu
	out      uint64     // of appended, what is in the chunk files; kept by writeOut alone; guarded by writeMu
	syncMu   sync.Mutex // one syncs at a time; others join its successor
	synced   atomic.Uint64

	flushWork, makeWork, syncWork chan struct{} // capacity 1: "there is work"
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
		l.free = append(l.free, &buffer{}) // memory comes with the first use
	}
	return l
}

// share gives the buffers memory that outlives the process. It comes before the first record.
func (l *recordLog) share(m *sharedBuffers) {
	for i, b := range l.free {
		b.data, b.head = m.data(i), m.head(i)
	}
}

func (l *recordLog) start() {
	l.wg.Go(func() { l.each(l.flushWork, func() { _ = l.drain() }) }) // drain keeps its error in failed
	l.wg.Go(func() { l.each(l.makeWork, l.makeChunk) })
	l.wg.Go(func() { l.each(l.syncWork, func() { _ = l.sync() }) }) // so does sync
}

// close ends appending: whoever waits for room, and whoever comes later, gets ErrClosed. mu is held.
func (l *recordLog) close() {
	l.closed = true
	l.space.Broadcast()
}

func (l *recordLog) stop() {
	close(l.quit)
	l.wg.Wait()
}

func (l *recordLog) each(work <-chan struct{}, fn func()) {
	for {
		select {
		case <-work:
			fn()
		case <-l.quit:
			return
		}
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// fail makes err final: nothing is appended, written or synced any more.
func (l *recordLog) fail(err error) error {
	err = fmt.Errorf("%w: %w", ErrFailed, err)
	l.failed.CompareAndSwap(nil, &err)
	l.mu.Lock()
	l.space.Broadcast()
	l.mu.Unlock()
	return *l.failed.Load()
}

func (l *recordLog) err() error {
	if p := l.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// reserve makes room for a record of n bytes. mu is held; while reserve waits for
// a buffer or a chunk it is not. Where there is no room for data, it waits for the cleaner as long as that has
// something to give back.
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
	// The summary, with one entry more, comes behind.
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

func (l *recordLog) waitForChunk(p purpose) {
	l.wanted = max(l.wanted, p)
	round := l.madeRound
	l.wantChunk()
	for !l.suits(p) && (l.madeRound == round || p > forData && l.making) && l.err() == nil && !l.closed {
		l.space.Wait()
	}
}

// suits reports whether the next chunk is there, and for p.
func (l *recordLog) suits(p purpose) bool { return l.next != nil && (p > forData || !l.next.reserved) }

func (l *recordLog) wantChunk() {
	if !l.making && !l.suits(forData) {
		l.making = true
		poke(l.makeWork)
	}
}

func (l *recordLog) rotate(p purpose) {
	l.cut()
	l.seal()
	l.current, l.next = l.next, nil
	l.rotated(p)
}

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

// cut closes the active buffer and has it written. mu is held.
func (l *recordLog) cut() {
	if l.enqueue() {
		poke(l.flushWork)
	}
}

// enqueue closes the active buffer and queues it for writing, if anything is in it. mu is held.
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

// forget takes a buffer out of what readers see. bufMu is held.
func (l *recordLog) forget(b *buffer) {
	l.buffered = slices.DeleteFunc(l.buffered, func(x *buffer) bool { return x == b })
}

// append adds a record for which reserve has made room, gives it the next
// sequence number, and returns where it is. mu is held.
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

// retire seals the current chunk, so that the log goes on in another, and cuts it to what it
// holds: its size is to be made the file's. mu is held.
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

// seal ends the current chunk with its summary. mu is held.
func (l *recordLog) seal() {
	c := l.current
	if c == nil {
		return
	}
	c.sealed = true
	l.slots.recount(c)
	l.sealed = append(l.sealed, c)
	l.queueSummary(c)
	poke(l.syncWork) // so that the header of a chunk to come can say that this one is durable
}

// waitIdle waits until no chunk is being made.
func (l *recordLog) waitIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.making {
		l.space.Wait()
	}
}

// position is where the next record will be: the replay position of a
// checkpoint of the present state. mu is held.
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

// read copies a record into p if it is still in a buffer.
func (l *recordLog) read(c *chunk, off uint32, p []byte) bool {
	l.bufMu.RLock()
	defer l.bufMu.RUnlock()
	if off+uint32(len(p)) <= c.written {
		return false
	}
	// From the newest back: a buffer that was cut before it was full says nothing
	// of what lies behind its end, which the next buffer has.
	for _, b := range slices.Backward(l.buffered) {
		if b.chunk == c && off >= b.off {
			copy(p, b.data[off-b.off:])
			return true
		}
	}
	return false
}

// cutIdle queues what is in the active buffer, so that a process that is killed
// loses little of what it acknowledged without a flush.
func (l *recordLog) cutIdle() {
	l.mu.Lock()
	l.cut()
	l.mu.Unlock()
}
