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

// shortPath returns another path of the same file that fits sun_path (108 bytes, unix(7)), however long path is: the
// folder by its descriptor. It is good until release is called.
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

// Listen makes a unix socket at path that only its owner may connect to. A socket that is there already and that
// nobody listens on is replaced; anything else that is there is an error that matches fs.ErrExist.
func Listen(path string) (*net.UnixListener, error) {
	short, release, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := clearSocket(path, short); err != nil {
		return nil, err
	}
	// The mode of a socket is set by bind, and umask is the whole process's; so the socket is made under another name,
	// and gets its name when its mode is right.
	dir, name := filepath.Split(short)
	tmp := dir + "." + strconv.Itoa(os.Getpid()) + "." + strconv.FormatInt(time.Now().UnixNano()%1e6, 10)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("making the socket %s: %w", path, errors.Unwrap(err))
	}
	l.SetUnlinkOnClose(false) // its path is not good for long; whoever made it removes it
	if err = os.Chmod(tmp, 0o600); err == nil {
		err = os.Rename(tmp, dir+name)
	}
	if err != nil {
		_ = os.Remove(tmp)
		_ = l.Close()
		return nil, fmt.Errorf("making the socket %s: %w", path, err)
	}
	return l, nil
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
	return os.Remove(path)
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
