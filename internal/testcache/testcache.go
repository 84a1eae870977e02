// Package testcache looks at the page cache. It is for tests only.
package testcache

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Pages returns how many of the pages of the first n bytes of a file are in memory. It reads nothing: even a read that
// must not wait (RWF_NOWAIT) starts one, and a fast disk answers before the system looks again.
func Pages(t testing.TB, fd, n int) (pages int) {
	t.Helper()
	p, err := unix.Mmap(fd, 0, n, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(p); err != nil {
			t.Error(err)
		}
	}()
	in := make([]byte, (n+os.Getpagesize()-1)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&p[0])), uintptr(n), uintptr(unsafe.Pointer(&in[0])))
	if errno != 0 {
		t.Fatal("mincore:", errno)
	}
	for _, b := range in {
		pages += int(b & 1)
	}
	return pages
}
