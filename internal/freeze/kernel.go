package freeze

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The ioctls of linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// Kernel is the System of this machine.
type Kernel struct{}

// After calls f after d.
func (Kernel) After(d time.Duration, f func()) (stop func() bool) { return time.AfterFunc(d, f).Stop }

// Open opens the file system at a mount point. Any other folder is refused: its file system would be another one than
// the user means, often that of the root.
func (Kernel) Open(path string) (Mount, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	root, err := isMountRoot(fd)
	if err == nil && !root {
		err = fmt.Errorf("%s is %w: nothing is mounted there", path, ErrRefused)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return mount{f}, nil
}

// isMountRoot reports whether an open folder is the root of a mount.
func isMountRoot(fd int) (bool, error) {
	var here, above unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &here); err != nil {
		return false, err
	}
	if here.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 { // Linux 5.8
		return here.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	if err := unix.Statx(fd, "..", 0, unix.STATX_BASIC_STATS, &above); err != nil {
		return false, err
	}
	return here.Dev_major != above.Dev_major || here.Dev_minor != above.Dev_minor || here.Ino == above.Ino, nil
}

// mount is an open mount point.
type mount struct{ *os.File }

// Freeze is FIFREEZE.
func (m mount) Freeze() error {
	err := m.ioctl(fiFreeze)
	switch {
	case errors.Is(err, unix.EBUSY):
		return ErrFrozen
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		return ErrUnsupported
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("it needs root: %w", err)
	}
	return err
}

// Thaw is FITHAW.
func (m mount) Thaw() error {
	err := m.ioctl(fiThaw)
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: somebody else has thawed it", ErrThawed)
	case err != nil:
		return fmt.Errorf("it is still frozen; 'fsfreeze --unfreeze %s' thaws it: %w", m.Name(), err)
	}
	return nil
}

func (m mount) ioctl(request uint) (err error) {
	for {
		if err = unix.IoctlSetInt(int(m.Fd()), request, 0); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// SameFileSystem reports whether two paths are on one file system.
func SameFileSystem(a, b string) (bool, error) {
	var x, y unix.Stat_t
	if err := unix.Stat(a, &x); err != nil {
		return false, &fs.PathError{Op: "stat", Path: a, Err: err}
	}
	if err := unix.Stat(b, &y); err != nil {
		return false, &fs.PathError{Op: "stat", Path: b, Err: err}
	}
	return x.Dev == y.Dev, nil
}

// DevicesBelow returns the names of the block devices that a file system is on: its own, and those below partitions,
// LVM, dm-crypt and the like. It returns none if they cannot be known.
func DevicesBelow(path string) []string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return nil
	}
	dev := st.Dev
	if unix.Major(dev) == 0 { // btrfs has devices of its own, and only its mount says which ones those are of
		source := sourceOf(path)
		if source == "" || unix.Stat(source, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return nil
		}
		dev = st.Rdev
	}
	folder, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return nil
	}
	return below(folder, 0)
}

// mostBelow bounds how many devices may lie above one another.
const mostBelow = 16

// below returns the name of the block device that has a folder in sysfs, and those of the devices below it.
func below(folder string, depth int) (names []string) {
	if depth > mostBelow {
		return nil
	}
	names = append(names, filepath.Base(folder))
	if _, err := os.Stat(filepath.Join(folder, "partition")); err == nil {
		return append(names, below(filepath.Dir(folder), depth+1)...)
	}
	slaves, _ := filepath.Glob(filepath.Join(folder, "slaves", "*")) // the pattern is right, and it has no other error
	for _, slave := range slaves {
		if to, err := filepath.EvalSymlinks(slave); err == nil {
			names = append(names, below(to, depth+1)...)
		}
	}
	return names
}

// sourceOf returns what is mounted at a path, or "".
func sourceOf(path string) (source string) {
	path, err := filepath.EvalSymlinks(path)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	text, rerr := os.ReadFile("/proc/self/mountinfo")
	if err != nil || rerr != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) { // proc_pid_mountinfo(5); the last mount is on top
		fields, rest, ok := strings.Cut(line, " - ")
		at, of := strings.Fields(fields), strings.Fields(rest)
		if ok && len(at) > 4 && len(of) > 1 && unescaped(at[4]) == path {
			source = unescaped(of[1])
		}
	}
	return source
}

// unescaped replaces the octal escapes of mountinfo.
func unescaped(text string) string {
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+3 < len(text) {
			if n, err := strconv.ParseUint(text[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(text[i])
	}
	return out.String()
}
