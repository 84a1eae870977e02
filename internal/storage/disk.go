package storage

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DiskAlign is the alignment of memory, offsets and lengths with which ReadDisk reads around the page cache.
const DiskAlign = 4096

// DiskBuffer returns n bytes of memory that are aligned for ReadDisk.
func DiskBuffer(n int) []byte {
	b := make([]byte, n+DiskAlign)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (DiskAlign - 1)
	return b[skip : skip+n : skip+n]
}

// ReadDisk reads through a descriptor of its own, which is open with O_DIRECT. So it leaves the page cache as it is. If
// the file system has no such reads, the pages are dropped from the cache and read again.
func (f *file) ReadDisk(p []byte, off int64) (n int, err error) {
	d, err := f.use()
	if err != nil {
		return 0, err
	}
	defer func() { _ = d.release() }()
	// Not by its name, which may be gone, or another file's by now.
	direct, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", d.Fd()), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err == nil {
		n, err = readDirect(direct, p, off)
		_ = unix.Close(direct)
		if err == nil && n < len(p) {
			return n, io.EOF
		}
		if err != unix.EINVAL {
			return n, f.readError(err)
		}
	}
	_ = unix.Fadvise(int(d.Fd()), off&^(DiskAlign-1), int64(len(p))+2*DiskAlign, unix.FADV_DONTNEED) // a file system may have no cache
	return d.ReadAt(p, off)
}

func (f *file) readError(err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: "read", Path: f.path(), Err: os.NewSyscallError("pread", err)}
}

// readDirect reads until p is full or the file ends. Like the kernel, it returns EINVAL if it cannot go on with the
// alignment.
func readDirect(fd int, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := retry(func() (int, error) { return unix.Pread(fd, p[n:], off+int64(n)) })
		if err != nil {
			return n, err
		}
		if m%DiskAlign == 0 && m > 0 {
			n += m
			continue
		}
		var st unix.Stat_t
		if err := Retry(func() error { return unix.Fstat(fd, &st) }); err != nil {
			return n, err
		}
		if off+int64(n+m) >= st.Size {
			return n + m, nil
		}
		if m < DiskAlign { // a read may be short anywhere
			return n, unix.EINVAL
		}
		n += m / DiskAlign * DiskAlign
	}
	return n, nil
}
