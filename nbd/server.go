package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// ErrServerClosed is returned by Serve and ServeConn after Shutdown.
var ErrServerClosed = errors.New("nbd: server closed")

// ErrTooManyConnections is returned by ServeConn for a connection past Options.MaxConnections.
var ErrTooManyConnections = errors.New("nbd: too many connections")

// Options are a Server's limits. Zero values stand for the defaults.
type Options struct {
	// MaxConnections is how many connections are served at a time (64). Further ones are closed at
	// once.
	MaxConnections int
	// HandshakeTimeout bounds the whole negotiation of a connection (30 s).
	HandshakeTimeout time.Duration
	// MaxInFlight bounds the bytes of requests, and of their replies, that one connection has under
	// way (64 MiB). One request is always possible, however large.
	MaxInFlight int64
	// Workers is how many requests of one connection are done at a time, beside the flush and those
	// that are done as they are received (32).
	Workers int
	// Logger gets what goes wrong with connections, and their beginnings and ends at debug level
	// (none).
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.MaxConnections == 0 {
		o.MaxConnections = 64
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 30 * time.Second
	}
	if o.MaxInFlight == 0 {
		o.MaxInFlight = 64 << 20
	}
	if o.Workers == 0 {
		o.Workers = 32
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Server serves exports. Make it with New.
type Server struct {
	exports Exports
	opts    Options

	mu        sync.Mutex // guards the fields below
	closed    bool       // Shutdown was called
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]bool // true in the transmission phase
	idle      sync.Cond         // signalled when a connection has ended
}

// New returns a server of exports.
func New(exports Exports, opts Options) *Server {
	s := &Server{
		exports:   exports,
		opts:      opts.withDefaults(),
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[net.Conn]bool),
	}
	s.idle.L = &s.mu
	return s
}

// Serve accepts connections from l and serves them until Shutdown is called, which makes it return
// ErrServerClosed, or ctx ends, which cuts the connections off and makes it return ctx's error, or
// accepting fails. In each case it closes l, and its connections have ended when it returns.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	if !s.addListener(l) {
		return ErrServerClosed
	}
	defer s.removeListener(l)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		nc, err := accept(ctx, l)
		if err != nil {
			if s.isClosed() {
				return ErrServerClosed
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("nbd: accept: %w", err)
		}
		wg.Go(func() {
			log := s.opts.Logger.With("client", nc.RemoteAddr().String())
			log.Debug("nbd connection begins")
			if err := s.ServeConn(ctx, nc); err != nil && ctx.Err() == nil && !errors.Is(err, ErrServerClosed) {
				log.Warn("nbd connection failed", "err", err)
			}
			log.Debug("nbd connection ended")
		})
	}
}

// accept retries what passes: a client that is gone already, too many open files for the moment.
func accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	for delay := 5 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		nc, err := l.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) || !isTemporary(err) {
			return nc, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(delay):
		}
	}
}

func isTemporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// ServeConn serves one connection, and closes it. It returns nil when the client ended it properly,
// and otherwise what ended it. None of its requests is under way any more when it returns, and its
// export is closed.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	defer nc.Close()
	if err := s.addConn(nc); err != nil {
		return err
	}
	defer s.removeConn(nc)
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()

	if err := nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	session, err := negotiate(s.exports, nc)
	if err != nil {
		return s.reason(ctx, err)
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		err = fmt.Errorf("nbd: %w", err)
		return errors.Join(s.reason(ctx, err), session.export.close())
	}
	// After the deadline of the negotiation is gone: Shutdown sets one of its own from here on.
	if !s.startTransmission(nc) {
		return errors.Join(ErrServerClosed, session.export.close())
	}
	err = newConn(s, nc, session).run()
	return errors.Join(s.reason(ctx, err), session.export.close())
}

// reason says why a connection ended that ended with err.
func (s *Server) reason(ctx context.Context, err error) error {
	switch {
	case err == nil, errors.Is(err, errAborted), errors.Is(err, io.EOF):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case s.isClosed() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed)):
		return ErrServerClosed
	}
	return err
}

// Shutdown ends the server: no connection is accepted, no request is read, what is under way is
// finished and answered. It returns nil when all connections have ended. When ctx ends before that,
// it cuts them off and returns ctx's error without waiting for the devices.
func (s *Server) Shutdown(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.idle.Broadcast()
	})
	defer stop()

	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for nc, transmitting := range s.conns {
		if transmitting {
			_ = nc.SetReadDeadline(time.Unix(1, 0)) // fails only where nc is closed
		} else {
			nc.Close()
		}
	}
	for len(s.conns) > 0 && ctx.Err() == nil {
		s.idle.Wait()
	}
	if len(s.conns) == 0 {
		return nil
	}
	for nc := range s.conns {
		nc.Close()
	}
	return ctx.Err()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// addListener returns false where the server is closed.
func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.listeners[l] = struct{}{}
	}
	return !s.closed
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

func (s *Server) addConn(nc net.Conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	if len(s.conns) >= s.opts.MaxConnections {
		return ErrTooManyConnections
	}
	s.conns[nc] = false
	return nil
}

// startTransmission returns false where the server is closed.
func (s *Server) startTransmission(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.conns[nc] = true
	}
	return !s.closed
}

func (s *Server) removeConn(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, nc)
	s.idle.Broadcast()
}
