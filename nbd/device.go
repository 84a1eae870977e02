package nbd

import (
	"errors"
	"io"
	"syscall"
)

// Device is what an export serves. All methods are called concurrently, by all connections that
// have opened the export. Offsets and lengths are in bytes, of any alignment, and within Size.
//
// A syscall.Errno in an error's chain tells the client what is wrong: ENOSPC, EDQUOT, EPERM, EACCES,
// EROFS, EINVAL, ENOMEM, EOVERFLOW, ENOTSUP and ESHUTDOWN have an NBD equivalent; anything else
// becomes EIO.
type Device interface {
	// ReadAt fills p. Fewer bytes than len(p) are an error to the client, as with io.ReaderAt.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes p, and keeps no reference to it.
	WriteAt(p []byte, off int64) (int, error)
	// Flush returns when everything that any connection was told is done is durable.
	Flush() error
	// Discard says that the content of the range is no longer needed.
	Discard(off, length int64) error
	// WriteZeroes makes the range read as zeroes; with noHole, writes to it must not fail for want
	// of space later. It is expected to be faster than writing zeroes: clients are told so
	// (FAST_ZERO). A device for which it is not should return ENOTSUP.
	WriteZeroes(off, length int64, noHole bool) error
	// Size is asked for when an export is opened; it must not shrink while the export is open.
	Size() int64
}

// Extenter is implemented by a Device that knows its holes. Without it, all is reported as data.
type Extenter interface {
	// Extents calls fn with the extents of the range in ascending order, until fn returns false. A
	// hole reads as zeroes and takes no space. What no call covers is taken to be data.
	Extents(off, length int64, fn func(off, length int64, hole bool) bool) error
}

// TryReader is implemented by a Device that knows what it can read at once. A connection asks it first, and gives only
// reads that have to wait to other goroutines.
type TryReader interface {
	// TryReadAt is ReadAt, but returns false instead of waiting for a disk. It should have the disk begin to read
	// then, since ReadAt of the same range follows.
	TryReadAt(p []byte, off int64) (done bool, err error)
}

// Export is an open device and how it is to be served.
type Export struct {
	Device      Device
	ReadOnly    bool
	Description string // free text for people, may be empty

	// MinBlock and PreferredBlock are announced to clients, powers of two; zero stands for 1 and
	// 4096. Requests that are not so aligned are served all the same.
	MinBlock, PreferredBlock int

	// Close, unless nil, is called once when the connection that opened the export needs it no more
	// and none of its requests is under way.
	Close func() error
}

func (e *Export) close() error {
	if e.Close == nil {
		return nil
	}
	return e.Close()
}

// Exports names what clients may open. Its methods are called concurrently.
type Exports interface {
	// List returns the names to advertise. Open may know others.
	List() ([]string, error)
	// Open opens an export for one connection, or for one question about it. Errors that are
	// fs.ErrNotExist tell the client that there is no such export, fs.ErrPermission that it may not
	// have it. The text of other errors is sent to the client.
	Open(name string) (*Export, error)
}

// wireErrno gives the error number for a Device's error.
func wireErrno(err error) uint32 {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return errnoIO
	}
	switch errno {
	case syscall.ENOSPC, syscall.EDQUOT:
		return errnoNoSpace
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return errnoPerm
	case syscall.EINVAL:
		return errnoInval
	case syscall.ENOMEM:
		return errnoNoMem
	case syscall.EOVERFLOW:
		return errnoOverflow
	case syscall.ENOTSUP: // EOPNOTSUPP is the same number on Linux
		return errnoNotSup
	case syscall.ESHUTDOWN:
		return errnoShutdown
	}
	return errnoIO
}

// readFull reads as io.ReaderAt promises: an error, io.EOF too, counts only where bytes are missing.
func readFull(d Device, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func writeFull(d Device, p []byte, off int64) error {
	n, err := d.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
