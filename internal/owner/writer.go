package owner

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
)

// client is who uses exports: docs/nbd.md, One writer. On a Unix socket it is a process, with all of its connections, so
// that clients with several connections, and those that reconnect, stay what they are. Otherwise it is a connection. All
// clients of shared services are one.
type client struct {
	process process  // zero: not known
	conn    net.Conn // if the process is not known
	shared  bool
}

// clientOf returns who is at the other end of a connection. If a listener counts it, that is the process that made it, even
// if that has ended since. Otherwise it is that process as long as it lives.
func clientOf(nc net.Conn) client {
	if k, ok := nc.(knownConn); ok && k.known().by.PID > 0 {
		return client{process: k.known().by}
	}
	switch c := nc.(type) {
	case *countedTCPConn:
		nc = c.TCPConn
	case *countedConn:
		nc = c.Conn
	}
	if u := unixConn(nc); u != nil {
		if p := processOf(u); p.PID > 0 {
			return client{process: p}
		}
		nc = u
	}
	return client{conn: nc}
}

// unixConn returns the connection to a Unix socket that nc is, or nil.
func unixConn(nc net.Conn) *net.UnixConn {
	if c, ok := nc.(*countedUnixConn); ok {
		nc = c.UnixConn
	}
	u, _ := nc.(*net.UnixConn)
	return u
}

// processOf returns the process that made a connection. It returns zero if the process is not visible from here, or has
// ended.
func processOf(c *net.UnixConn) process {
	cred, err := credentials(c)
	if err != nil || cred.Pid <= 0 {
		return process{}
	}
	p := process{int(cred.Pid), startOf(int(cred.Pid))}
	if p.Start == "" {
		return process{}
	}
	return p
}

// writerGone reports whether the writer is a process that has ended, with all of its connections, though the server may
// not have seen that yet. A process can end while a connection of it lives: nbd-client(8) gives its socket to the kernel,
// and a child can inherit one. The caller holds exports.mu.
func (h *handle) writerGone() bool {
	if p := h.writer.process; p.PID <= 0 || p.alive() {
		return false
	}
	for c := range h.over {
		if !hungUp(c) {
			return false
		}
	}
	return true
}

// hungUp reports whether nobody has the other end of a connection any more.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true // it is closed
	}
	p := []unix.PollFd{{}}
	err = raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p, 0) // if it fails, nothing is seen
	})
	return err != nil || p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}

// mayWrite notes that a user of a handle that may write came over a connection, which may be nil. The caller holds
// exports.mu.
func (h *handle) mayWrite(over *net.UnixConn) {
	if over == nil {
		return
	}
	if h.over == nil {
		h.over = map[*net.UnixConn]int{}
	}
	h.over[over]++
}

// mayNotWrite takes back what acquireToWrite has noted.
func (x *exports) mayNotWrite(h *handle, over *net.UnixConn) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch n := h.over[over]; {
	case n > 1:
		h.over[over] = n - 1
	case n == 1:
		delete(h.over, over)
	}
}

func (c client) String() string {
	switch {
	case c.shared:
		return "a client of a shared service"
	case c.process.PID > 0:
		return fmt.Sprintf("process %d", c.process.PID)
	case c.conn != nil:
		return c.conn.RemoteAddr().String()
	}
	return "another client"
}

// acquireToWrite is acquire for a client that may write to a volume unless somebody else does. Then the handle is
// read-only. A client of a shared service fails where a block device writes, since it has come to write. over is how the
// client is connected, or nil; mayNotWrite is to be called with it.
func (x *exports) acquireToWrite(r cow.Ref, who client, over *net.UnixConn) (*handle, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, h := range x.open {
		switch {
		case h.readOnly || h.dev.Ref() != r:
		case h.users == 0 || h.writer == who || h.writerGone(): // nobody's, the client's own, or about to be closed
			h.writer = who
			h.users++
			h.mayWrite(over)
			return h, nil
		default:
			return x.acquireLocked(r, true)
		}
	}
	h, err := x.acquireLocked(r, false)
	if err == nil {
		h.writer = who
		h.mayWrite(over)
		return h, nil
	}
	if errors.Is(err, cow.ErrBusy) && !who.shared { // a block device writes
		if h, rerr := x.acquireLocked(r, true); rerr == nil {
			return h, nil
		}
	}
	return nil, err
}

// writers returns who writes to a volume, or to all volumes if the name is empty.
func (x *exports) writers(volume string) map[string]client {
	x.mu.Lock()
	defer x.mu.Unlock()
	found := map[string]client{}
	for _, h := range x.open {
		if name := h.dev.Ref().Volume; !h.readOnly && h.users > 0 && (volume == "" || name == volume) {
			found[name] = h.writer
		}
	}
	return found
}

// otherWriter returns who writes to a volume, or "" if that is nobody but who. A block device has the volume for itself.
func (x *exports) otherWriter(volume string, who client) string {
	if w, ok := x.writers(volume)[volume]; ok {
		if w == who {
			return ""
		}
		return w.String()
	}
	return x.attached(volume)[volume]
}

// written is the part of a volume's description that says who writes to it.
func written(who string) string {
	if who == "" {
		return ""
	}
	return ", in use for writing by " + who
}

// leave ends the client's use of a handle.
func (c view) leave(h *handle) error {
	c.mayNotWrite(h, c.over)
	return c.catalog.leave(h)
}

// attached returns the block devices that write to a volume, or to all volumes if the name is empty.
func (o *Owner) attached(volume string) map[string]string {
	found := map[string]string{}
	for _, d := range o.devicesOf(volume) {
		if d.Ref.Snapshot == "" && !d.ReadOnly {
			found[d.Ref.Volume] = d.Path
		}
	}
	return found
}

// credentials returns who made a connection (SO_PEERCRED, unix(7)).
func credentials(c *net.UnixConn) (cred *unix.Ucred, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(cerr, err)
}
