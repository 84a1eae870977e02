package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/storage"
)

// toFile returns a sink that writes to path. An existing file is overwritten only if force is true. Then only its
// content changes: a symbolic link, other names of the file, its owner and its mode stay.
func toFile(path string, force bool) (sink, error) {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return newFile(path), nil
	}
	if err == nil && force {
		// A symbolic link whose target does not exist.
		if fi, err = os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return inPlace(path), nil
		}
	}
	switch {
	case err != nil:
		return nil, err
	case fi.IsDir():
		return nil, fmt.Errorf("%s is a folder: %w", path, fs.ErrExist)
	case !force:
		return nil, fmt.Errorf("%s: %w: --force overwrites it", path, fs.ErrExist)
	case fi.Mode().IsRegular():
		return overFile(path), nil
	}
	return inPlace(path), nil
}

// newFile creates the file at path once its content is complete, unless something else is there by then.
func newFile(path string) sink {
	return func(ctx context.Context, c exported) error {
		f, err := beside(path)
		if err != nil {
			return err
		}
		if err = c.toFile(ctx, f.File); err == nil {
			err = f.link(path)
		}
		return errors.Join(err, f.Close())
	}
}

// overFile replaces a regular file once the new one is complete, provided that nobody can tell the difference. If the
// new file cannot get the old one's owner, mode or attributes, or if the old one has other names, it is overwritten in
// place.
func overFile(path string) sink {
	return func(ctx context.Context, c exported) error {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return inPlace(path)(ctx, c) // such as /dev/stdout
		}
		f, err := beside(target)
		if err != nil || !f.becomes(target) {
			if err == nil {
				err = f.Close()
			}
			if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EROFS) {
				return err
			}
			return inPlace(path)(ctx, c)
		}
		if err = c.toFile(ctx, f.File); err == nil {
			err = f.replace(target)
		}
		return errors.Join(err, f.Close())
	}
}

// unnamed is a file that disappears when it is closed or the process is killed, unless it has been given a name.
type unnamed struct {
	*os.File
	dir string
	tmp string // its temporary name, on file systems without nameless files; else empty
}

// beside makes a file that can later be given the name path.
func beside(path string) (unnamed, error) {
	dir := filepath.Dir(path)
	var fd int
	err := storage.Retry(func() (err error) {
		fd, err = unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err == nil {
		return unnamed{os.NewFile(uintptr(fd), path), dir, ""}, nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return unnamed{}, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return unnamed{}, err
	}
	return unnamed{f, dir, f.Name()}, nil
}

// link gives the file a name, which must not exist.
func (u unnamed) link(path string) error {
	old := u.tmp
	if old == "" {
		old = "/proc/self/fd/" + strconv.Itoa(int(u.Fd()))
	}
	err := storage.Retry(func() error { return unix.Linkat(unix.AT_FDCWD, old, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW) })
	// A file system without hard links.
	if u.tmp != "" && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP)) {
		err = unix.Renameat2(unix.AT_FDCWD, old, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: it was made meanwhile; --force overwrites it", err)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: old, New: path, Err: err}
	}
	return syncFolder(u.dir)
}

// replace gives the file the name of an existing file atomically.
func (u unnamed) replace(path string) error {
	from := u.tmp
	if from == "" {
		from = filepath.Join(u.dir, storage.Unique("."+filepath.Base(path)+"."))
		if err := u.link(from); err != nil {
			return err
		}
	}
	if err := os.Rename(from, path); err != nil {
		return errors.Join(err, os.Remove(from))
	}
	return syncFolder(u.dir)
}

// Close closes the file and removes its temporary name.
func (u unnamed) Close() error {
	if u.tmp != "" {
		if err := os.Remove(u.tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(err, u.File.Close())
		}
	}
	return u.File.Close()
}

// becomes gives the file the owner, mode and attributes of the one at path. It reports whether that succeeded and the
// file at path has no other name.
func (u unnamed) becomes(path string) bool {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return false
	}
	if unix.Access(path, unix.W_OK) != nil { // overwriting needs the permission to write
		return false
	}
	fd := int(u.Fd())
	if unix.Fchown(fd, int(st.Uid), int(st.Gid)) != nil || unix.Fchmod(fd, st.Mode&0o7777) != nil {
		return false
	}
	want, err := attributes(path)
	if err != nil {
		return false
	}
	have, err := attributes("/proc/self/fd/" + strconv.Itoa(fd))
	return err == nil && want == have
}

// attributes returns a file's extended attributes, which include ACLs, as one text.
func attributes(path string) (string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Listxattr(path, list)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var all strings.Builder
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Getxattr(path, string(name), value)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&all, "%s=%x\n", name, value[:n])
	}
	return all.String(), nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// inPlace overwrites what is at path: a file, a block device, or something else that accepts a stream.
func inPlace(path string) sink {
	return func(ctx context.Context, c exported) error {
		flags := os.O_WRONLY
		switch fi, err := os.Stat(path); {
		case errors.Is(err, fs.ErrNotExist):
			flags |= os.O_CREATE
		case err == nil && isBlockDevice(fi):
			flags |= unix.O_EXCL // exclusive use of a block device: open(2)
		}
		f, err := openPatiently(ctx, path, flags)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: it is mounted, or in use by something else: %w", err, cow.ErrBusy)
		}
		if err != nil {
			return err
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if fi.Mode().IsRegular() {
			if err := f.Truncate(0); err != nil { // so that holes become zeros
				return err
			}
			if err := errors.Join(c.toFile(ctx, f), f.Close()); err != nil {
				return fmt.Errorf("what it had is gone, and what it has now is incomplete: %w", err)
			}
			return nil
		}
		return toDevice(ctx, f, c)
	}
}

// toDevice writes to an open block device, FIFO or the like.
func toDevice(ctx context.Context, f *os.File, c exported) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if need := c.size(); err == nil && size < need && isBlockDevice(fi) {
		return fmt.Errorf("it has %d bytes, and %d are needed", size, need)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil && !errors.Is(err, syscall.ESPIPE) {
		return err
	}
	if err := c.toStream(ctx, patient{ctx, f}); err != nil {
		return err
	}
	// Seek and Sync fail on a pipe, which has no size and needs no sync.
	_, err = patiently(ctx, func() (bool, error) { return true, f.Sync() }, nil)
	if err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return f.Close()
}

func isBlockDevice(fi fs.FileInfo) bool {
	return fi.Mode()&os.ModeDevice != 0 && fi.Mode()&os.ModeCharDevice == 0
}
