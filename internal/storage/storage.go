// Package storage is the engine's file layer: one flat directory of files. The engine relies on nothing but the two
// interfaces. OpenDir returns the real directory; package crashfs is a double of it that can lose power.
package storage

import (
	"errors"
	"io"
)

// ErrNoSpace is matched by an error about a full file system or an exhausted quota.
var ErrNoSpace = errors.New("no space left")

// FS is a directory of files without subdirectories. Its methods may be called concurrently. Errors match fs.ErrExist,
// fs.ErrNotExist and ErrNoSpace.
type FS interface {
	// Create makes a file of the given size, which must not exist yet. The file reads as zeros, and its space is
	// reserved: writes within the size do not fail for lack of space. If Create fails, it leaves no file. Neither the
	// size nor the name of the file is durable before File.Sync and FS.SyncDir.
	Create(name string, size int64) (File, error)
	// Open opens an existing file. Any number of files may be open: they share the descriptors that the process may
	// have. An operation on a file without a descriptor waits for one if it must. It fails with EMFILE only if none
	// becomes free for half a minute.
	Open(name string) (File, error)
	// Remove removes a file's name. Open files stay usable.
	Remove(name string) error
	// SetAside moves a file to a directory beside this one, where it is kept under the name as. When SetAside returns,
	// the file is durably in at least one of the two. That it is gone from this one is durable after SyncDir.
	SetAside(name, as string) error
	// PruneAside removes the files that were set aside under names beginning with prefix, except the last keep of them
	// in the order of names.
	PruneAside(prefix string, keep int) error
	// List returns the names in the directory, sorted.
	List() ([]string, error)
	// SyncDir makes all earlier creations and removals durable.
	SyncDir() error
	// Overwrites reports whether overwriting a file's content needs no new space, so that the space of a file stays
	// reserved after it has been written to.
	Overwrites() bool
	// Free returns the number of bytes that are free to this user.
	Free() (int64, error)
	// Close closes the directory. Open files stay usable.
	io.Closer
}

// File is an open file. Its methods may be called concurrently.
type File interface {
	io.ReaderAt
	// TryReadAt fills p from off and returns true if all of it is in memory. Otherwise it makes the system begin to
	// read, and returns false without waiting; p is then arbitrary. The caller must use ReadAt, which waits, and which
	// returns the error if there is one. If the system cannot tell what is in memory, TryReadAt does what ReadAt does.
	TryReadAt(p []byte, off int64) bool
	// ReadDisk reads like ReadAt, but what the disk has, and not what memory has of it, as far as the system can. It is
	// slower. It works best with memory from DiskBuffer, and with off and len(p) multiples of DiskAlign.
	ReadDisk(p []byte, off int64) (n int, err error)
	io.WriterAt
	// Sync makes all earlier writes and truncations durable, including the size that is needed to read them back
	// (fdatasync(2)). If it fails, what was not durable may be lost, even if a later Sync succeeds.
	Sync() error
	// StartWrite makes the system begin to write the n bytes at off to the disk, and does not wait. It is a hint that
	// leaves less to do for a later Sync; it makes nothing durable.
	StartWrite(off, n int64)
	// Allocate makes the file at least size bytes large and reserves its space, as Create does. If it fails, the file
	// is unchanged. The error errors.ErrUnsupported means that the file system cannot allocate.
	Allocate(size int64) error
	// Truncate sets the size of the file.
	Truncate(size int64) error
	// Size returns the size of the file.
	Size() (int64, error)
	// Hold returns the file's descriptor, for a ring. The descriptor stays valid until Release. ok is false if there is
	// no descriptor, or none without waiting; then the caller must use the other methods. After each Hold that returned
	// true the caller must call Release, before Close.
	Hold() (fd int, ok bool)
	Release()
	io.Closer
}
