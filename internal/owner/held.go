package owner

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
)

// heldClient is a client of another program that this one has not begun to serve. It holds all that the client has open,
// so that nobody else gets it.
type heldClient struct {
	conn    net.Conn      // nil: its service has taken it
	over    *net.UnixConn // conn, also once it was taken; nil: it is something else
	handles []*handle
	err     error // why the client cannot be served
}

// readable returns an error if it is not known what was handed over of NBD, and the program before can go on with it. If
// there is no way back, the clients are cut off: nobody would ever serve them.
func (h *Handover) readable(log *slog.Logger) error {
	if h == nil || h.unread == nil {
		return nil
	}
	if h.Back != 0 {
		return h.unread
	}
	log.Error("NBD services were handed over and cannot go on", "err", h.unread)
	_ = unix.Close(h.NBD) // fails if there is no such descriptor
	h.NBD, h.unread = 0, nil
	closeInherited()
	return nil
}

// closeInherited closes the sockets that another program kept open for this one. This program's own are all closed when it
// executes another one, and so are not meant.
func closeInherited() {
	list, _ := os.ReadDir("/proc/self/fd") // without it, the clients wait
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 2 {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		var st unix.Stat_t
		if err == nil && flags&unix.FD_CLOEXEC == 0 && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			_ = unix.Close(fd)
		}
	}
}

// holdHanded opens the exports of all clients that were handed over. It must be called before anybody else can use the
// store. Writers come first: a volume that two of them want is the first one's.
func (o *Owner) holdHanded(h *Handover) {
	if h == nil || h.handed == nil {
		return
	}
	o.held = map[int]*heldClient{}
	for _, readOnly := range []bool{false, true} {
		for _, s := range h.handed.Services {
			for _, c := range s.Clients {
				if c.State.ReadOnly == readOnly {
					held := &heldClient{}
					held.err = o.hold1(held, s.Options, c)
					o.held[c.Conn] = held
				}
			}
		}
	}
}

func (o *Owner) hold1(held *heldClient, opts ServeOptions, c handedClient) (err error) {
	if held.conn, err = connOf(c.Conn); err != nil {
		return err
	}
	held.over = unixConn(held.conn)
	r, err := cow.ParseRef(c.State.Export)
	if err != nil {
		return err
	}
	if now := o.identity(r); now != c.Identity {
		return fmt.Errorf("%v is another one than the client has open (%s, and it was %s): %w", r, now, c.Identity, cow.ErrInvalid)
	}
	who := client{shared: true}
	switch {
	case opts.Shared:
	case c.Process.PID > 0:
		who = client{process: c.Process}
	default:
		who = clientOf(held.conn)
	}
	h, err := o.exports.acquireAsWas(r, who, held.over, c.State.ReadOnly)
	if err != nil {
		return err
	}
	held.handles = append(held.handles, h)
	for _, name := range c.State.Contexts {
		if snapshot, ok := strings.CutPrefix(name, dirtyContext); ok {
			h, err := o.exports.acquire(cow.Ref{Volume: r.Volume, Snapshot: snapshot}, true)
			if err != nil {
				return err
			}
			held.handles = append(held.handles, h)
		}
	}
	return nil
}

// acquireAsWas is acquire for a client that had r open before, and is connected over that, or nil. A client that wrote
// writes again, or fails; mayNotWrite is to be called for it.
func (x *exports) acquireAsWas(r cow.Ref, who client, over *net.UnixConn, readOnly bool) (*handle, error) {
	if readOnly {
		return x.acquire(r, true)
	}
	h, err := x.acquireToWrite(r, who, over)
	if err == nil && h.readOnly {
		return nil, errors.Join(fmt.Errorf("somebody else writes to %v: %w", r, cow.ErrBusy), x.release(h))
	}
	return h, err
}

// identity tells a volume or snapshot from another one that gets its name later.
func (o *Owner) identity(r cow.Ref) string {
	v, err := o.store.Volume(r.Volume)
	if err != nil {
		return "not there"
	}
	text := fmt.Sprintf("made %d, from %q", v.Created.UnixNano(), v.Origin)
	for _, s := range v.Snapshots {
		if s.Name == r.Snapshot {
			return text + fmt.Sprintf(", snapshot %v", s.GUID)
		}
	}
	return text
}

// takeHeld returns the connection of a client that was handed over. The client stays held until releaseHeld.
func (o *Owner) takeHeld(fd int) (net.Conn, error) {
	held := o.held[fd]
	switch {
	case held == nil || held.conn == nil:
		return nil, errors.New("the client is not held")
	case held.err != nil:
		return nil, held.err
	}
	conn := held.conn
	held.conn = nil
	return conn, nil
}

// releaseHeld ends the hold on clients that were handed over. Those that no service has taken are cut off.
func (o *Owner) releaseHeld() error {
	var errs []error
	for _, held := range o.held {
		for _, h := range held.handles {
			o.exports.mayNotWrite(h, held.over)
			errs = append(errs, o.exports.release(h))
		}
		if held.conn != nil {
			_ = held.conn.Close()
		}
	}
	o.held = nil
	return errors.Join(errs...)
}
