// Package storage is the engine's file layer: one flat directory of files. The
// interfaces are what the engine may rely on; OpenDir is the real directory and
// package crashfs its double that loses power.
package storage

import (
	"errors"
	"io"
)

// ErrNoSpace is matched by an error about a file system, or a quota, that is full.
var ErrNoSpace = errors.New("no space left")

// FS is a directory of files without subdirectories. Its methods may be called
// concurrently. Errors match fs.ErrExist, fs.ErrNotExist and ErrNoSpace.
type FS interface {
	// Create makes a file that does not exist, of the given size, reads as
	// zeros, and has its space reserved: writes within the size do not fail for
	// lack of it. If it fails it leaves no file. Neither the file's
	// size nor its name is durable before File.Sync and FS.SyncDir.
	Create(name string, size int64) (File, error)
	// Open opens a file that exists. Any number may be open: they share the descriptors that the process may have, and
	// an operation on a file that has none waits for one where it must. Only if there is none for half a minute is
	// that an error (EMFILE).
	Open(name string) (File, error)
	// Remove removes a file's name; files that are open stay usable.
	Remove(name string) error
	// SetAside moves a file to a directory beside this one, to be kept under another name there. The file is in at
	// least one of the two durably when it returns; that it is not in this one is so after SyncDir.
	SetAside(name, as string) error
	// PruneAside removes what was set aside under names that begin with prefix, but the last few of them in order.
	PruneAside(prefix string, keep int) error
	// List returns the names in the directory in order.
	List() ([]string, error)
	// SyncDir makes every creation and removal before it durable.
	SyncDir() error
	// Overwrites reports whether writing over what a file holds needs no new space, so that the space of a file
	// that was written to stays reserved.
	Overwrites() bool
	// Free returns the number of bytes free to this user.
	Free() (int64, error)
	// Close releases the directory. Files that are open stay usable.
	io.Closer
}

// File is an open file. Its methods may be called concurrently.
type File interface {
	io.ReaderAt
	// TryReadAt fills p from off if memory has it all. Else it has the system begin to read it, and returns
	// false without waiting: ReadAt waits, and tells what is wrong. p is arbitrary then. Where the system cannot
	// tell, it is ReadAt.
	TryReadAt(p []byte, off int64) bool
	io.WriterAt
	// Sync makes every write and truncation before it durable, with the size
	// that reading them back needs (fdatasync(2)). After an error what was not
	// durable may be lost even if a later Sync succeeds.
	Sync() error
	// StartWrite has the system begin to write what was written to the n bytes
	// at off, and does not wait. It is a hint, so that a later Sync finds little
	// left to do; it makes nothing durable.
	StartWrite(off, n int64)
	// Allocate makes the file at least size bytes large and has its space reserved, as Create does. An error leaves it
	// as it was; errors.ErrUnsupported: the file system cannot.
	Allocate(size int64) error
	// Truncate sets the size.
	Truncate(size int64) error
	// Size returns the size.
	Size() (int64, error)
	// Hold returns the descriptor, for a ring, which stays valid until Release; false: there is none, or it would have
	// to be waited for, and the other methods do. Each Hold that is true has its Release, before Close.
	Hold() (fd int, ok bool)
	Release()
	io.Closer
}
