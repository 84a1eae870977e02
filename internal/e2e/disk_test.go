package e2e

import (
	"io"
	"os"
	"syscall"
)

// disk is a disk that the oracle writes to.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
	io.Closer
}

// openDevice opens a block device with O_DIRECT, so that reads return the server's data.
func openDevice(path string) (disk, error) {
	return os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT, 0)
}
