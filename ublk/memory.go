package ublk

import (
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// mapAnonymous returns populated memory outside the Go heap, which the collector neither scans nor moves. It is locked
// when the process may (RLIMIT_MEMLOCK, CAP_IPC_LOCK): a server that has to wait for memory to be written back to its
// own device would wait for ever.
func mapAnonymous(size int) (mem []byte, locked bool, err error) {
	mem, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, false, fmt.Errorf("ublk: map %d bytes for I/O: %w", size, err)
	}
	return mem, unix.Mlock(mem) == nil, nil
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }

// pool lends pieces of the memory that its queue has of the arena to the requests of a queue with CopyUser: a buddy
// allocator, since a piece must be contiguous, and since everything that is free must grow together again: a chunk that
// nobody uses has room for the largest request.
//
// Chunks come from the arena when a request finds no room, and all go back when nothing is lent, before the queue
// sleeps. The driver has no address of this memory: it copies only in the queue's own system calls, while a request has
// the piece. So what is not lent is nobody's, and can be given away at any moment.
type pool struct {
	lender *arena
	queue  *queue         // whom the arena wakes when a chunk has come free
	top    int            // order of a chunk, which no other block is joined to
	lent   int            // pieces
	have   int            // chunks
	chunks [][]byte       // by slot; nil: none
	heads  [maxOrders]int // first free block of each order, or none
	pages  []poolPage     // of all slots
}

const (
	poolShift = 12                           // an order 0 block has 4 KiB
	maxOrders = userTagShift - poolShift + 1 // up to maxIOBytes
	none      = -1                           // no page
	lent      = int8(-1)                     // the order of what is not the start of a free block
	minPool   = 1 << 20                      // a pool that may have less than this saves nothing worth waiting for
	poolShare = 8                            // a pool may have this part of what every tag at its largest would need
)

// poolPage is what a pool knows of the block that starts at a page.
type poolPage struct {
	order      int8 // of the free block, or lent
	prev, next int32
}

// poolSize is the most memory of a pool for depth requests of up to ioMax bytes.
func poolSize(depth, ioMax int) int {
	top := poolBlock(ioMax)
	blocks := max((depth+poolShare-1)/poolShare, minPool/top, 2)
	return min(blocks, depth) * top
}

func poolOrder(n int) int  { return bits.Len(uint(n-1) >> poolShift) }
func poolBlock(n int) int  { return 1 << (poolShift + poolOrder(n)) }
func blockPages(k int) int { return 1 << k }

// newPool makes a pool that has at most poolSize bytes of a, and none yet.
func newPool(a *arena, q *queue, depth, ioMax int) *pool {
	size := poolSize(depth, ioMax)
	p := &pool{
		lender: a, queue: q, top: poolOrder(ioMax), chunks: make([][]byte, size/poolBlock(ioMax)),
		pages: make([]poolPage, size>>poolShift),
	}
	for k := range p.heads {
		p.heads[k] = none
	}
	for i := range p.pages {
		p.pages[i].order = lent
	}
	return p
}

// get lends n bytes, above zero and at most ioMax; it returns nil when there is no room, and then the queue is woken if
// it has no chunk at all. page is for put. What was given back last is lent first, since the caches still hold it.
func (p *pool) get(n int) (b []byte, page int) {
	if p.lent > 0 && p.lender.wanted.Load() {
		return nil, none // others have nothing: this queue gives back what it has when its requests are done
	}
	order := poolOrder(n)
	k := order
	for k <= p.top && p.heads[k] == none {
		k++
	}
	if k > p.top {
		if !p.grow() {
			return nil, none
		}
		k = p.top
	}
	page = p.heads[k]
	p.remove(page)
	for ; k > order; k-- {
		p.insert(page+blockPages(k-1), k-1)
	}
	p.lent++
	slot, at := page>>p.top, page&(blockPages(p.top)-1)
	return p.chunks[slot][at<<poolShift:][:n:n], page
}

// grow takes a chunk of the arena. Without one the queue waits: for its own requests if it has lent something, else for
// the arena.
func (p *pool) grow() bool {
	if p.have == len(p.chunks) {
		return false
	}
	slot := 0
	for p.chunks[slot] != nil {
		slot++
	}
	c := p.lender.take(blockPages(p.top)<<poolShift, p.queue, p.lent == 0)
	if c == nil {
		return false
	}
	p.chunks[slot] = c
	p.have++
	p.insert(slot<<p.top, p.top)
	return true
}

// put takes back the n bytes that get lent as page.
func (p *pool) put(page, n int) {
	k := poolOrder(n)
	for ; k < p.top; k++ {
		buddy := page ^ blockPages(k)
		if p.pages[buddy].order != int8(k) {
			break
		}
		p.remove(buddy)
		page = min(page, buddy)
	}
	p.insert(page, k)
	p.lent--
}

// rest gives all chunks back if nothing is lent. Each is one free block then.
func (p *pool) rest() {
	if p.lent > 0 {
		return
	}
	for slot := 0; p.have > 0; slot++ {
		if c := p.chunks[slot]; c != nil {
			p.remove(slot << p.top)
			p.chunks[slot] = nil
			p.have--
			p.lender.put(c)
		}
	}
}

// drop ends the pool, when its queue's thread is gone. What is lent stays lent for ever.
func (p *pool) drop() {
	p.lender.forget(p.queue)
	p.rest()
}

func (p *pool) insert(page, k int) {
	next := p.heads[k]
	p.pages[page] = poolPage{order: int8(k), prev: none, next: int32(next)}
	if next != none {
		p.pages[next].prev = int32(page)
	}
	p.heads[k] = page
}

func (p *pool) remove(page int) {
	b := &p.pages[page]
	if b.prev == none {
		p.heads[b.order] = int(b.next)
	} else {
		p.pages[b.prev].next = b.next
	}
	if b.next != none {
		p.pages[b.next].prev = b.prev
	}
	b.order = lent
}
