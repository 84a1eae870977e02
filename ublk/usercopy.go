package ublk

import (
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The place of a request's payload in the char device with UBLK_F_USER_COPY (include/uapi/linux/ublk_cmd.h): from
// UBLKSRV_IO_BUF_OFFSET on, each tag of each queue has 2^UBLK_IO_BUF_BITS bytes.
const (
	userCopyBase   = 0x80000000
	userTagShift   = 25
	userQueueShift = userTagShift + 16
)

// userTransport is the transport of CopyUser. Its commands carry no address. It copies payloads with pread and pwrite
// on the char device. Reads and writes on the ring would work too, but the ring would pass each of them to a worker
// thread, because the char device cannot declare that it never blocks.
type userTransport struct{ *ringTransport }

func (p *userTransport) offset(tag int) int64 {
	return userCopyBase + int64(p.queue)<<userQueueShift + int64(tag)<<userTagShift
}

func (p *userTransport) load(tag int, b []byte) error {
	return transfer(p.char.pread, b, p.offset(tag))
}

func (p *userTransport) store(tag int, b []byte) error {
	return transfer(p.char.pwrite, b, p.offset(tag))
}

// transfer calls f until all of b is copied.
func transfer(f func(p []byte, off int64) (int, error), b []byte, off int64) error {
	for len(b) > 0 {
		n, err := f(b, off)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("ublk: copy %d bytes of a request: %w", len(b), err)
		case n <= 0:
			return fmt.Errorf("ublk: copy %d bytes of a request: %w", len(b), io.ErrUnexpectedEOF)
		default:
			b, off = b[n:], off+int64(n)
		}
	}
	return nil
}

// rawCopyMax is the largest copy that is made without informing Go's scheduler. Such a copy takes a few microseconds
// and cannot sleep. Giving up the processor and taking it back would cost more. A larger copy would keep the garbage
// collector waiting.
const rawCopyMax = 64 << 10

func (f charFiles) pread(p []byte, off int64) (int, error) {
	return copyCall(unix.SYS_PREAD64, f.char, p, off)
}

func (f charFiles) pwrite(p []byte, off int64) (int, error) {
	return copyCall(unix.SYS_PWRITE64, f.char, p, off)
}

func copyCall(trap uintptr, fd int, p []byte, off int64) (int, error) {
	var n uintptr
	var errno unix.Errno
	if at := unsafe.Pointer(unsafe.SliceData(p)); len(p) <= rawCopyMax {
		n, _, errno = unix.RawSyscall6(trap, uintptr(fd), uintptr(at), uintptr(len(p)), uintptr(off), 0, 0)
	} else {
		n, _, errno = unix.Syscall6(trap, uintptr(fd), uintptr(at), uintptr(len(p)), uintptr(off), 0, 0)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
