package ublk

import (
	"errors"
	"sync/atomic"
	"time"
)

// Op is the kind of a request. The values are the kernel's (UBLK_IO_OP_*).
type Op uint8

// The operations that a handler sees.
const (
	OpRead        Op = 0
	OpWrite       Op = 1
	OpFlush       Op = 2 // everything that was answered before must be durable
	OpDiscard     Op = 3 // the range's content no longer matters
	OpWriteZeroes Op = 5 // the range must read as zeros
)

// String returns the operation's name in the block layer's words.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case OpWriteZeroes:
		return "write-zeroes"
	}
	return "unknown"
}

// ErrAsync is what a handler returns if it answers later, with [Request.Complete]. It must be returned as it is, not
// wrapped.
var ErrAsync = errors.New("ublk: the request is answered later")

// ErrFetch is what a handler returns after [Request.Fetch]. It must be returned as it is, not wrapped.
var ErrFetch = errors.New("ublk: the request waits for its fetches")

// Handler serves the requests of a device.
//
// ServeUBLK is called on the queue's own thread, for one request of the queue at a time. It should not block: while it
// runs, nothing else of the queue moves. An answer must not wait for requests that are still to come, since they may be
// waiting for this request's memory.
//
// The result answers the request. nil is success. ErrAsync and ErrFetch mean that the answer comes later. Any other
// error fails the request with the syscall.Errno that it wraps, or with EIO. A panic fails the request with EIO, and is
// passed to Options.Report.
type Handler interface {
	ServeUBLK(r *Request) error
}

// Fetcher is implemented by a Handler that wants to see its fetches done, to verify or decode what was read.
//
// FetchedUBLK runs on the queue's thread after the last fetch of r. err is the error of the first fetch that failed
// (io.ErrUnexpectedEOF if the file ended). The result answers the request as that of ServeUBLK does. The method may
// call Fetch again and return ErrFetch.
//
// If a Handler is no Fetcher, the outcome of its fetches answers the request.
type Fetcher interface {
	FetchedUBLK(r *Request, err error) error
}

// Request is one block request. Each tag of each queue has one, which is used again and again: the Request and its Buf
// are valid only until the request is answered. Nothing is allocated for an I/O.
type Request struct {
	Op      Op
	FUA     bool   // the write must be durable when it is answered
	NoUnmap bool   // OpWriteZeroes must keep the space allocated
	Offset  int64  // bytes
	Length  int    // bytes
	Buf     []byte // OpWrite: the payload; OpRead: to be filled; len(Buf) == Length for those two, nil for the others
	Queue   int
	Tag     int
	Data    any // the handler's own; it stays with the tag from one request to the next

	q     *queue
	full  []byte        // the tag's whole buffer; with CopyUser what the pool has lent it,
	page  int           // as this
	state atomic.Uint32 // requestAnswered → requestServing → requestAnswered, so that only the first answer counts
	err   error         // the answer; written by the goroutine that moved state to requestAnswered
	next  *Request      // link in queue.later, queue.starved or Adapter.waiting

	// Used by the queue's thread only.
	arrived time.Duration // by the queue's clock
	op      Op            // Op and len(Buf) as they came: a handler may change those
	size    int
	reads   int   // fetches under way
	readErr error // the first that failed
	wait    waitFor
}

const (
	requestAnswered uint32 = iota // or never served
	requestServing
)

// waitFor is what happens to a request when its last fetch is done.
type waitFor uint8

const (
	waitNone   waitFor = iota
	waitFetch          // hand it to the Fetcher
	waitCommit         // it is answered already: commit
)

// Complete answers a request for which the handler returned ErrAsync. nil is success; an error counts as one from
// ServeUBLK. Complete may be called from any goroutine, even before ServeUBLK has returned, and must be called exactly
// once. The request and its Buf must not be touched afterwards.
func (r *Request) Complete(err error) {
	if !r.state.CompareAndSwap(requestServing, requestAnswered) {
		return
	}
	r.err = err
	r.q.answer(r)
}

// Fetch reads len(p) bytes at off of the file fd into p, on the queue's own ring, without blocking the queue. Short
// reads are continued. ServeUBLK and FetchedUBLK may call Fetch several times, on the goroutine of that call only, and
// then return ErrFetch.
//
// p may be Buf, a part of it, or memory of the handler. It belongs to the kernel until the fetch is done, and fd must
// stay open until then.
func (r *Request) Fetch(fd int, p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	r.q.startRead(r, fd, p, off)
}
