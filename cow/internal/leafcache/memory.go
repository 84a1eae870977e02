//go:build !race

package leafcache

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// allocate returns zeroed memory outside Go's heap. The garbage collector neither scans it nor counts it when it sizes
// the heap. The kernel provides each page at its first use.
func allocate(words int) ([]uint64, error) {
	b, err := unix.Mmap(-1, 0, 8*words, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("memory for the map: %w", err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), words), nil
}

// deallocate frees memory from allocate. Nothing may refer to it any more.
func deallocate(w []uint64) error {
	return unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), 8*len(w)))
}
