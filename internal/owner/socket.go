package owner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/localhttp"
	"github.com/vdisk/vdisk/internal/storage"
)

// controlName is the control socket's name in a store.
const controlName = "control.sock"

// SunPath is the longest path of a socket that most clients can use: the size of sockaddr_un.sun_path without the
// terminating zero (unix(7)).
const SunPath = 107

// ofFd returns a path of an open file that fits in SunPath, however long the file's other paths are.
func ofFd(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Access says who may connect to a socket, beside root. The zero value means: only its owner.
type Access struct {
	Mode  fs.FileMode // 0: 0600
	Group *int        // nil: the group that the socket gets by itself
}

// Listen makes a unix socket at path to which only its owner may connect.
func Listen(path string) (l *net.UnixListener, remove func(), err error) {
	return ListenFor(path, Access{})
}

// ListenOwn is Listen for this process's user and root alone. In the folder of another user, Listen's socket belongs to that
// user, if this process is root's.
func ListenOwn(path string) (l net.Listener, remove func(), err error) {
	u, remove, err := Listen(path)
	if err != nil {
		return nil, nil, err
	}
	return ownListener{u}, remove, nil
}

// ListenFor makes a unix socket at path. Until the socket's group and mode are set, only the process's umask protects
// it, so that must be 077. ListenFor replaces an existing socket on which nobody listens. If anything else is there, the
// error matches fs.ErrExist. The caller calls remove once the socket is closed.
func ListenFor(path string, access Access) (l *net.UnixListener, remove func(), err error) {
	in, err := storage.OpenFolder(filepath.Dir(path), true) // a socket may be in any folder, foreign or not
	if err != nil {
		return nil, nil, err
	}
	l, rm, err := listenIn(in, filepath.Base(path), access)
	if err != nil {
		return nil, nil, errors.Join(err, in.Close())
	}
	return l, func() { rm(); _ = in.Close() }, nil
}

// listenIn is ListenFor for a name in a folder. The folder must stay open until remove has been called.
func listenIn(in *storage.Folder, name string, access Access) (l *net.UnixListener, remove func(), err error) {
	if len(name) > SunPath {
		return nil, nil, fmt.Errorf("the socket's name %s is too long: %d bytes are possible", name, SunPath)
	}
	// The socket gets its name only when it listens already. Otherwise another process could take it for a leftover
	// one.
	tmp := storage.Unique(".sock.")
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: ofFd(in.Fd()) + "/" + tmp, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("making the socket %s: %w", in.Join(name), errors.Unwrap(err))
	}
	l.SetUnlinkOnClose(false) // the path that the listener knows is only temporary
	made, err := secureSocket(in, tmp, access)
	if err == nil {
		err = nameSocket(in, tmp, name)
	}
	if err != nil {
		_ = in.Remove(tmp) // at worst this leaves a socket on which nobody listens
		return nil, nil, errors.Join(fmt.Errorf("making the socket %s: %w", in.Join(name), err), l.Close())
	}
	return l, func() { removeSocket(in, name, made) }, nil
}

// secureSocket sets the owner, group and mode of a socket that this process made, and returns the stat that identifies
// the socket. The group is set while the umask still keeps every group out. So the socket is never open to more users
// than asked.
func secureSocket(in *storage.Folder, name string, access Access) (st unix.Stat_t, err error) {
	fd, st, err := pathTo(in, name)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	if st.Uid != uint32(os.Geteuid()) {
		return st, fmt.Errorf("it belongs to another user: %w", cow.ErrForeign)
	}
	if access.Group != nil {
		if err := os.Chown(ofFd(fd), -1, *access.Group); err != nil {
			return st, fmt.Errorf("giving it to group %d, which root or a member of the group may do: %w", *access.Group, err)
		}
	}
	mode := access.Mode
	if mode == 0 {
		mode = 0o600
	}
	if err := os.Chmod(ofFd(fd), mode); err != nil || !in.Gives() {
		return st, err
	}
	// The folder's owner must be able to replace it if this process is killed.
	return st, os.Chown(ofFd(fd), int(in.Owner()), -1)
}

// pathTo opens the socket file of that name, not a connection to it (O_PATH).
func pathTo(in *storage.Folder, name string) (fd int, st unix.Stat_t, err error) {
	err = storage.Retry(func() (err error) {
		fd, err = unix.Openat(in.Fd(), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, st, &fs.PathError{Op: "open", Path: in.Join(name), Err: err}
	}
	if err = storage.Retry(func() error { return unix.Fstat(fd, &st) }); err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		err = fmt.Errorf("%w and is no socket", fs.ErrExist)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, st, &fs.PathError{Op: "open", Path: in.Join(name), Err: err}
	}
	return fd, st, nil
}

// sameSocket reports whether a and b are the same socket. An inode number is soon used again, but not within one tick
// of the file's time.
func sameSocket(a, b unix.Stat_t) bool { return a.Dev == b.Dev && a.Ino == b.Ino && a.Mtim == b.Mtim }

func exchange(in *storage.Folder, from, to string, how uint) error {
	return storage.Retry(func() error { return unix.Renameat2(in.Fd(), from, in.Fd(), to, how) })
}

// nameSocket gives the socket its name, unless somebody listens on a socket of that name. Only one process of vdisk at
// a time examines and replaces the old socket. If another program puts one there meanwhile, the exchange moves it to
// tmp, where it is examined again, and it gets its name back unless it is the one that was examined before.
func nameSocket(in *storage.Folder, tmp, name string) error {
	defer lockFolder(in)()
	for {
		err := exchange(in, tmp, name, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // a file system without RENAME_NOREPLACE
			if err = unix.Linkat(in.Fd(), tmp, in.Fd(), name, 0); err == nil {
				return in.Remove(tmp)
			}
		}
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		old, err := leftSocket(in, name)
		if err == nil {
			err = exchange(in, tmp, name, unix.RENAME_EXCHANGE)
		}
		if errors.Is(err, unix.EINVAL) {
			err = in.Remove(name)
		} else if err == nil {
			if got, lerr := leftSocket(in, tmp); lerr == nil && sameSocket(old, got) {
				return in.Remove(tmp)
			}
			err = exchange(in, tmp, name, unix.RENAME_EXCHANGE)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}

// lockFolder keeps other processes of vdisk from changing the names of sockets in a folder until unlock is called.
// Anyone who can read the folder can lock it, so lockFolder waits at most one second, which is longer than such a
// change takes, and then goes on without the lock.
func lockFolder(in *storage.Folder) (unlock func()) {
	fd, err := unix.Openat(in.Fd(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return func() {}
	}
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return func() { _ = unix.Close(fd) }
		}
	}
}

// leftSocket returns the stat of a leftover socket. It returns an error if the file is not a socket, or somebody
// listens on it.
func leftSocket(in *storage.Folder, name string) (unix.Stat_t, error) {
	fd, st, err := pathTo(in, name)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	for range 2 { // a socket that has its name but does not listen yet soon will
		c, err := net.DialTimeout("unix", ofFd(fd), time.Second)
		if err == nil {
			_ = c.Close()
			return st, fmt.Errorf("%w, and another process listens on it", fs.ErrExist)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return st, fmt.Errorf("connecting to it: %w", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return st, nil
}

// removeSocket removes the socket made, unless another process has found it closed and replaced it. At worst it leaves
// a socket on which nobody listens.
func removeSocket(in *storage.Folder, name string, made unix.Stat_t) {
	defer lockFolder(in)()
	if st, err := in.Lstat(name); err == nil && sameSocket(st, made) {
		_ = in.Remove(name)
	}
}

// dial connects to the socket of that name in a folder. It does not follow a symbolic link.
func dial(ctx context.Context, in *storage.Folder, name string) (*net.UnixConn, error) {
	fd, _, err := pathTo(in, name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", ofFd(fd))
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// dialControl connects to the owner of the store in a folder. It fails with ErrNoOwner if nobody listens. The listening
// process must run as a user that the folder trusts: being able to put a socket there is not enough.
func dialControl(ctx context.Context, in *storage.Folder) (*net.UnixConn, error) {
	c, err := dial(ctx, in, controlName)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoOwner, err)
	}
	uid, err := peerOf(c)
	if err == nil && !in.Trusts(uid) {
		err = fmt.Errorf("the process that listens on %s belongs to user %d: %w", in.Join(controlName), uid, cow.ErrForeign)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// peerOf returns the user of the process at the other end (SO_PEERCRED, unix(7)).
func peerOf(c *net.UnixConn) (uid uint32, err error) {
	cred, err := credentials(c)
	if err != nil {
		return 0, fmt.Errorf("asking for the user at the other end of the socket: %w", err)
	}
	return cred.Uid, nil
}

// ownListener accepts only connections of this process's user and root.
type ownListener struct{ *net.UnixListener }

// Accept returns the next connection of such a user, and closes those of others.
func (l ownListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, localhttp.AcceptError(err)
		}
		if uid, err := peerOf(c); err == nil && (uid == 0 || uid == uint32(os.Geteuid())) {
			return c, nil
		}
		_ = c.Close()
	}
}
