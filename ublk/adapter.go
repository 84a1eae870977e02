package ublk

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"unsafe"
)

// ReaderWriterAt is the content of a disk for NewReaderWriterAt: a file, or any other type that several goroutines can
// read and write at an offset at the same time.
//
// If it has some of these methods too, they are used:
//
//	Sync() error                     // what was written before is durable; without it, writes must be so already
//	Discard(off, n int64) error      // the range's content no longer matters
//	WriteZeroes(off, n int64) error  // the range reads as zeros, and may give up its space
type ReaderWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

type syncer interface{ Sync() error }

type discarder interface {
	Discard(off, n int64) error
}

type zeroWriter interface {
	WriteZeroes(off, n int64) error
}

// Adapter is the Handler that NewReaderWriterAt returns.
type Adapter struct {
	rw      ReaderWriterAt
	workers sync.WaitGroup

	mu      sync.Mutex  // guards the fields below
	work    sync.Cond   // waiting or closed has changed
	waiting requestFIFO // requests that wait for a worker
	closed  bool
}

// NewReaderWriterAt returns a Handler that serves requests from rw. The calls of rw may block: at most workers
// goroutines make them, beside the queues' threads. Further requests wait for a worker; there are never more than the
// device has tags. rw is read and written only within the device's size.
//
// A device with Options.VolatileCache gets flushes, and each calls Sync. With Options.FUA, Sync is also called after
// each write that asks for it. With Options.Discard, discards fail with EOPNOTSUPP unless rw has Discard; zeros are
// written as data if rw has no WriteZeroes, or if the space must stay allocated.
//
// The user of the disk sees the syscall.Errno of an error, or EIO. A panic of rw counts as one of a Handler.
func NewReaderWriterAt(rw ReaderWriterAt, workers int) *Adapter {
	a := &Adapter{rw: rw}
	a.work.L = &a.mu
	for range max(workers, 1) {
		a.workers.Go(a.workRoutine)
	}
	return a
}

// ServeUBLK hands the request to a worker.
func (a *Adapter) ServeUBLK(r *Request) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return fmt.Errorf("ublk: adapter is closed: %w", syscall.ESHUTDOWN)
	}
	a.waiting.push(r)
	a.work.Signal()
	return ErrAsync
}

// Close waits until the workers have answered all requests that they were given, and ends them. Call it when the device
// is done: requests that come later fail. It may be called twice.
func (a *Adapter) Close() error {
	a.mu.Lock()
	a.closed = true
	a.work.Broadcast()
	a.mu.Unlock()
	a.workers.Wait()
	return nil
}

func (a *Adapter) workRoutine() {
	for r := a.take(); r != nil; r = a.take() {
		r.Complete(a.serve(r))
	}
}

// take waits for the next request and returns it, or nil if there will be none.
func (a *Adapter) take() *Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.waiting.empty() {
		if a.closed {
			return nil
		}
		a.work.Wait()
	}
	return a.waiting.pop()
}

// serve executes a request. A panic becomes an error.
func (a *Adapter) serve(r *Request) (err error) {
	defer r.q.recovered(r, &err)
	if err := a.do(r); err != nil || !r.FUA {
		return err
	}
	return a.sync()
}

func (a *Adapter) do(r *Request) error {
	switch r.Op {
	case OpRead:
		return a.read(r)
	case OpWrite:
		return a.write(r.Buf, r.Offset)
	case OpFlush:
		return a.sync()
	case OpDiscard:
		if d, ok := a.rw.(discarder); ok {
			return d.Discard(r.Offset, int64(r.Length))
		}
	case OpWriteZeroes:
		return a.zero(r)
	}
	return syscall.EOPNOTSUPP
}

// read fills Buf. If the source ends within the device, that is an error: zeros in place of the rest could hide lost
// data.
func (a *Adapter) read(r *Request) error {
	n, err := a.rw.ReadAt(r.Buf, r.Offset)
	switch {
	case n == len(r.Buf):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("ublk: read %d of %d bytes at %d: %w", n, len(r.Buf), r.Offset, io.ErrUnexpectedEOF)
	}
	return err
}

func (a *Adapter) write(p []byte, off int64) error {
	n, err := a.rw.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = fmt.Errorf("ublk: wrote %d of %d bytes at %d: %w", n, len(p), off, io.ErrShortWrite)
	}
	return err
}

func (a *Adapter) sync() error {
	if s, ok := a.rw.(syncer); ok {
		return s.Sync()
	}
	return nil
}

// zeroBytes is the number of zeros that are written at once.
const zeroBytes = 64 << 10

// zeros begin on a page, for files that are open with O_DIRECT.
var zeros = sync.OnceValue(func() []byte {
	const page = 4096
	b := make([]byte, zeroBytes+page)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (page - 1)
	return b[skip:][:zeroBytes:zeroBytes]
})

// zero calls rw's WriteZeroes if that may be used, and otherwise writes zeros as data.
func (a *Adapter) zero(r *Request) error {
	off, end := r.Offset, r.Offset+int64(r.Length)
	if z, ok := a.rw.(zeroWriter); ok && !r.NoUnmap {
		return z.WriteZeroes(off, end-off)
	}
	for off < end {
		n := min(end-off, zeroBytes)
		if err := a.write(zeros()[:n], off); err != nil {
			return err
		}
		off += n
	}
	return nil
}
