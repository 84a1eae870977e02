package ublk

import (
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"
)

// mapAnonymous returns populated memory outside the Go heap, which the collector neither scans nor moves. The memory is
// locked if the process may lock it (RLIMIT_MEMLOCK, CAP_IPC_LOCK). If unlocked memory were paged out while the kernel
// writes to the server's own device, the server would wait for ever.
func mapAnonymous(size int) (mem []byte, locked bool, err error) {
	mem, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, false, fmt.Errorf("ublk: map %d bytes for I/O: %w", size, err)
	}
	return mem, unix.Mlock(mem) == nil, nil
}

func roundUp(n, to int) int { return (n + to - 1) / to * to }

// pool lends memory to the requests of one CopyUser queue. The memory is in chunks of the arena.
//
// The pool is a buddy allocator, for two reasons: the memory of a request must be contiguous, and free blocks must grow
// together again, so that an unused chunk has room for the largest request.
//
// The pool takes a chunk from the arena when a request finds no room. It gives all of them back when nothing is lent,
// before the queue sleeps. The driver has no address of this memory: it copies only within the queue's system calls,
// while the memory is lent to a request. So memory that is not lent can be given away at any time.
type pool struct {
	lender *arena
	queue  *queue         // the arena wakes it when there is a chunk for it
	top    int            // order of a chunk: blocks of this order are not joined
	lent   int            // blocks that are lent
	have   int            // chunks that the pool has
	chunks [][]byte       // by slot; nil: none
	heads  [maxOrders]int // first free block of each order, or none
	pages  []poolPage     // of the chunks in all slots
}

const (
	poolShift = 12                           // a block of order 0 has 4 KiB
	maxOrders = userTagShift - poolShift + 1 // up to maxIOBytes
	none      = -1                           // no page
	lent      = int8(-1)                     // order of a page at which no free block starts
	minPool   = 1 << 20                      // a lower bound on a pool's size: less would save little, and make requests wait
	poolShare = 8                            // a pool has an eighth of the memory for a largest request in every tag
)

// poolPage describes the block that starts at a page.
type poolPage struct {
	order      int8 // order of the free block, or lent
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

// newPool makes a pool that will have at most poolSize bytes of a. It has none yet.
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

// get lends n bytes, from 1 to ioMax. page is for put. If there is no room, get returns nil; if the pool then has
// nothing lent, the arena wakes the queue later. The block that was given back last is lent first, because it is still
// in the processor's caches.
func (p *pool) get(n int) (b []byte, page int) {
	if p.lent > 0 && p.lender.wanted.Load() {
		return nil, none // another queue waits, so this one lends no more until it has given its chunks back
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

// grow takes a chunk from the arena, and reports whether it got one. If it did not, the queue waits: for its own
// requests if something is lent, otherwise for the arena.
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

// put takes back n bytes that get lent at page.
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

// rest gives all chunks back if nothing is lent. Each chunk is then one free block.
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

// drop ends the pool, after its queue's thread has ended. If something is still lent, the pool keeps its chunks.
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
