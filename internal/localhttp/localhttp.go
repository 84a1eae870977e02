// Package localhttp serves HTTP to this machine alone: on loopback addresses, to a bounded number of connections, each of
// which must go on. The pages of other sites, which a browser of this machine has open, are kept out by the Host of their
// requests.
package localhttp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// ErrPublic is matched by the error of Listen for an address that other machines can reach.
var ErrPublic = errors.New("other machines can reach that address")

// Listen listens on ADDRESS:PORT. The address is an IP address or localhost. It must be a loopback address, unless public
// permits others. Errors say that the address is for what.
func Listen(what, address string, public bool) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("the address %q for %s: %w: ADDRESS:PORT is needed", address, what, err)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	if !public && !loopback(host) {
		return nil, fmt.Errorf("the address %q for %s: %w, or it is no IP address", address, what, ErrPublic)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("listening for %s: %w", what, err)
	}
	return l, nil
}

// loopback reports whether host is a loopback address.
func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// Local reports whether the Host of a request names this machine by number, or as localhost. A web page that was made
// to come from this address has another name.
func Local(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if n := len(host); n > 2 && host[0] == '[' && host[n-1] == ']' {
		host = host[1 : n-1]
	}
	return host == "localhost" || loopback(host)
}

// Bounds of each connection.
const (
	requestTimeout = 5 * time.Second
	answerTimeout  = 30 * time.Second
	idleTimeout    = 5 * time.Second // somebody else may need the connection
)

// Serve serves HTTP on l until ctx ends, and closes l. Connections beyond most are closed at once.
func Serve(ctx context.Context, l net.Listener, most int, log *slog.Logger, h http.Handler) error {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: requestTimeout, ReadTimeout: requestTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: 16 << 10, BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), DisableGeneralOptionsHandler: true, // h guards what it answers
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		_ = s.Close() // a request that is cut off is tried again
	})
	err := s.Serve(&limited{Listener: l, slots: make(chan struct{}, most)})
	if !stop() {
		<-ended
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// limited is a listener with a limit on the open connections: those beyond it are closed at once.
type limited struct {
	net.Listener
	slots chan struct{} // a value for each open connection
}

// Accept accepts the next connection for which there is room.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, AcceptError(err)
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			_ = c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

// Close closes the connection and makes room for another.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// AcceptError returns an error of accept for http.Server, which ends at the first one that is not temporary. Then nobody
// could reach the server any more. Of those that pass, package net does not know a lack of memory for one.
func AcceptError(err error) error {
	if errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ENOBUFS) {
		return passingError{err}
	}
	return err
}

// passingError is a net.Error after which accept is to be tried again.
type passingError struct{ error }

func (e passingError) Unwrap() error { return e.error }

// Timeout implements net.Error.
func (e passingError) Timeout() bool { return false }

// Temporary reports that the error passes.
func (e passingError) Temporary() bool { return true }
