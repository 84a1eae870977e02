package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

// socketName is the name of serve's default socket in the store.
const socketName = "nbd.sock"

// listening is a socket on which an NBD service listens, as its clients find it.
type listening struct {
	net.Listener
	where   string // its path or address
	remove  func() // to be called when it is closed
	uri     func(name string) string
	warning string // for the user; may be empty
}

// listenFlags checks the flags that say where to listen, and returns the folder of the certificates, or "".
func listenFlags(c *cli.Context) (certificates string, err error) {
	switch {
	case c.IsSet("listen") && c.IsSet("socket"):
		return "", usageError{c, errors.New("--listen and --socket are two services: give two commands")}
	case c.IsSet("listen") && !c.IsSet("tls-certificates"):
		return "", usageError{c, errors.New("--listen needs --tls-certificates: NBD is served over TCP only with TLS")}
	case c.IsSet("listen") && (c.IsSet("socket-mode") || c.IsSet("socket-group")):
		return "", usageError{c, errors.New("--socket-mode and --socket-group are for a Unix socket, and not for --listen")}
	case !c.IsSet("tls-certificates"):
		return "", nil
	}
	if certificates, err = filepath.Abs(c.Path("tls-certificates")); err != nil {
		return "", err
	}
	_, err = owner.TLSConfig(certificates) // the owner reads them, too, after the exports were printed
	return certificates, err
}

func (a *app) listenUnix(c *cli.Context, s owner.Store, secure bool) (x listening, err error) {
	path := c.Path("socket")
	if own, ok := s.(*owner.Owner); ok && own.ReadOnly() != nil && path == "" {
		return x, fmt.Errorf("no socket can be made in the store; name one with --socket: %w", own.ReadOnly())
	}
	if path == "" {
		path = filepath.Join(a.dir, socketName)
	}
	if path, err = filepath.Abs(path); err != nil {
		return x, err
	}
	x.where = path
	access, err := socketAccess(c)
	if err != nil {
		return x, err
	}
	if x.Listener, x.remove, err = owner.ListenFor(path, access); err != nil {
		return x, servedAlready(c.Context, s, path, err)
	}
	x.warning = unreachable(path, access)
	if len(path) > owner.SunPath {
		x.warning = fmt.Sprintf("the socket's path has %d bytes, and most clients can connect to %d at most: name a shorter one with --socket, "+
			"or connect from its folder by %s", len(path), owner.SunPath, filepath.Base(path))
	}
	x.uri = func(name string) string { return unixURI(name, path, secure) }
	return x, nil
}

// servedAlready adds to err that the owner of the store itself serves NBD on the socket at path, if it does.
func servedAlready(ctx context.Context, s owner.Store, path string, err error) error {
	st, serr := s.Status(ctx)
	if serr != nil || !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, v := range st.Services {
		if v.Socket == path {
			return hintedError{
				fmt.Errorf("%w: pid %d (%s) serves the store there", err, st.PID, st.Command),
				"use that socket, or name another one with --socket",
			}
		}
	}
	return err
}

// unixURI returns the NBD URI of an export on a Unix socket.
func unixURI(name, socket string, secure bool) string {
	// EscapedPath leaves characters that separate parameters, or that some clients take for a space.
	path := strings.NewReplacer("&", "%26", ";", "%3B", "=", "%3D", "+", "%2B").Replace((&url.URL{Path: socket}).EscapedPath())
	u := url.URL{Scheme: "nbd+unix", Path: "/" + name, RawQuery: "socket=" + path}
	if secure {
		u.Scheme = "nbds+unix"
	}
	return u.String()
}

// listenTCP listens on --listen. In URIs, a host that stands for all addresses becomes the machine's name.
func (a *app) listenTCP(c *cli.Context, _ owner.Store, _ bool) (x listening, err error) {
	host, _, err := net.SplitHostPort(c.String("listen"))
	if err != nil {
		return x, usageError{c, fmt.Errorf("--listen %s: %w", c.String("listen"), err)}
	}
	if x.Listener, err = net.Listen("tcp", c.String("listen")); err != nil {
		return x, err
	}
	x.where, x.remove = x.Addr().String(), func() {}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		if host, err = os.Hostname(); err != nil {
			return x, errors.Join(err, x.Close())
		}
	}
	_, port, err := net.SplitHostPort(x.where)
	x.uri = func(name string) string {
		u := url.URL{Scheme: "nbds", Host: net.JoinHostPort(host, port), Path: "/" + name}
		return u.String()
	}
	return x, err
}
