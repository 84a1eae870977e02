package owner

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// connection is a client's connection as the owner knows it.
type connection struct {
	number int64   // unique in this owner, from 1
	by     process // made it, if it is to a Unix socket, and may have ended since; zero: not known
	left   func()
}

// knownConn is implemented by the connections of a countingListener.
type knownConn interface{ known() connection }

func (c connection) known() connection { return c }

// countingListener counts the open connections and calls last when the last one has closed.
type countingListener struct {
	net.Listener
	open   atomic.Int64
	last   func()        // may be nil
	number *atomic.Int64 // that of the latest connection of the owner
}

// Accept counts the connection. It keeps its type, because that has writev, and is read without waiting.
func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	var by process
	if u, ok := c.(*net.UnixConn); ok {
		by = processOf(u)
	}
	return l.known(c, l.number.Add(1), by), nil
}

// known counts a connection that has a number, and was made by a process.
func (l *countingListener) known(c net.Conn, number int64, by process) net.Conn {
	l.open.Add(1)
	known := connection{number: number, by: by, left: sync.OnceFunc(l.left)}
	if u, ok := c.(*net.UnixConn); ok {
		return &countedUnixConn{u, known}
	}
	if t, ok := c.(*net.TCPConn); ok {
		noticeDeath(t)
		return &countedTCPConn{t, known}
	}
	return &countedConn{c, known}
}

// SetDeadline limits how long Accept waits.
func (l *countingListener) SetDeadline(t time.Time) error {
	d, ok := l.Listener.(interface{ SetDeadline(time.Time) error })
	if !ok {
		return errors.ErrUnsupported
	}
	return d.SetDeadline(t)
}

// deathTimeout is how long a client may not have answered before the kernel takes its connection for dead. It is what Go's
// keepalive of idle connections comes to.
const deathTimeout = 150 * time.Second

// noticeDeath bounds how long a connection lasts that has a reply under way to a client that does not answer, too:
// while it lasts, its client may be the writer of a volume.
func noticeDeath(c *net.TCPConn) {
	rc, err := c.SyscallConn()
	if err == nil {
		_ = rc.Control(func(fd uintptr) { // on failure, the kernel's own limit of 15 minutes holds
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deathTimeout.Milliseconds()))
		})
	}
}

func (l *countingListener) left() {
	if l.open.Add(-1) == 0 && l.last != nil {
		l.last()
	}
}

type countedUnixConn struct {
	*net.UnixConn
	connection
}

// Close closes the connection and uncounts it once.
func (c *countedUnixConn) Close() error {
	defer c.left()
	return c.UnixConn.Close()
}

type countedTCPConn struct {
	*net.TCPConn
	connection
}

// Close closes the connection and uncounts it once.
func (c *countedTCPConn) Close() error {
	defer c.left()
	return c.TCPConn.Close()
}

type countedConn struct {
	net.Conn
	connection
}

// Close closes the connection and uncounts it once.
func (c *countedConn) Close() error {
	defer c.left()
	return c.Conn.Close()
}
