package ublk

import (
	"fmt"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
)

// readSlot is one fetch. It is on the heap and refers to p, so that the memory that the kernel writes to is neither
// moved nor freed.
type readSlot struct {
	r   *Request
	fd  int
	p   []byte
	off int64
}

// startRead queues one fetch of r.
func (q *queue) startRead(r *Request, fd int, p []byte, off int64) {
	if len(q.free) == 0 {
		q.growReads()
	}
	slot := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	q.reads[slot] = readSlot{r: r, fd: fd, p: p, off: off}
	r.reads++
	q.reading++
	q.transport.read(slot, fd, p, off)
}

// growReads doubles the number of slots. It runs only until the queue has had its busiest moment.
func (q *queue) growReads() {
	old := len(q.reads)
	n := max(2*old, q.depth)
	reads := make([]readSlot, n)
	copy(reads, q.reads)
	q.reads = reads
	q.free = make([]int, 0, n)
	for slot := old; slot < n; slot++ {
		q.free = append(q.free, slot)
	}
}

// readDone handles the result of one read, which is n bytes or a negative errno.
func (q *queue) readDone(slot, n int) {
	s := &q.reads[slot]
	r := s.r
	switch {
	case n == -int(unix.EINTR) || n == -int(unix.EAGAIN):
		q.transport.read(slot, s.fd, s.p, s.off)
		return
	case n > 0 && n < len(s.p):
		s.p, s.off = s.p[n:], s.off+int64(n)
		q.transport.read(slot, s.fd, s.p, s.off)
		return
	case n < 0 && r.readErr == nil:
		r.readErr = fmt.Errorf("ublk: fetch of %d bytes at %d: %w", len(s.p), s.off, syscall.Errno(-n))
	case n == 0 && r.readErr == nil:
		r.readErr = fmt.Errorf("ublk: fetch of %d bytes at %d: %w", len(s.p), s.off, io.ErrUnexpectedEOF)
	}
	*s = readSlot{}
	q.free = append(q.free, slot)
	q.reading--
	if r.reads--; r.reads > 0 {
		return
	}
	wait := r.wait
	r.wait = waitNone
	switch wait {
	case waitFetch:
		q.settleFetch(r)
	case waitCommit:
		q.commit(r)
	}
}
