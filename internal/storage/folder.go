package storage

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

var (
	// ErrForeign is matched by the error about a folder, or a process, that belongs to another user and so cannot be
	// trusted.
	ErrForeign = errors.New("files and processes of other users are not trusted")
	// ErrIrregular is matched by the error about something that has the name of a file but is not a regular file of its
	// own: a symbolic link, a FIFO, or a second name of a file elsewhere.
	ErrIrregular = errors.New("only regular files are used here")
)

// Folder is an open directory. Its files are opened by plain names, relative to its descriptor, and never through a
// symbolic link. So a user who can change the directory, or a folder above it, cannot lead this process to another
// file. Its methods may be called concurrently.
type Folder struct {
	path string
	f    *os.File
	uid  uint32 // owner of the directory
	gid  uint32
	ours bool // only this user and root can change what is in the directory
}

// OpenFolder opens the directory at path. Unless foreign is true, the directory must belong to this user or to root,
// and no other user may have the right to change it; otherwise the error matches ErrForeign.
func OpenFolder(path string, foreign bool) (*Folder, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	d, err := newFolder(path, f)
	if err == nil && !d.ours && !foreign {
		err = d.refusal()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func newFolder(path string, f *os.File) (*Folder, error) {
	var st unix.Stat_t
	if err := Retry(func() error { return unix.Fstat(int(f.Fd()), &st) }); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return &Folder{path: path, f: f, uid: st.Uid, gid: st.Gid, ours: trusted(st.Uid) && st.Mode&0o022 == 0}, nil
}

// trusted reports whether files of user uid can be used as if this user had made them.
func trusted(uid uint32) bool { return uid == 0 || uid == uint32(os.Geteuid()) }

// refusal returns the error about a folder that is not ours.
func (d *Folder) refusal() error {
	if trusted(d.uid) {
		return fmt.Errorf("other users have the right to change the folder %s: %w (chmod go-w %[1]s takes it away)", d.path, ErrForeign)
	}
	return fmt.Errorf("the folder %s belongs to %s, and this process runs as %s: %w", d.path, userName(d.uid), userName(uint32(os.Geteuid())), ErrForeign)
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "user " + id
}

// Own changes the mode of the directory so that only its owner can read or change it. Unless foreign is true, the
// directory must belong to this user or to root; otherwise the error matches ErrForeign.
func (d *Folder) Own(foreign bool) error {
	if !foreign && !trusted(d.uid) {
		return d.refusal()
	}
	if err := d.f.Chmod(dirMode); err != nil {
		return err
	}
	d.ours = trusted(d.uid)
	return nil
}

// Path returns the path at which the directory was opened.
func (d *Folder) Path() string { return d.path }

// Join returns the path of a file in the directory, for messages.
func (d *Folder) Join(name string) string { return filepath.Join(d.path, name) }

// Fd returns the directory's descriptor.
func (d *Folder) Fd() int { return int(d.f.Fd()) }

// Owner returns the user id of the directory's owner.
func (d *Folder) Owner() uint32 { return d.uid }

// Trusts reports whether files of user uid can be used: those of this user, of root and of the directory's owner can. A
// caller that opened a foreign directory has agreed to trust its owner.
func (d *Folder) Trusts(uid uint32) bool { return trusted(uid) || uid == d.uid }

// Stat returns the directory's status.
func (d *Folder) Stat() (st unix.Stat_t, err error) {
	if err := Retry(func() error { return unix.Fstat(d.Fd(), &st) }); err != nil {
		return st, &fs.PathError{Op: "stat", Path: d.path, Err: err}
	}
	return st, nil
}

// Open opens a regular file with flags as for open(2). It never blocks, whatever has that name; anything but a regular
// file is an error that matches ErrIrregular. In a folder that is not ours, so is a file that has a second name, or an
// owner whom the folder does not trust. If flags has O_CREAT, the file is given to the folder's owner (Give).
func (d *Folder) Open(name string, flags int) (*os.File, error) {
	path, err := joined(d.path, name)
	if err != nil {
		return nil, err
	}
	f, err := openRegular(d.Fd(), path, name, flags)
	give := flags&unix.O_CREAT != 0 && d.Gives()
	if err != nil || d.ours && !give {
		return f, err
	}
	var st unix.Stat_t
	if err := Retry(func() error { return unix.Fstat(int(f.Fd()), &st) }); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	// The file may be a second name of a file that the directory's owner must not change.
	if !d.ours && (st.Nlink > 1 || !d.Trusts(st.Uid)) {
		return nil, errors.Join(fmt.Errorf("%s belongs to %s and has %d names: %w", path, userName(st.Uid), st.Nlink, ErrIrregular), f.Close())
	}
	if give {
		if err := d.Give(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// Gives reports whether files that this process makes must be given to another user: root is working in that user's
// folder.
func (d *Folder) Gives() bool { return d.uid != 0 && os.Geteuid() == 0 }

// Give changes the owner of a file in the directory to the directory's owner, who could not use a file of root's. It
// does nothing unless Gives.
func (d *Folder) Give(f *os.File) error {
	if !d.Gives() {
		return nil
	}
	return f.Chown(int(d.uid), int(d.gid))
}

// openRegular opens the regular file called name in the directory dir; path is for messages.
func openRegular(dir int, path, name string, flags int) (*os.File, error) {
	flags |= unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := retry(func() (int, error) { return unix.Openat(dir, name, flags, fileMode) })
	switch err {
	case nil:
	case unix.ELOOP:
		return nil, fmt.Errorf("%s is a symbolic link: %w", path, ErrIrregular)
	case unix.ENXIO, unix.EISDIR: // a socket, or a FIFO without a reader; or a directory
		return nil, fmt.Errorf("%s is no file: %w", path, ErrIrregular)
	default:
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	err = Retry(func() error { return unix.Fstat(fd, &st) })
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		err = &fs.PathError{Op: "open", Path: path, Err: err}
	} else if st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("%s is no file: %w", path, ErrIrregular)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// readMost is the largest file that Read accepts.
const readMost = 64 << 20

// Read returns the content of a small file.
func (d *Folder) Read(name string) ([]byte, error) {
	f, err := d.Open(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, readMost+1))
	if err == nil && len(b) > readMost {
		err = fmt.Errorf("%s is larger than %d bytes: %w", f.Name(), readMost, fs.ErrInvalid)
	}
	return b, errors.Join(err, f.Close())
}

// Replace replaces the content of the file called name in one step. If durable is true, the content and the name are
// durable when Replace returns.
func (d *Folder) Replace(name string, content []byte, durable bool) error {
	tmp := name + ".tmp"
	// Never write to a file that an interrupted Replace left, or that another user put there.
	if err := d.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := d.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return noSpace(err)
	}
	_, err = f.Write(content)
	if durable {
		err = errors.Join(err, f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.Rename(tmp, name)
	}
	if err != nil {
		return noSpace(errors.Join(err, d.Remove(tmp)))
	}
	if !durable {
		return nil
	}
	return d.Sync()
}

// Rename renames the file from to to, and replaces a file that has that name.
func (d *Folder) Rename(from, to string) error {
	if err := Retry(func() error { return unix.Renameat(d.Fd(), from, d.Fd(), to) }); err != nil {
		return &os.LinkError{Op: "rename", Old: d.Join(from), New: d.Join(to), Err: err}
	}
	return nil
}

// Remove removes a name that is not a directory's.
func (d *Folder) Remove(name string) error {
	path, err := joined(d.path, name)
	if err != nil {
		return err
	}
	if err := Retry(func() error { return unix.Unlinkat(d.Fd(), name, 0) }); err != nil {
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// Lstat returns the status of what has the name. It does not follow a symbolic link.
func (d *Folder) Lstat(name string) (st unix.Stat_t, err error) {
	if err := Retry(func() error { return unix.Fstatat(d.Fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return st, &fs.PathError{Op: "stat", Path: d.Join(name), Err: err}
	}
	return st, nil
}

// Names returns the names in the directory, sorted.
func (d *Folder) Names() ([]string, error) {
	// Use a descriptor of its own, since the position in a directory belongs to the descriptor.
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.Fd(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
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

// Sync makes all earlier creations, renames and removals durable.
func (d *Folder) Sync() error {
	if err := d.f.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", noSpace(err))
	}
	return nil
}

// Sub opens a directory in this one, and makes it if it does not exist. A symbolic link is refused (ErrIrregular). So
// is a directory whose owner this folder does not trust (ErrForeign) or, in a folder that only this user can change,
// one that others can change.
func (d *Folder) Sub(name string) (*Folder, error) {
	path, err := joined(d.path, name)
	if err != nil {
		return nil, err
	}
	err = Retry(func() error { return unix.Mkdirat(d.Fd(), name, dirMode) })
	made := err == nil
	if made {
		err = d.Sync()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, &fs.PathError{Op: "mkdir", Path: path, Err: noSpace(err)}
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.Fd(), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err == unix.ELOOP || err == unix.ENOTDIR {
		return nil, fmt.Errorf("%s is no folder: %w", path, ErrIrregular)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if made {
		if err := d.Give(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	sub, err := newFolder(path, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if d.ours && !sub.ours || !d.Trusts(sub.uid) {
		return nil, errors.Join(sub.refusal(), sub.Close())
	}
	return sub, nil
}

// Files returns the directory as the engine's file layer, which takes it over.
func (d *Folder) Files() FS { return newDir(d, false) }

// FilesToRead is like Files, but the files cannot be changed.
func (d *Folder) FilesToRead() FS { return newDir(d, true) }

// Close closes the directory. Open files stay usable.
func (d *Folder) Close() error { return d.f.Close() }

// Unique returns prefix and a random suffix: a name that nothing else has.
func Unique(prefix string) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails
	return prefix + hex.EncodeToString(b[:])
}
