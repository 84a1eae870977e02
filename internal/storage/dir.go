package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

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
	readOnly   bool
	files      table

	mu   sync.Mutex // guards live; file.mu may be taken under it
	live map[string][]*file
}

// OpenDir opens the directory at path, and makes it if it does not exist. The last element of the path must not be a
// symbolic link.
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

func newDir(in *Folder, readOnly bool) *dir {
	d := &dir{in: in, overwrites: overwrites(in.f), readOnly: readOnly, live: map[string][]*file{}}
	d.files.limit = descriptorLimit()
	return d
}

// overwrites reports whether the file system is known to overwrite blocks in place and never to share them between
// files (statfs(2)).
func overwrites(f *os.File) bool {
	var st unix.Statfs_t
	err := Retry(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
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
	if d.readOnly {
		return nil, fmt.Errorf("create: %w", &fs.PathError{Op: "open", Path: d.in.Join(name), Err: unix.EROFS})
	}
	fd, err := d.openFile(name, unix.O_CREAT|unix.O_EXCL, false)
	if err != nil {
		return nil, fmt.Errorf("create: %w", noSpace(err))
	}
	if err := reserve(fd, size); err != nil {
		err = fmt.Errorf("reserve %d bytes for %s: %w", size, fd.Name(), noSpace(err))
		return nil, errors.Join(err, fd.Close(), d.Remove(name))
	}
	f := &file{d: d, name: name, at: -1}
	f.wrote.Store(1) // counts the setting of its size
	f.has(fd)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.live[name] = append(d.live[name], f)
	return f, nil
}

// Open does not take a descriptor yet.
func (d *dir) Open(name string) (File, error) {
	path, err := joined(d.in.path, name)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	d.mu.Lock() // so that a concurrent Remove either comes first or knows the file
	defer d.mu.Unlock()
	st, err := d.in.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("open: %s is no file: %w", path, ErrIrregular)
	}
	f := &file{d: d, name: name, at: -1}
	d.live[name] = append(d.live[name], f)
	return f, nil
}

// forget removes a file that is being closed from live.
func (d *dir) forget(f *file) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if left := slices.DeleteFunc(d.live[f.name], func(x *file) bool { return x == f }); len(left) > 0 {
		d.live[f.name] = left
	} else {
		delete(d.live, f.name)
	}
}

func (d *dir) openFile(name string, flags int, hasty bool) (*os.File, error) {
	if d.readOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	// If all descriptors are in use, open one beyond the limit. A hasty caller may not do that: it keeps the descriptor
	// for a read on a ring, while others need theirs for one system call only.
	if d.files.full() && !d.files.evict(hasty) && hasty {
		return nil, &fs.PathError{Op: "open", Path: d.in.Join(name), Err: unix.EMFILE}
	}
	var f *os.File
	err := d.files.with(hasty, func() (err error) { f, err = d.in.Open(name, flags); return err })
	return f, err
}

// joined returns the path of a file in a directory. The name must be a plain one.
func joined(dir, name string) (string, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return "", fmt.Errorf("name %q: %w", name, fs.ErrInvalid)
	}
	return filepath.Join(dir, name), nil
}

// reserve sets the size of a new file and reserves its space.
func reserve(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	err := Retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
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
	if d.readOnly {
		return &fs.PathError{Op: "remove", Path: d.in.Join(name), Err: unix.EROFS}
	}
	for {
		d.mu.Lock()
		i := slices.IndexFunc(d.live[name], func(f *file) bool { return !f.pinned.Load() })
		if i < 0 {
			break
		}
		f := d.live[name][i]
		d.mu.Unlock()
		if err := f.pin(); err != nil {
			return fmt.Errorf("remove %s, which is open: %w", d.in.Join(name), err)
		}
	}
	defer d.mu.Unlock()
	if err := d.in.Remove(name); err != nil {
		return noSpace(err) // some file systems write elsewhere even to remove
	}
	delete(d.live, name)
	return nil
}

func (d *dir) List() (names []string, err error) {
	err = d.files.with(false, func() (err error) { names, err = d.in.Names(); return err })
	return names, err
}

func (d *dir) SyncDir() error { return d.in.Sync() }

func (d *dir) Overwrites() bool { return d.overwrites }

func (d *dir) Free() (int64, error) {
	var st unix.Statfs_t
	err := Retry(func() error { return unix.Fstatfs(d.in.Fd(), &st) })
	if err != nil {
		return 0, fmt.Errorf("free space of %s: %w", d.in.path, err)
	}
	unit := st.Frsize // the unit of f_bavail: statvfs(3)
	if unit == 0 {
		unit = st.Bsize
	}
	return bytesOf(st.Bavail, unit), nil
}

// bytesOf returns the bytes in n units, or freeMost if there are more: some file systems return arbitrary numbers.
func bytesOf(n uint64, unit int64) int64 {
	if hi, lo := bits.Mul64(n, uint64(max(unit, 0))); hi == 0 && lo <= freeMost {
		return int64(lo)
	}
	return freeMost
}

// freeMost is small enough to be added to without overflow.
const freeMost = 1 << 60

func (d *dir) Close() error { return d.in.Close() }

// noSpace makes ENOSPC and EDQUOT match ErrNoSpace.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}

// retry repeats a call as long as a signal interrupts it.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Retry repeats a system call as long as a signal interrupts it. Go's own signals do that to its threads, and some file
// systems, such as those over a network, return EINTR from calls that never do on a local disk.
func Retry(call func() error) error {
	_, err := retry(func() (int, error) { return 0, call() })
	return err
}
