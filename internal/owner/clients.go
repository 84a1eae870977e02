package owner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/nbd"
)

// NBDClient is a connection of an NBD client.
type NBDClient struct {
	ID       string // nbd:N; N is not used again by the owner
	Socket   string // of the service
	Name     string // VOL or VOL@SNAP; empty: it has opened nothing yet
	ReadOnly bool
	TLS      bool
	PID      int       // of the process that connected; 0: not known
	UID      int       // its user; -1: not known
	Command  string    // its name; empty: not known, or it has ended
	Address  string    // of a client over TCP
	Since    time.Time // when it connected
	Counters nbd.Counters
}

// Prefixes by which Disconnect takes something else than a volume or snapshot. Such names have no colon.
const (
	connectionPrefix = "nbd:"
	processPrefix    = "pid:"
)

// putOut says how the clients that have something open are put out.
func putOut(r cow.Ref) string { return fmt.Sprintf("'vdisk disconnect %v' puts them out", r) }

// nbdConn is a connection with the server that has it.
type nbdConn struct {
	NBDClient
	server *nbd.Server
	conn   net.Conn
}

// Clients lists the connections of NBD clients, the oldest first.
func (o *Owner) Clients(context.Context) ([]NBDClient, error) {
	list := []NBDClient{}
	for _, c := range o.nbdConns() {
		list = append(list, c.NBDClient)
	}
	return list, nil
}

func (o *Owner) nbdConns() (list []nbdConn) {
	o.mu.Lock()
	services := slices.Clone(o.services)
	o.mu.Unlock()
	for _, s := range services {
		for _, c := range s.server.Clients() {
			list = append(list, nbdConn{s.describe(c), s.server, c.Conn})
		}
	}
	slices.SortFunc(list, func(a, b nbdConn) int { return a.Since.Compare(b.Since) })
	return list
}

func (s *service) describe(c nbd.Client) NBDClient {
	d := NBDClient{Socket: s.opts.Socket, Name: c.Export, ReadOnly: c.ReadOnly, TLS: c.TLS, Since: c.Since, UID: -1, Counters: c.Counters}
	if k, ok := c.Conn.(knownConn); ok {
		d.ID = connectionPrefix + strconv.FormatInt(k.known().number, 10)
	}
	u, ok := c.Conn.(*countedUnixConn)
	if !ok {
		d.Address = c.Conn.RemoteAddr().String()
		return d
	}
	if cred, err := credentials(u.UnixConn); err == nil {
		d.UID = int(cred.Uid)
		if d.PID = int(max(cred.Pid, 0)); d.PID > 0 && (u.by.PID <= 0 || u.by.alive()) { // or another process may have its number
			d.Command = commandOf(d.PID)
		}
	}
	return d
}

// Disconnect ends connections of NBD clients: those that have a volume or snapshot open, the one with an ID, or those of
// a process (pid:N). It returns those that it has ended. A client that takes no replies is cut off after stopTimeout/2.
func (o *Owner) Disconnect(ctx context.Context, what string) ([]NBDClient, error) {
	is, err := o.meant(what)
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeout(ctx, stopTimeout/2)
	defer cancel()
	ended := []NBDClient{}
	var errs []error
	var wg sync.WaitGroup
	var mu sync.Mutex // guards errs
	for _, c := range o.nbdConns() {
		if !is(c.NBDClient) {
			continue
		}
		ended = append(ended, c.NBDClient)
		wg.Go(func() {
			err := c.server.Disconnect(bounded, c.conn)
			e := journal.Entry{Kind: "disconnect", Details: map[string]any{"client": c.ID, "pid": c.PID}}
			if c.Name != "" {
				e.Names = []string{c.Name}
			}
			o.note(ctx, e, err)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wg.Wait()
	if len(ended) == 0 {
		return nil, fmt.Errorf("%s: no NBD client is connected that this could mean: %w", what, cow.ErrNotFound)
	}
	return ended, errors.Join(errs...)
}

// meant returns a function that reports whether Disconnect means a client.
func (o *Owner) meant(what string) (func(NBDClient) bool, error) {
	if strings.HasPrefix(what, connectionPrefix) {
		return func(c NBDClient) bool { return c.ID == what }, nil
	}
	if number, ok := strings.CutPrefix(what, processPrefix); ok {
		pid, err := strconv.Atoi(number)
		if err != nil || pid <= 0 {
			return nil, fmt.Errorf("%s: the number of a process is needed: %w", what, cow.ErrInvalid)
		}
		return func(c NBDClient) bool { return c.PID == pid }, nil
	}
	r, err := cow.ParseRef(what)
	if err == nil {
		err = o.known(r)
	}
	return func(c NBDClient) bool { return c.Name == r.String() }, err
}

// Clients lists the connections of NBD clients, the oldest first. For an older owner, which does not know the operation, the
// list is empty.
func (c *Client) Clients(ctx context.Context) (list []NBDClient, err error) {
	err = c.call(ctx, "clients", request{}, &list)
	if status := statusError(0); errors.As(err, &status) && status == http.StatusNotFound {
		return []NBDClient{}, nil
	}
	return list, err
}

// Disconnect ends connections of NBD clients.
func (c *Client) Disconnect(ctx context.Context, what string) (list []NBDClient, err error) {
	return list, c.call(ctx, "disconnect", request{Name: what}, &list)
}

// statusError is the answer of an owner that is no Error.
type statusError int

func (e statusError) Error() string {
	return fmt.Sprintf("the owner of the store answers %q; is it another version of vdisk?", fmt.Sprint(int(e), " ", http.StatusText(int(e))))
}
