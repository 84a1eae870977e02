package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	dirMode  = 0o700
	fileMode = 0o600
)

// dir is a real directory.
type dir struct {
	in         *Folder
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
	d, err := newFolder(path, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d.Files(), nil
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
	f, err := d.in.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
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
	f, err := d.in.Open(name, unix.O_RDWR)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return &file{f}, nil
}

// joined is the path of a file in a directory; the name must be a plain one.
func joined(dir, name string) (string, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("name %q: %w", name, fs.ErrInvalid)
	}
	return filepath.Join(dir, name), nil
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

func (d *dir) Remove(name string) error { return d.in.Remove(name) }

func (d *dir) List() ([]string, error) { return d.in.Names() }

func (d *dir) SyncDir() error { return d.in.Sync() }

func (d *dir) Overwrites() bool { return d.overwrites }

func (d *dir) Free() (int64, error) {
	var st unix.Statfs_t
	_, err := retry(func() (int, error) { return 0, unix.Fstatfs(d.in.Fd(), &st) })
	if err != nil {
		return 0, fmt.Errorf("free space of %s: %w", d.in.path, err)
	}
	unit := st.Frsize // what f_bavail counts in: statvfs(3)
	if unit == 0 {
		unit = st.Bsize
	}
	return int64(st.Bavail) * unit, nil
}

func (d *dir) Close() error { return d.in.Close() }

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
