package nbd

import (
	"crypto/tls"
	"log/slog"
	"syscall"
	"time"
)

// Options are the limits of a Server, and its TLS. A zero value stands for the default, which is given in parentheses.
type Options struct {
	// MaxConnections is the number of connections that are served at a time (10,000). Further ones are refused with
	// that reason, and closed. A connection that waits for requests holds no buffers.
	MaxConnections int
	// HandshakeTimeout bounds each step of a negotiation: an option of the client, and its answer (30 s).
	HandshakeTimeout time.Duration
	// MaxInFlight bounds the memory of the requests that one connection has under way, and of their replies (64 MiB).
	// One request is always possible, however large.
	MaxInFlight int64
	// MaxMemory bounds the same for all connections together (256 MiB). When it is used up, connections wait for each
	// other. Then clients that have taken no replies for half a minute are cut off, so that they do not keep others
	// waiting.
	MaxMemory int64
	// Workers is the number of requests of one connection that are executed at a time, besides the flush and those that
	// the receiver executes itself (32).
	Workers int
	// TLS, if it is not nil, makes the server insist on TLS, of version 1.2 at least: clients can do nothing before they
	// have begun it (STARTTLS). ClientAuth and ClientCAs say which clients are let in.
	TLS *tls.Config
	// Logger gets requests and connections that fail, at most one a second, and panics, at most one a second; clients
	// that disconnect without notice, at info level; and the beginning and end of each connection, at debug level
	// (none).
	Logger *slog.Logger

	// Tests set these.
	stall time.Duration                       // a client that keeps others waiting for so long is cut off
	read  func(fd int, p []byte) (int, error) // read(2) of a connection's socket

	unproven int           // see maxUnproven
	take     time.Duration // see takeTimeout
}

func (o Options) withDefaults() Options {
	if o.MaxConnections == 0 {
		o.MaxConnections = 10_000
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 30 * time.Second
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = 64 << 20
	}
	if o.MaxMemory == 0 {
		o.MaxMemory = 256 << 20
	}
	if o.Workers == 0 {
		o.Workers = 32
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.stall == 0 {
		o.stall = 30 * time.Second
	}
	if o.read == nil {
		o.read = syscall.Read
	}
	if o.take == 0 {
		o.take = takeTimeout
	}
	if o.unproven == 0 {
		o.unproven = maxUnproven
	}
	o.TLS = withTLS(o.TLS)
	return o
}
