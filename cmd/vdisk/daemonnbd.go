package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

// nbdOff is the value of --nbd for a daemon that serves no NBD.
const nbdOff = "off"

// daemonNBD is the NBD socket of a daemon.
type daemonNBD struct {
	path   string // empty: none
	access owner.Access
}

// daemonSocket returns which NBD socket a daemon makes. One that an attach started makes none unless that is asked for:
// nobody asked for NBD, and the default socket stays free for 'vdisk serve'.
func (a *app) daemonSocket(c *cli.Context) (n daemonNBD, err error) {
	if n.access, err = socketAccess(c); err != nil {
		return n, err
	}
	switch n.path = c.Path("nbd"); {
	case n.path == nbdOff && (c.IsSet("socket-mode") || c.IsSet("socket-group")):
		return n, usageError{c, errors.New("--socket-mode and --socket-group are of no use with --nbd off")}
	case n.path == nbdOff || n.path == "" && c.Bool("until-idle"):
		n.path = ""
	case n.path == "":
		n.path = filepath.Join(a.dir, socketName)
	default:
		n.path, err = filepath.Abs(n.path)
	}
	return n, err
}

// serveNBD begins to serve NBD clients, until the owner ends.
func (a *app) serveNBD(s *owner.Owner, n daemonNBD) error {
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
