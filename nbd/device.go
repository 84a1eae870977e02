package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
)

// Device is what an export serves. All methods are called concurrently, by all connections that have opened the export.
// Offsets and lengths are in bytes, of any alignment, and within Size.
//
// A client learns an error number from an error, and its text in replies that can carry one; the error is logged, too.
// These syscall.Errno in the chain of an error have an equivalent in NBD: ENOSPC, EDQUOT, EFBIG, EPERM, EACCES, EROFS,
// EINVAL, ENOMEM, EOVERFLOW, ENOTSUP and ESHUTDOWN. All other errors, and panics, become EIO.
type Device interface {
	// ReadAt fills p. If it reads fewer bytes than len(p), the client gets an error, as with io.ReaderAt.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes p. It must not keep a reference to p.
	WriteAt(p []byte, off int64) (int, error)
	// Flush returns when every change is durable that was acknowledged on any connection.
	Flush() error
	// Discard declares that the content of the range is no longer needed.
	Discard(off, length int64) error
	// WriteZeroes makes the range read as zeroes. Without noHole it should be faster than writing zeroes, since clients
	// are told so (FAST_ZERO). With noHole the range must take its space, as if it were written, so that later writes
	// to it do not fail for want of space.
	WriteZeroes(off, length int64, noHole bool) error
	// Size is called when an export is opened. It must not shrink while the export is open.
	Size() int64
}

// Extenter is implemented by a Device that knows its holes. Without it, everything is reported as data.
type Extenter interface {
	// Extents calls fn with the extents of the range in ascending order, until fn returns false. A hole reads as zeroes
	// and takes no space. Parts of the range that no call covers count as data.
	Extents(off, length int64, fn func(off, length int64, hole bool) bool) error
}

// TryReader is implemented by a Device that knows what it can read at once. A connection asks it first, and hands only
// reads that have to wait to other goroutines.
type TryReader interface {
	// TryReadAt is ReadAt, but returns false instead of waiting for a disk. It should then make the disk begin to read,
	// since ReadAt of the same range follows.
	TryReadAt(p []byte, off int64) (done bool, err error)
}

// Export is an open device, with the properties that clients see.
type Export struct {
	Device      Device
	Name        string // in full
	ReadOnly    bool
	Description string // free text for people, may be empty

	// MinBlock and PreferredBlock are announced to clients. They are powers of two; zero stands for 1 and
	// 4096. Requests with a smaller alignment are served too.
	MinBlock, PreferredBlock int

	// NoMultiConn says that a client should open the export on one connection only. Otherwise MULTI_CONN is announced.
	NoMultiConn bool

	// Close may be nil. Otherwise it is called once, when the connection that opened the export no longer needs it and
	// none of its requests is under way.
	Close func() error
}

func (e *Export) close() (err error) {
	if e.Close == nil {
		return nil
	}
	defer recovered(&err)
	return e.Close()
}

func (e *Export) info() Info {
	return Info{
		Name: e.Name, Size: e.Device.Size(), ReadOnly: e.ReadOnly, Description: e.Description,
		MinBlock: e.MinBlock, PreferredBlock: e.PreferredBlock, NoMultiConn: e.NoMultiConn,
	}
}

// Info is what clients can ask about an export that they have not opened. The fields mean the same as in Export.
type Info struct {
	Name                     string
	Size                     int64
	ReadOnly                 bool
	Description              string
	MinBlock, PreferredBlock int
	NoMultiConn              bool

	// Contexts are the names of metadata contexts that clients can select: those that the export's Device, a
	// ContextOpener, can open. base:allocation is not among them.
	Contexts []string
}

// Exports names what clients may open. Its methods are called concurrently.
//
// The empty name stands for the default export, if there is one. An error that matches fs.ErrNotExist tells the client
// that there is no such export; one that matches fs.ErrPermission, that it may not use the export. The text of every
// error is sent to the client.
type Exports interface {
	// List returns the names to advertise. Describe and Open may accept others.
	List() ([]string, error)
	// Describe describes an export, even one that cannot be opened because it is in use.
	Describe(name string) (Info, error)
	// Open opens an export for one connection.
	Open(name string) (*Export, error)
}

// ClientExports is implemented by Exports that tell clients apart, or that work for a client only while it is there.
type ClientExports interface {
	// ForClient returns the exports as the client at the other end of nc sees them. ctx ends when the client has gone,
	// or is given up. It lasts as long as a request, also of a client that has disconnected in order.
	ForClient(ctx context.Context, nc net.Conn) Exports
}

// InfoLister is implemented by Exports that can list descriptions with the names. ListInfo takes the place of List; of
// each Info, Name and Description count.
type InfoLister interface {
	ListInfo() ([]Info, error)
}

// wireErrno returns the error number for a Device's error.
func wireErrno(err error) uint32 {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return errnoIO
	}
	switch errno {
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
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

// readFull reads as io.ReaderAt promises. It ignores an error, even io.EOF, if all bytes were read. Its error is a
// locatedError.
func readFull(d io.ReaderAt, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return &locatedError{off + int64(max(0, min(n, len(p)-1))), err}
}

func writeFull(d io.WriterAt, p []byte, off int64) error {
	n, err := d.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
