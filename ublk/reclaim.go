package ublk

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// flusherThreads counts the queue threads, which block all signals while they wait; so a call that needs every thread of
// the process to take one would wait for ever.
var flusherThreads struct {
	sync.Mutex // held over such a call, and by whoever starts queue threads
	n          int
}

func queueThreadsBegin(n int) {
	flusherThreads.Lock()
	defer flusherThreads.Unlock()
	flusherThreads.n += n
}

func queueThreadEnds() {
	flusherThreads.Lock()
	defer flusherThreads.Unlock()
	flusherThreads.n--
}

// SetIOFlusher marks every thread of the process, and those that it makes later, as ones that write back memory
// (PR_SET_IO_FLUSHER, which needs CAP_SYS_RESOURCE): when they need memory, the kernel does not have them wait for
// devices that may be their own. A server that does its work on other goroutines than the queues' calls it before the
// first device is made; afterwards it is refused with ErrBusy. The queue threads are marked in any case.
//
// A program with cgo cannot do it for all threads; the error is then syscall.ENOTSUP.
func SetIOFlusher() error {
	flusherThreads.Lock()
	defer flusherThreads.Unlock()
	if flusherThreads.n > 0 {
		return fmt.Errorf("ublk: mark the process as an I/O flusher: %w: do it before the first device is made", ErrBusy)
	}
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0)
	switch {
	case errno == 0:
		return nil
	case errors.Is(errno, syscall.ENOTSUP):
		return fmt.Errorf("ublk: mark the process as an I/O flusher: not in a program with cgo: %w", errno)
	}
	return fmt.Errorf("ublk: mark the process as an I/O flusher: %w", errno)
}

// markFlusher marks the calling thread.
func markFlusher() bool { return unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0) == nil }
