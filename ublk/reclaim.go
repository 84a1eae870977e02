package ublk

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// SetIOFlusher marks every thread of the process, and those that it makes later, as I/O flushers (PR_SET_IO_FLUSHER,
// which needs CAP_SYS_RESOURCE): when they need memory, the kernel does not make them wait for devices that may be
// their own. A server whose work is done on goroutines other than the queues' should call it, best before it makes its
// first device. The queue threads are marked in any case.
//
// A program with cgo cannot do this for all threads; the error is then syscall.ENOTSUP.
func SetIOFlusher() error {
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
