package ublk

import (
	"fmt"
	"math/bits"
	"unsafe"

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

// pool lends pieces of one memory to the requests of a queue with CopyUser: a buddy allocator, since a piece must be
// contiguous, and since everything that is free must grow together again: a pool that nobody uses has room for the
// largest request.
type pool struct {
	mem   []byte
	top   int            // order of the largest block, which no other is joined to
	heads [maxOrders]int // first free block of each order, or none
	pages []poolPage
}

const (
	poolShift = 12                           // an order 0 block has 4 KiB
	maxOrders = userTagShift - poolShift + 1 // up to maxIOBytes
	none      = -1                           // no page
	lent      = int8(-1)                     // the order of what is not the start of a free block
	minPool   = 1 << 20                      // a pool of this size saves nothing worth waiting for
	poolShare = 8                            // a pool has this part of what every tag at its largest would need
)

// poolPage is what a pool knows of the block that starts at a page.
type poolPage struct {
	order      int8 // of the free block, or lent
	prev, next int32
}

// poolSize is the memory of a pool for depth requests of up to ioMax bytes.
func poolSize(depth, ioMax int) int {
	top := poolBlock(ioMax)
	blocks := max((depth+poolShare-1)/poolShare, minPool/top, 2)
	return min(blocks, depth) * top
}

func poolOrder(n int) int  { return bits.Len(uint(n-1) >> poolShift) }
func poolBlock(n int) int  { return 1 << (poolShift + poolOrder(n)) }
func blockPages(k int) int { return 1 << k }

// newPool makes a pool of mem, which has poolSize bytes.
func newPool(mem []byte, ioMax int) *pool {
	p := &pool{mem: mem, top: poolOrder(ioMax), pages: make([]poolPage, len(mem)>>poolShift)}
	for k := range p.heads {
		p.heads[k] = none
	}
	for i := range p.pages {
		p.pages[i].order = lent
	}
	for page := len(p.pages) - blockPages(p.top); page >= 0; page -= blockPages(p.top) {
		p.insert(page, p.top)
	}
	return p
}

// get lends n bytes, above zero and at most ioMax; it returns nil when there is no room. What was given back last is
// lent first, since the caches still hold it.
func (p *pool) get(n int) []byte {
	order := poolOrder(n)
	k := order
	for k <= p.top && p.heads[k] == none {
		k++
	}
	if k > p.top {
		return nil
	}
	page := p.heads[k]
	p.remove(page)
	for ; k > order; k-- {
		p.insert(page+blockPages(k-1), k-1)
	}
	return p.mem[page<<poolShift:][:n:n]
}

// put takes back what get lent.
func (p *pool) put(b []byte) {
	page := int(uintptr(unsafe.Pointer(&b[0]))-uintptr(unsafe.Pointer(&p.mem[0]))) >> poolShift
	k := poolOrder(len(b))
	for ; k < p.top; k++ {
		buddy := page ^ blockPages(k)
		if p.pages[buddy].order != int8(k) {
			break
		}
		p.remove(buddy)
		page = min(page, buddy)
	}
	p.insert(page, k)
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
