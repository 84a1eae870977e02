package crashfs

import (
	"io"
	"io/fs"
	"slices"
)

// file is an open file of an FS. The FS's lock guards it.
type file struct {
	fs     *FS
	name   string
	node   *inode
	closed bool
}

func (h *file) ReadAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed || off < 0 {
		return 0, &fs.PathError{Op: "read", Path: h.name, Err: h.misuse()}
	}
	if err := h.fs.begin(OpRead); err != nil {
		return 0, pathError(OpRead, h.name, err)
	}
	n := h.node.now.readAt(p, off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TryReadAt implements storage.File. It treats every other page as being in memory.
func (h *file) TryReadAt(p []byte, off int64) bool {
	const page = 4096
	if off/page%2 == 0 {
		return false
	}
	n, err := h.ReadAt(p, off)
	return err == nil && n == len(p)
}

// ReadDisk implements storage.File.
func (h *file) ReadDisk(p []byte, off int64) (int, error) { return h.ReadAt(p, off) }

// misuse returns the error for a call that is refused because the file is closed or an argument is invalid.
func (h *file) misuse() error {
	if h.closed {
		return fs.ErrClosed
	}
	return fs.ErrInvalid
}

func (h *file) WriteAt(p []byte, off int64) (int, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	fault := h.fs.begin(OpWrite)
	if h.closed || off < 0 {
		return 0, pathError(OpWrite, h.name, h.misuse())
	}
	if fault != nil {
		p = p[:len(p)/2/sectorSize*sectorSize]
	}
	if len(p) > 0 {
		if err := h.fs.reserve(h.node, off+int64(len(p))); err != nil {
			return 0, pathError(OpWrite, h.name, err)
		}
		h.node.change(op{seq: h.fs.next(), off: off, data: slices.Clone(p)})
	}
	if fault != nil {
		return len(p), pathError(OpWrite, h.name, fault)
	}
	return len(p), nil
}

// StartWrite does nothing: a crash may keep anything that it could write anyway.
func (h *file) StartWrite(off, n int64) {}

// Allocate implements storage.File. It counts as a truncation.
func (h *file) Allocate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.beginResize(size); err != nil {
		return err
	}
	if err := h.fs.reserve(h.node, size); err != nil {
		return pathError(OpTruncate, h.name, err)
	}
	if size > h.node.now.size {
		h.node.change(op{seq: h.fs.next(), off: size})
	}
	return nil
}

// beginResize begins an operation that sets the size. The caller holds fs.mu.
func (h *file) beginResize(size int64) error {
	if err := h.fs.begin(OpTruncate); err != nil {
		return pathError(OpTruncate, h.name, err)
	}
	if h.closed || size < 0 {
		return pathError(OpTruncate, h.name, h.misuse())
	}
	return nil
}

func (h *file) Truncate(size int64) error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if err := h.beginResize(size); err != nil {
		return err
	}
	if n := h.node; size < n.reserved && !n.unlinked {
		h.fs.used -= n.reserved - size
		n.reserved = size
	}
	h.node.change(op{seq: h.fs.next(), off: size})
	return nil
}

func (h *file) Sync() error {
	h.fs.mu.Lock()
	closed := h.closed
	h.fs.mu.Unlock()
	if closed {
		return pathError(OpSync, h.name, fs.ErrClosed)
	}
	return h.fs.sync(OpSync, h.name, func(err error) {
		if err != nil {
			h.node.failSync()
		} else {
			h.node.sync()
		}
	})
}

func (h *file) Size() (int64, error) {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return 0, &fs.PathError{Op: "stat", Path: h.name, Err: fs.ErrClosed}
	}
	return h.node.now.size, nil
}

// Hold returns false: there is no descriptor.
func (h *file) Hold() (fd int, ok bool) { return -1, false }

// Release does nothing, since Hold never returns true.
func (h *file) Release() {}

func (h *file) Close() error {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	if h.closed {
		return &fs.PathError{Op: "close", Path: h.name, Err: fs.ErrClosed}
	}
	h.closed = true
	h.fs.handles--
	return nil
}
