package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

// nbdOff is the value of --nbd for a daemon that serves no NBD.
const nbdOff = "off"

// daemonNBD is the NBD socket of a daemon.
type daemonNBD struct {
	path   string // empty: none
	access owner.Access
	passed []net.Listener // sockets that the daemon was started with
}

// daemonSocket returns which NBD socket a daemon makes. Sockets that it was started with take the place of the default.
// A daemon that an attach started makes none unless --nbd says so: nobody asked for NBD, and the default socket stays free
// for 'vdisk serve'.
func (a *app) daemonSocket(c *cli.Context) (n daemonNBD, err error) {
	if n.access, err = socketAccess(c); err != nil {
		return n, err
	}
	if n.passed, err = passedToDaemon(); err != nil {
		return n, err
	}
	switch n.path = c.Path("nbd"); {
	case n.path == nbdOff && len(n.passed) > 0:
		return n, usageError{c, errors.New("--nbd off, and under socket activation there is a socket to serve")}
	case n.path == nbdOff && (c.IsSet("socket-mode") || c.IsSet("socket-group")):
		return n, usageError{c, errors.New("--socket-mode and --socket-group are of no use with --nbd off")}
	case n.path == nbdOff || n.path == "" && (c.Bool("until-idle") || len(n.passed) > 0):
		n.path = ""
	case n.path == "":
		n.path = filepath.Join(a.dir, socketName)
	default:
		n.path, err = filepath.Abs(n.path)
	}
	return n, err
}

// passedToDaemon returns the listening sockets that this process was started with (LISTEN_FDS). The next program gets them
// by the hand-over of an upgrade.
func passedToDaemon() ([]net.Listener, error) {
	listeners, err := activation.Listeners()
	for _, l := range listeners {
		if err == nil && (l == nil || l.Addr().Network() != "unix") {
			err = errors.New("a daemon serves NBD on Unix sockets only; 'vdisk serve' serves TCP, with TLS")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("socket activation: %w", err)
	}
	return listeners, nil
}

// serveNBD begins to serve NBD clients, until the owner ends.
func (a *app) serveNBD(s *owner.Owner, n daemonNBD) error {
	for _, l := range n.passed {
		s.ServeOwn(l, owner.ServeOptions{Socket: l.Addr().String()}, nil)
		a.log.Info("NBD clients are served", "socket", l.Addr().String())
	}
	if n.path == "" {
		return nil
	}
	l, remove, err := owner.ListenFor(n.path, n.access)
	if err != nil {
		return fmt.Errorf("%w: --nbd names another socket, or none (--nbd off)", err)
	}
	if warning := unreachable(n.path, n.access); warning != "" {
		a.log.Warn(warning)
	}
	s.ServeOwn(l, owner.ServeOptions{Socket: n.path}, remove)
	a.log.Info("NBD clients are served", "socket", n.path)
	return nil
}
