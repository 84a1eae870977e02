package ublk

import (
	"fmt"

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
