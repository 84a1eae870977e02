package e2e

import (
	"io"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// disk is a disk that the oracle writes to.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	io.Closer
}

// blockDevice is a block device that was opened with O_DIRECT, so that reads return the server's data.
type blockDevice struct{ *os.File }

func openDevice(path string) (blockDevice, error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
	return blockDevice{f}, err
}

// WriteDurable writes with FUA.
func (d blockDevice) WriteDurable(p []byte, off int64) error {
	n, err := unix.Pwritev2(int(d.Fd()), [][]byte{p}, off, unix.RWF_DSYNC)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

const blkZeroOut = 0x127f // BLKZEROOUT of linux/fs.h: _IO(0x12, 127)

// Zero makes a range read as zeros.
func (d blockDevice) Zero(off, length int64) error {
	span := [2]uint64{uint64(off), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), blkZeroOut, uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}
