package wal

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/lockorder"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// Log is the append end of the log. Records enter it under mu, the store's lock, in the order of their sequence
// numbers; buffers leave it in the same order.
//
//	append → active buffer → (cut) → queue → (drain) → chunk file → (sync) → durable
type Log struct {
	// Set before the first record, and constant from then on.
	ChunkBytes int64 // size of a new chunk, if there is room
	Limit      int64 // most bytes in all chunk files; 0: the file system sets the limit

	fs     storage.FS
	mu     *lockorder.Mutex[lockorder.Store] // the lock that orders all changes of the store
	uuid   [16]byte
	space  Space
	Pool   Pool
	stock  *ReserveFile
	mark   *Mark // the file that records durable
	failed atomic.Pointer[error]
	ended  chan struct{} // closed when Fail has made an error final

	// Guarded by mu.
	progress     *sync.Cond // a buffer became available, or an attempt to make a chunk ended
	active       *buffer
	queue        []*buffer // cut buffers, in order
	free         []*buffer
	current      *Chunk   // takes the records; nil until the first record
	sealed       []*Chunk // chunks sealed since the last checkpoint
	next         *Chunk   // made in advance
	making       bool
	madeRound    uint64  // counts the attempts to make a chunk
	makeErr      error   // error of the last attempt
	closed       bool    // nothing more is appended
	wanted       Purpose // highest purpose that waits for a new chunk
	capacity     int64   // room in bytes, used or not, when a chunk was last made; 0: not known
	nextSeq      uint64  // sequence number of the next record
	nextChunk    uint64  // sequence number of the next chunk to be made
	appended     uint64  // bytes appended over the life of the process
	durable      uint64  // every record before this sequence number is durable
	committed    uint64  // the table is as of this sequence number
	entries      []byte  // summary entries of the current chunk
	spareEntries []byte  // memory for the entries of the next chunk

	// bufMu guards buffered and Chunk.written, for readers of records that are not in their file yet.
	bufMu    sync.RWMutex
	buffered []*buffer

	writeMu  lockorder.Mutex[lockorder.Write] // held while buffers are written, so that they are written one at a time and in order
	unsynced []*Chunk                         // chunks written to since their last sync; guarded by writeMu
	out      uint64                           // the part of appended that writeOut has put into the chunk files; guarded by writeMu
	syncMu   lockorder.Mutex[lockorder.Sync]  // held during a sync; callers that arrive meanwhile share the next one
	synced   atomic.Uint64
	syncs    Timing

	flushWork, makeWork, syncWork chan struct{} // capacity 1: a value means that there is work
	quit                          chan struct{}
	wg                            sync.WaitGroup
}

// New returns the log of a store. mu is the lock under which records are appended and the state of the store changes
// with them. The log releases it only to wait, where a method says so.
func New(fs storage.FS, mu *lockorder.Mutex[lockorder.Store], uuid [16]byte, space Space, stock *ReserveFile, mark *Mark) *Log {
	l := &Log{
		fs: fs, mu: mu, uuid: uuid, space: space, stock: stock, mark: mark, progress: sync.NewCond(mu),
		Pool:      Pool{fs: fs, space: space, mu: mu},
		flushWork: make(chan struct{}, 1), makeWork: make(chan struct{}, 1), syncWork: make(chan struct{}, 1), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	for range BufferCount {
		l.free = append(l.free, &buffer{}) // the memory is allocated at the first use
	}
	return l
}

// Share gives buffer i memory that outlives the process: BufferSize bytes, and a head that tells the next owner what is
// in them. It must be called before the first record.
func (l *Log) Share(i int, data []byte, head *BufferHead) {
	l.free[i].data, l.free[i].head = data, head
}

// Start starts the goroutines that write buffers, make chunks, sync sealed chunks, and push the durable mark.
func (l *Log) Start() {
	l.wg.Go(func() { forEach(l.flushWork, l.quit, func() { _ = l.drain() }) }) // drain keeps its error in failed
	l.wg.Go(func() { forEach(l.makeWork, l.quit, l.makeChunk) })
	l.wg.Go(func() { forEach(l.syncWork, l.quit, func() { _ = l.Sync() }) }) // sync does, too
	l.wg.Go(func() {
		tick := time.NewTicker(markEvery)
		defer tick.Stop()
		forEach(tick.C, l.quit, l.mark.push)
	})
}

// Close ends appending: all current and later waiters for room get fault.ErrClosed. The caller holds mu.
func (l *Log) Close() {
	l.closed = true
	l.progress.Broadcast()
}

// Stop ends the goroutines that Start has started, and waits for them.
func (l *Log) Stop() {
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

// Poke signals on c that there is work, unless that is signalled already.
func Poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Fail makes err final: nothing is appended, written or synced any more. It returns the first such error.
func (l *Log) Fail(err error) error {
	err = fmt.Errorf("%w: %w", fault.ErrFailed, err)
	if l.failed.CompareAndSwap(nil, &err) {
		close(l.ended)
	}
	l.mu.Lock()
	l.progress.Broadcast()
	l.mu.Unlock()
	return *l.failed.Load()
}

// Failed returns a channel that is closed when Fail has been called.
func (l *Log) Failed() <-chan struct{} { return l.ended }

// Refuse makes err the error of every later change.
func (l *Log) Refuse(err error) { l.failed.Store(&err) }

// RoomMade wakes the writers that wait for room. The caller holds mu.
func (l *Log) RoomMade() { l.progress.Broadcast() }

// DropNext removes the chunk that was made in advance. The caller holds mu, and nothing is appended any more.
func (l *Log) DropNext() error {
	c := l.next
	if c == nil {
		return nil
	}
	l.next = nil
	l.space.Drop(c.Slot)
	return errors.Join(c.Close(), l.fs.Remove(c.Name()))
}

// Err returns the final error, or nil if the log has not failed.
func (l *Log) Err() error {
	if p := l.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// Reserve makes room for a record of n bytes. The caller holds mu; Reserve releases it while it waits for a buffer or a
// chunk. If there is no room for data, Reserve waits for the cleaner as long as the cleaner has something to give back.
// It returns the log's final error, fault.ErrClosed, or the error of making a chunk. If it returns nil, the log is open
// and has not failed, and stays so until the caller releases mu or waits.
func (l *Log) Reserve(n int, p Purpose) error {
	tries := 0
	for {
		if err := l.Err(); err != nil {
			return err
		}
		if l.closed {
			return fault.ErrClosed
		}
		if l.current == nil || !l.fits(n, p) {
			if l.next != nil && (p != ForData || !l.next.Reserved) {
				l.rotate(p)
				continue
			}
			if tries > 0 && l.makeErr != nil {
				if p != ForData || !l.space.NeedRoom() {
					return l.makeErr
				}
				l.progress.Wait()
			}
			tries++
			l.waitForChunk(p)
			continue
		}
		if l.active != nil && l.active.n+n <= BufferSize {
			return nil
		}
		l.cut()
		if len(l.free) == 0 {
			l.progress.Wait()
			continue
		}
		l.activate()
	}
}

// fits reports whether a record of n bytes may go into the current chunk.
func (l *Log) fits(n int, p Purpose) bool {
	// Leave room for the summary, with one more entry for this record.
	room := int(l.current.Size) - int(l.current.End) - len(l.entries) - format.SummaryEntrySize - format.SummaryFooterSize
	switch {
	case p == ForEvents:
	case p == ForData && l.current.Reserved, p == ForMoves && l.current.Reserved && l.current.ForEvents:
		room = 0
	case l.next != nil:
	default:
		room -= eventRoom
	}
	return n <= room
}

// waitForChunk asks for a chunk for p, and waits until there is one or an attempt to make one has ended. For a higher
// purpose than data it also waits for an attempt that is still under way. The caller holds mu, which is released while
// it waits.
func (l *Log) waitForChunk(p Purpose) {
	l.wanted = max(l.wanted, p)
	round := l.madeRound
	l.wantChunk()
	for !l.suits(p) && (l.madeRound == round || p > ForData && l.making) && l.Err() == nil && !l.closed {
		l.progress.Wait()
	}
}

// suits reports whether the next chunk exists and may be used for p.
func (l *Log) suits(p Purpose) bool { return l.next != nil && (p > ForData || !l.next.Reserved) }

// wantChunk wakes the goroutine that makes chunks, unless it is at work or there is a next chunk for data. The caller
// holds mu.
func (l *Log) wantChunk() {
	if !l.making && !l.suits(ForData) {
		l.making = true
		Poke(l.makeWork)
	}
}

// rotate seals the current chunk, and goes on in the next for a record of purpose p. The caller holds mu.
func (l *Log) rotate(p Purpose) {
	l.cut()
	l.seal()
	l.current, l.next = l.next, nil
	l.space.Rotated(p)
}

// Append adds a record for which Reserve has made room, gives it the next sequence number, and returns its place. The
// caller holds mu.
func (l *Log) Append(h *format.RecordHeader, payload []byte) (c *Chunk, off uint32) {
	h.Seq = l.nextSeq
	l.nextSeq++
	b, size := l.active, h.Size()
	c, off = l.current, l.current.End
	rec := b.data[b.n : b.n+size]
	h.Encode(rec, c.Seq, off)
	clear(rec[format.RecordHeaderSize+copy(rec[format.RecordHeaderSize:], payload):])
	b.use(b.n + size)
	l.summarize(h, payload)
	c.End += uint32(size)
	l.appended += uint64(size)
	if l.next == nil && c.End > c.Size/2 {
		l.wantChunk()
	}
	return c, off
}

// Retire seals the current chunk, so that the log goes on in another, and returns it; nil if there is none. It reduces
// the chunk's size to what the chunk holds. The caller must truncate the file to that size. The caller holds mu.
func (l *Log) Retire() *Chunk {
	l.cut()
	c := l.current
	if c != nil {
		c.Size = c.End
		if n := len(l.entries); n > 0 {
			c.Size += uint32(n) + format.SummaryFooterSize
		}
	}
	l.seal()
	l.current = nil
	return c
}

// seal ends the current chunk and queues its summary. The caller holds mu.
func (l *Log) seal() {
	c := l.current
	if c == nil {
		return
	}
	c.Sealed = true
	l.space.Changed(c)
	l.sealed = append(l.sealed, c)
	l.queueSummary(c)
	Poke(l.syncWork) // so that the header of a later chunk can say that this one is durable
}

// WaitIdle waits until no chunk is being made.
func (l *Log) WaitIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.making {
		l.progress.Wait()
	}
}

// Position returns the place of the next record, which is the replay position for a checkpoint of the present state.
// The caller holds mu.
func (l *Log) Position() (chunkSeq uint64, off uint32) {
	switch {
	case l.current != nil:
		return l.current.Seq, l.current.End
	case l.next != nil:
		return l.next.Seq, format.ChunkHeaderSize
	default:
		return l.nextChunk, format.ChunkHeaderSize
	}
}
