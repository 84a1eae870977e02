package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	dirMode  = 0o700
	fileMode = 0o600
)

// dir is a real directory. Files are opened relative to its descriptor by plain
// names and never through a symbolic link, so that nothing outside it can be
// reached.
type dir struct {
	path       string
	f          *os.File
	overwrites bool
}

// OpenDir opens the directory, and makes it if it does not exist. The last
// element of the path may not be a symbolic link.
func OpenDir(path string) (FS, error) {
	err := os.Mkdir(path, dirMode)
	if err == nil {
		err = syncParent(path)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("open directory: %w", noSpace(err))
	}
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory: %w", err)
	}
	return &dir{path: path, f: f, overwrites: overwrites(f)}, nil
}

// overwrites knows the file systems that write over blocks in place, and never share them between files (statfs(2)).
func overwrites(f *os.File) bool {
	var st unix.Statfs_t
	_, err := retry(func() (int, error) { return 0, unix.Fstatfs(int(f.Fd()), &st) })
	return err == nil && (st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.TMPFS_MAGIC)
}

func syncParent(path string) error {
	f, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *dir) Create(name string, size int64) (File, error) {
	f, err := d.openat(name, unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create: %w", noSpace(err))
	}
	if err := reserve(f, size); err != nil {
		err = fmt.Errorf("reserve %d bytes for %s: %w", size, f.Name(), noSpace(err))
		return nil, errors.Join(err, f.Close(), d.Remove(name))
	}
	return &file{f}, nil
}

func (d *dir) Open(name string) (File, error) {
	f, err := d.openat(name, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("open %s: %w: not a regular file", f.Name(), fs.ErrInvalid)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &file{f}, nil
}

func (d *dir) openat(name string, flags int) (*os.File, error) {
	path, err := d.join(name)
	if err != nil {
		return nil, err
	}
	// Even a FIFO put in the file's place does not block a read-write open: fifo(7).
	flags |= unix.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := retry(func() (int, error) { return unix.Openat(int(d.f.Fd()), name, flags, fileMode) })
	if err != nil {
		return nil, &fs.PathError{Op: "openat", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (d *dir) join(name string) (string, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("name %q: %w", name, fs.ErrInvalid)
	}
	return filepath.Join(d.path, name), nil
}

// reserve gives the new file its size and its space.
func reserve(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	_, err := retry(func() (int, error) { return 0, unix.Fallocate(int(f.Fd()), 0, 0, size) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		return writeZeros(f, size) // as posix_fallocate(3) does
	}
	return err
}

func writeZeros(f *os.File, size int64) error {
	zeros := make([]byte, min(size, 1<<20))
	for off := int64(0); off < size; off += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(size-off, int64(len(zeros)))], off); err != nil {
			return err
		}
	}
	return nil
}

func (d *dir) Remove(name string) error {
	path, err := d.join(name)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	if err := unix.Unlinkat(int(d.f.Fd()), name, 0); err != nil {
		return fmt.Errorf("remove: %w", &fs.PathError{Op: "unlinkat", Path: path, Err: err})
	}
	return nil
}

func (d *dir) List() ([]string, error) {
	// A descriptor of its own: the position in a directory is the descriptor's.
	fd, err := retry(func() (int, error) {
		return unix.Openat(int(d.f.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", d.path, err)
	}
	f := os.NewFile(uintptr(fd), d.path)
	names, err := f.Readdirnames(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("list %s: %w", d.path, err)
	}
	slices.Sort(names)
	return names, nil
}

func (d *dir) SyncDir() error {
	if err := d.f.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", noSpace(err))
	}
	return nil
}

func (d *dir) Overwrites() bool { return d.overwrites }

func (d *dir) Free() (int64, error) {
	var st unix.Statfs_t
	_, err := retry(func() (int, error) { return 0, unix.Fstatfs(int(d.f.Fd()), &st) })
	if err != nil {
		return 0, fmt.Errorf("free space of %s: %w", d.path, err)
	}
	unit := st.Frsize // what f_bavail counts in: statvfs(3)
	if unit == 0 {
		unit = st.Bsize
	}
	return int64(st.Bavail) * unit, nil
}

func (d *dir) Close() error { return d.f.Close() }

type file struct{ *os.File }

func (f *file) TryReadAt(p []byte, off int64) bool {
	// From 5.9 on the kernel begins to read what it does not find.
	n, err := unix.Preadv2(int(f.Fd()), [][]byte{p}, off, unix.RWF_NOWAIT)
	if err == unix.EOPNOTSUPP { // tmpfs has all in memory, and others cannot tell
		n, err = f.ReadAt(p, off)
	}
	return err == nil && n == len(p)
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(p, off)
	return n, noSpace(err)
}

func (f *file) Sync() error {
	_, err := retry(func() (int, error) { return 0, unix.Fdatasync(int(f.Fd())) })
	if err != nil {
		return &fs.PathError{Op: "fdatasync", Path: f.Name(), Err: noSpace(err)}
	}
	return nil
}

func (f *file) StartWrite(off, n int64) {
	// An error here is Sync's to find and to report.
	_ = unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}

func (f *file) Truncate(size int64) error { return noSpace(f.File.Truncate(size)) }

func (f *file) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// noSpace makes the system's errors about a full disk match ErrNoSpace.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// retry repeats a call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}
