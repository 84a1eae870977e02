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
	// ErrForeign is matched by the error about a folder, or a process, of another user: what it says cannot be trusted.
	ErrForeign = errors.New("what another user could have made is not used unasked")
	// ErrIrregular is matched by the error about something that has the name of a file and is none: a symbolic link, a
	// FIFO, another name of a file that is elsewhere.
	ErrIrregular = errors.New("only regular files are used here")
)

// Folder is an open directory whose files are opened by plain names, relative to its descriptor and never through a
// symbolic link: whoever can change the directory, or a folder above it, cannot lead this process to another file. Its
// methods may be called concurrently.
type Folder struct {
	path string
	f    *os.File
	uid  uint32 // its owner
	gid  uint32
	ours bool // nobody but this user, and the system's administrator, can change what is in it
}

// OpenFolder opens the directory at path. Unless foreign is true, it must belong to this user or to root, and nobody
// else may have the right to change it; else the error matches ErrForeign.
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
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return &Folder{path: path, f: f, uid: st.Uid, gid: st.Gid, ours: trusted(st.Uid) && st.Mode&0o022 == 0}, nil
}

// trusted reports whether what a user has made can be used as if this user had made it.
func trusted(uid uint32) bool { return uid == 0 || uid == uint32(os.Geteuid()) }

// refusal is the error about a folder that is not ours.
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

// Own makes sure that nobody but its owner can change or read the directory, which must belong to this user unless
// foreign is true.
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

// Path is where the directory was when it was opened.
func (d *Folder) Path() string { return d.path }

// Join is the path of a file in the directory, for messages.
func (d *Folder) Join(name string) string { return filepath.Join(d.path, name) }

// Fd is the directory's descriptor.
func (d *Folder) Fd() int { return int(d.f.Fd()) }

// Owner is the user whom the directory belongs to.
func (d *Folder) Owner() uint32 { return d.uid }

// Trusts reports whether what the user has made can be used: what this user, root or the directory's owner has. Who
// opened a foreign directory wanted that.
func (d *Folder) Trusts(uid uint32) bool { return trusted(uid) || uid == d.uid }

// Stat describes the directory.
func (d *Folder) Stat() (st unix.Stat_t, err error) {
	if err := unix.Fstat(d.Fd(), &st); err != nil {
		return st, &fs.PathError{Op: "stat", Path: d.path, Err: err}
	}
	return st, nil
}

// Open opens a regular file with flags as for open(2). It does not wait, whatever is there.
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
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	}
	if !d.ours && (st.Nlink > 1 || !d.Trusts(st.Uid)) { // another name of a file that is not the directory's owner's to change
		return nil, errors.Join(fmt.Errorf("%s belongs to %s and has %d names: %w", path, userName(st.Uid), st.Nlink, ErrIrregular), f.Close())
	}
	if give {
		if err := d.Give(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// Gives reports whether what this process makes is another user's: root works in that user's folder.
func (d *Folder) Gives() bool { return d.uid != 0 && os.Geteuid() == 0 }

// Give makes a file that is for the directory its owner's, who could not use one of root's.
func (d *Folder) Give(f *os.File) error {
	if !d.Gives() {
		return nil
	}
	return f.Chown(int(d.uid), int(d.gid))
}

// openRegular opens the regular file of that name in the directory dir; path is for messages.
func openRegular(dir int, path, name string, flags int) (*os.File, error) {
	flags |= unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := retry(func() (int, error) { return unix.Openat(dir, name, flags, fileMode) })
	switch err {
	case nil:
	case unix.ELOOP:
		return nil, fmt.Errorf("%s is a symbolic link: %w", path, ErrIrregular)
	case unix.ENXIO, unix.EISDIR: // a socket, or a FIFO without a reader; a directory
		return nil, fmt.Errorf("%s is no file: %w", path, ErrIrregular)
	default:
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
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

// readMost bounds what Read takes for a small file.
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

// Replace gives the file of that name a new content in one step. If durable, it and its name are when Replace returns.
func (d *Folder) Replace(name string, content []byte, durable bool) error {
	tmp := name + ".tmp"
	// What an interrupted Replace left, or somebody else has put there, is not written to.
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

// Rename gives the file from the name to, whatever has that.
func (d *Folder) Rename(from, to string) error {
	if err := unix.Renameat(d.Fd(), from, d.Fd(), to); err != nil {
		return &os.LinkError{Op: "rename", Old: d.Join(from), New: d.Join(to), Err: err}
	}
	return nil
}

// Remove removes a name that is no directory's.
func (d *Folder) Remove(name string) error {
	path, err := joined(d.path, name)
	if err != nil {
		return err
	}
	if err := unix.Unlinkat(d.Fd(), name, 0); err != nil {
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// Lstat describes what has the name, and does not follow it.
func (d *Folder) Lstat(name string) (st unix.Stat_t, err error) {
	if err := unix.Fstatat(d.Fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return st, &fs.PathError{Op: "stat", Path: d.Join(name), Err: err}
	}
	return st, nil
}

// Names lists what is in the directory, in order.
func (d *Folder) Names() ([]string, error) {
	// A descriptor of its own: the position in a directory is the descriptor's.
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

// Sync makes every creation, renaming and removal before it durable.
func (d *Folder) Sync() error {
	if err := d.f.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", noSpace(err))
	}
	return nil
}

// Sub opens a directory in this one, by the same rules, and makes it if it does not exist.
func (d *Folder) Sub(name string) (*Folder, error) {
	path, err := joined(d.path, name)
	if err != nil {
		return nil, err
	}
	err = unix.Mkdirat(d.Fd(), name, dirMode)
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

// FilesToRead is Files of which none can be changed.
func (d *Folder) FilesToRead() FS { return newDir(d, true) }

// Close releases the directory. Files that are open stay usable.
func (d *Folder) Close() error { return d.f.Close() }

// Unique is a name that nothing else has.
func Unique(prefix string) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])
}
