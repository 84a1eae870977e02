package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrServerClosed is returned by Serve and ServeConn after Shutdown.
var ErrServerClosed = errors.New("nbd: server closed")

// ErrTooManyConnections is returned by ServeConn for a connection that exceeds Options.MaxConnections. Its client gets
// that as the answer to its options.
var ErrTooManyConnections = errors.New("too many NBD connections")

// Server serves exports. New makes one.
type Server struct {
	exports Exports
	opts    Options
	memory  memory
	log     sparseLog
	panics  sparseLog    // separate, since they are faults of the server
	held    atomic.Int64 // what requests of all connections take that wait for their turn

	mu        sync.Mutex // guards the fields below
	closed    bool       // Shutdown was called
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]*served
	refused   int        // of conns
	unproven  []net.Conn // of conns: without TLS yet, where it is needed; the oldest first
	idle      sync.Cond  // signalled when a connection has ended or is parked, and at Continue
	paused    bool       // Pause was called, and Continue was not
	sealed    bool       // the connections that are to be handed over are known: no more begin

	abandoned chan struct{} // closed when Shutdown does not wait any longer
	abandon   sync.Once
}

// served is a connection as the server sees it.
type served struct {
	since        time.Time
	refused      bool   // it exceeds the limit, and is being refused
	disconnected bool   // Disconnect ends it
	conn         *conn  // nil until the transmission phase
	parked       *State // not nil while it is paused
}

func newServed(refused bool) *served { return &served{since: time.Now(), refused: refused} }

// New returns a server of exports.
func New(exports Exports, opts Options) *Server {
	s := &Server{
		exports:   exports,
		opts:      opts.withDefaults(),
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[net.Conn]*served),
		abandoned: make(chan struct{}),
	}
	s.memory.max = s.opts.MaxMemory
	s.log.logger, s.panics.logger = s.opts.Logger, s.opts.Logger
	s.idle.L = &s.mu
	return s
}

// Serve accepts connections from l and serves them. It ends in one of three ways:
//
//   - Shutdown is called: it returns ErrServerClosed.
//   - ctx ends: it cuts the connections off, and returns ctx's error.
//   - Accepting fails: it returns that error.
//
// In each case it closes l. When it returns, its connections have ended, unless Shutdown gave up waiting for them.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer l.Close()
	if !s.addListener(l) {
		return ErrServerClosed
	}
	defer s.removeListener(l)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer s.await(&wg)
	for {
		nc, err := accept(ctx, l)
		if errors.Is(err, os.ErrDeadlineExceeded) && s.awaitContinue(l) {
			continue
		}
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
			client := nc.RemoteAddr().String()
			s.opts.Logger.Debug("nbd connection begins", "client", client)
			if err := s.ServeConn(ctx, nc); err != nil && ctx.Err() == nil {
				s.logEnd(client, err)
			}
			s.opts.Logger.Debug("nbd connection ended", "client", client)
		})
	}
}

// await waits for connections, unless Shutdown gives them up.
func (s *Server) await(wg *sync.WaitGroup) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wg.Wait()
	}()
	select {
	case <-ended:
	case <-s.abandoned:
	}
}

// accept tries again after errors that pass: a client that has gone already, or no memory or too many open files at the
// moment.
func accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	for delay := 5 * time.Millisecond; ; delay = min(2*delay, time.Second) {
		nc, err := l.Accept()
		if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) || !passes(err) {
			return nc, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(delay):
		}
	}
}

// passes reports whether an error of accept says nothing about the listener: it concerns one connection, or the machine
// at the moment (accept(2)).
func passes(err error) bool {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		switch errno {
		case syscall.ENOMEM, syscall.ENOBUFS, syscall.ECONNABORTED, syscall.ECONNRESET, syscall.EPERM, syscall.EPROTO,
			syscall.ENOPROTOOPT, syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENONET:
			return true
		}
	}
	var t interface{ Temporary() bool } // too many open files, among others
	return errors.As(err, &t) && t.Temporary()
}

// ServeConn serves one connection, and closes it. It returns nil if the client ended the connection properly, and
// otherwise what ended it. When it returns, none of the connection's requests is under way, and its export is closed.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) error {
	defer nc.Close()
	full, err := s.addConn(nc)
	if err != nil {
		return err
	}
	defer s.removeConn(nc)
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	if full != nil {
		s.refuse(nc, full)
		return full
	}
	client, gone := context.WithCancel(ctx)
	defer gone()
	n := s.negotiation(s.exportsFor(client, nc), nc)
	n.proven = func() (err error) {
		if full, err = s.proven(nc); full != nil {
			n.exports = refusing{full}
		}
		return err
	}
	session, err := n.run()
	if err != nil {
		return errors.Join(full, s.reason(ctx, nc, err))
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		err = fmt.Errorf("nbd: %w", err)
		return errors.Join(s.reason(ctx, nc, err), s.closeExport(session))
	}
	// After the deadline of the negotiation is gone: Shutdown sets one of its own from here on.
	c := newConn(s, n.conn, session, gone)
	if !s.startTransmission(nc, c) {
		return errors.Join(ErrServerClosed, s.closeExport(session))
	}
	return s.transmit(ctx, nc, c)
}

// transmit serves a connection in the transmission phase to its end, and closes its export.
func (s *Server) transmit(ctx context.Context, nc net.Conn, c *conn) error {
	err := c.run()
	for err == errPaused {
		next := s.park(nc, c)
		if next == nil {
			return errors.Join(ErrServerClosed, s.closeExport(c.session))
		}
		c = next
		err = c.run()
	}
	if secure := c.out.secure; secure != nil && !c.out.failed.Load() && !c.cutOff.Load() {
		secure.bye()
	}
	return errors.Join(s.reason(ctx, nc, err), s.closeExport(c.session))
}

func (s *Server) negotiation(exports Exports, nc net.Conn) *negotiation {
	return &negotiation{
		exports: exports, conn: nc, timeout: s.opts.HandshakeTimeout, failed: s.logPanic, closing: s.isClosed,
		tls: s.opts.TLS, sysRead: s.opts.read,
	}
}

// exportsFor returns the exports as a client sees them.
func (s *Server) exportsFor(ctx context.Context, nc net.Conn) Exports {
	if x, ok := s.exports.(ClientExports); ok {
		return x.ForClient(ctx, nc)
	}
	return s.exports
}

// closeExport ends a session.
func (s *Server) closeExport(session session) error {
	err := errors.Join(closeContexts(session.contexts), session.export.close())
	if err != nil {
		err = fmt.Errorf("closing export %q: %w", session.name, err)
		s.logPanic(err)
	}
	return err
}

// refuseTimeout bounds each step of a client that is refused. maxRefused bounds the number of such clients at a time:
// further ones are closed without an answer.
const (
	refuseTimeout = 5 * time.Second
	maxRefused    = 64
)

// refuse tells a client why it is not served. The only way to do so in the protocol is to answer its options.
func (s *Server) refuse(nc net.Conn, why error) {
	n := s.negotiation(refusing{why}, nc)
	n.timeout, n.failed = min(refuseTimeout, n.timeout), func(error) {}
	_, _ = n.run() // whether the client listens does not matter
}

// refusing are the exports of a client that gets none.
type refusing struct{ why error }

func (r refusing) List() ([]string, error)       { return nil, r.why }
func (r refusing) Describe(string) (Info, error) { return Info{}, r.why }
func (r refusing) Open(string) (*Export, error)  { return nil, r.why }

// reason returns why a connection ended, given the error err that it ended with.
func (s *Server) reason(ctx context.Context, nc net.Conn, err error) error {
	switch {
	case err == nil, errors.Is(err, errAborted), errors.Is(err, io.EOF):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed):
	case s.isClosed():
		return ErrServerClosed
	case s.wasDisconnected(nc):
		return ErrDisconnected
	}
	return err
}

// cutTimeout is how long Shutdown waits for connections that it has cut off: only a device holds them then.
const cutTimeout = time.Second

// Shutdown ends the server. No connection is accepted, and no request is read any more; requests that are under way are
// finished and answered, but those that are done in steps end after a step, with ESHUTDOWN. It returns nil when all
// connections have ended. If ctx ends before that, it cuts them off, and returns an error that wraps ctx's, at most a
// second later. It does not wait for devices that do not answer; then Serve does not either.
func (s *Server) Shutdown(ctx context.Context) error {
	s.close()
	left := s.awaitIdle(ctx)
	if len(left) == 0 {
		return nil
	}
	for nc, c := range left {
		if c != nil {
			c.cut()
		} else {
			nc.Close()
		}
	}
	bounded, cancel := context.WithTimeout(context.Background(), cutTimeout)
	defer cancel()
	stuck := s.awaitIdle(bounded)
	s.abandon.Do(func() { close(s.abandoned) })
	if len(stuck) > 0 {
		return fmt.Errorf("nbd: %d connections wait for their device and were given up: %w", len(stuck), ctx.Err())
	}
	return fmt.Errorf("nbd: %d clients took no replies and were cut off: %w", len(left), ctx.Err())
}

// awaitIdle waits until all connections have ended or ctx has, and returns the connections that have not ended.
func (s *Server) awaitIdle(ctx context.Context) map[net.Conn]*conn {
	defer s.wakeWith(ctx)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.conns) > 0 && ctx.Err() == nil {
		s.idle.Wait()
	}
	left := make(map[net.Conn]*conn, len(s.conns))
	for nc, c := range s.conns {
		left[nc] = c.conn
	}
	return left
}

// closingTimeout is how long a client that negotiates has to ask for something, and learn that the server shuts down.
const closingTimeout = 500 * time.Millisecond

// close ends what has to end at once for Shutdown.
func (s *Server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.idle.Broadcast() // to those that are parked
	for l := range s.listeners {
		l.Close()
	}
	for nc, c := range s.conns {
		until := time.Unix(1, 0)
		if c.conn == nil {
			until = time.Now().Add(closingTimeout)
		} else {
			c.conn.ending.finish()
		}
		_ = nc.SetReadDeadline(until) // fails only where nc is closed
	}
	for _, nc := range s.unproven {
		nc.Close()
	}
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed || s.sealed
}

// addListener adds l, or returns false if the server is closed.
func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.listeners[l] = struct{}{}
		s.pauseListener(l)
	}
	return !s.closed
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

// addConn adds a connection. If refuse is not nil, it is the reason for refusing the connection. If err is not nil, the
// connection must be closed without an answer.
func (s *Server) addConn(nc net.Conn) (refuse, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrServerClosed
	}
	if s.opts.TLS != nil {
		s.beginTLS(nc)
		return nil, nil
	}
	return s.admit(nc)
}

// admit is addConn after TLS, where that is needed. The caller holds s.mu.
func (s *Server) admit(nc net.Conn) (refuse, err error) {
	if len(s.conns)-s.refused-len(s.unproven) < s.opts.MaxConnections {
		s.conns[nc] = newServed(false)
		return nil, nil
	}
	full := fmt.Errorf("%w: the server takes %d at a time", ErrTooManyConnections, s.opts.MaxConnections)
	if s.refused >= maxRefused {
		return nil, full
	}
	s.refused++
	s.conns[nc] = newServed(true)
	return full, nil
}

// startTransmission enters the transmission phase, or returns false if the server is closed.
func (s *Server) startTransmission(nc net.Conn, c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.sealed {
		return false
	}
	s.conns[nc].conn = c
	if s.paused {
		c.pause()
	}
	return true
}

func (s *Server) removeConn(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endTLS(nc)
	if c := s.conns[nc]; c != nil && c.refused {
		s.refused--
	}
	delete(s.conns, nc)
	s.idle.Broadcast()
}

// cutStalled cuts off connections whose clients have kept the server waiting for too long. It is called when others
// wait for the memory that they hold.
func (s *Server) cutStalled() {
	s.mu.Lock()
	var stalled []*conn
	for _, c := range s.conns {
		if c.conn == nil {
			continue
		}
		if since := c.conn.stalledSince(); !since.IsZero() && time.Since(since) >= s.opts.stall {
			stalled = append(stalled, c.conn)
		}
	}
	s.mu.Unlock()
	for _, c := range stalled {
		s.opts.Logger.Warn("nbd client cut off: it takes no replies, and others wait for the memory that they need",
			"client", c.out.conn.RemoteAddr().String(), "export", c.name)
		c.cut()
	}
}
