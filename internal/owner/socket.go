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
)

// controlName is the control socket's name in a store.
const controlName = "control.sock"

// sunPath is the size of sockaddr_un.sun_path, with the zero at the end (unix(7)).
const sunPath = 108

// shortPath returns another path of the same file that fits sunPath, however long the folder's path is: the folder by
// its descriptor. It is good until release is called.
func shortPath(path string) (short string, release func(), err error) {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	short = "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
	return short, func() { _ = unix.Close(fd) }, nil
}

// Listen makes a unix socket at path that only its owner may connect to; for the moment until its mode is set, that
// is up to the process's umask, which must be 077. A socket that is there already and that nobody listens on is
// replaced; anything else that is there is an error that matches fs.ErrExist. The caller calls remove when the socket
// is closed.
func Listen(path string) (l *net.UnixListener, remove func(), err error) {
	short, release, err := shortPath(path)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	if len(short) >= sunPath {
		return nil, nil, fmt.Errorf("the socket's name %s is too long: %d bytes are possible", filepath.Base(path),
			sunPath-1-len(short)+len(filepath.Base(path)))
	}
	if err := clearSocket(path, short); err != nil {
		return nil, nil, err
	}
	l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("making the socket %s: %w", path, errors.Unwrap(err))
	}
	l.SetUnlinkOnClose(false) // the path that it knows is not good for long
	err = os.Chmod(short, 0o600)
	made, serr := os.Lstat(short)
	if err = errors.Join(err, serr); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("making the socket %s: %w", path, err), l.Close(), os.Remove(path))
	}
	return l, func() {
		// Somebody may have found it closed and put his own in its place.
		if fi, err := os.Lstat(path); err == nil && os.SameFile(fi, made) && fi.ModTime().Equal(made.ModTime()) {
			_ = os.Remove(path) // a socket that is left behind is no harm
		}
	}, nil
}

// clearSocket removes a socket that nobody listens on.
func clearSocket(path, short string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket == 0 {
		return &os.PathError{Op: "listen", Path: path, Err: fmt.Errorf("%w and is no socket", fs.ErrExist)}
	}
	c, err := net.DialTimeout("unix", short, time.Second)
	if err == nil {
		_ = c.Close()
		return &os.PathError{Op: "listen", Path: path, Err: fmt.Errorf("%w, and another process listens on it", fs.ErrExist)}
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("asking who listens on %s: %w", path, err)
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dial connects to the socket at path, however long that is.
func dial(ctx context.Context, path string) (net.Conn, error) {
	short, release, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer release()
	var d net.Dialer
	return d.DialContext(ctx, "unix", short)
}
