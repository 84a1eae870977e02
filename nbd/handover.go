package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"
)

// A connection goes from one server to another, in the same process or another one, like this:
//
//	the old server                                            the new server
//	Pause: nothing more is received or accepted; what is
//	under way is done; the state of each connection is known
//	                                                          Adopt: opens the export as it was
//	Shutdown: closes its descriptors                          goes on behind the last whole request
//
// The client notices a pause. Nothing is waited for that it would have to do: of a request that has come in part, the
// part is in the State, and so are replies that it has not taken.

// errPaused ends conn.run for Server.Pause.
var errPaused = errors.New("nbd: paused")

// State is what a server has to know to go on with a connection.
type State struct {
	Export     string // in full
	Size       uint64 // as the client was told
	ReadOnly   bool
	Structured bool
	Extended   bool
	Contexts   []string // metadata contexts that were selected
	Since      time.Time
	Counters   Counters
	Received   []byte // from the client, and not answered
	Unsent     []byte // replies, or the rest of one
}

// Paused is a connection that Pause has stopped.
type Paused struct {
	Conn  net.Conn
	State State
}

// Reopener is implemented by Exports, or by what ClientExports return, if an adopted connection should open an export in
// another way than a new one. Its export has to be read-only as given.
type Reopener interface {
	Reopen(name string, readOnly bool) (*Export, error)
}

const (
	// takeTimeout is how long a paused connection's client has to take replies; it gets the rest from the next server.
	takeTimeout = time.Second
	// openTimeout is how long Pause waits for clients that negotiate. They cannot be handed over.
	openTimeout = 2 * time.Second
	// maxUnsent, or Options.MaxMemory if that is less, is how many bytes of replies all clients may leave behind together. A
	// client that would leave more is cut off.
	maxUnsent = 64 << 20
)

// Pause stops the server at a request boundary of each connection, and returns the connections. Connections with TLS,
// whose keys cannot be handed over, go on until Shutdown. No connection is accepted any more. Clients that connect
// wait until a server accepts again: this one after Continue, or the next one. If ctx ends before all requests under way
// are done, Pause fails, and Continue is to be called.
func (s *Server) Pause(ctx context.Context) ([]Paused, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = true
	s.memory.forget()
	for l := range s.listeners {
		s.pauseListener(l)
	}
	for _, x := range s.conns {
		if x.conn != nil {
			x.conn.pause()
		}
	}
	opening, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	defer s.wakeWith(opening)()
	defer s.wakeWith(ctx)()
	for s.counted((*served).opening) > 0 && opening.Err() == nil || s.counted((*served).atWork) > 0 && ctx.Err() == nil {
		s.idle.Wait()
	}
	if n := s.counted((*served).atWork); n > 0 {
		return nil, fmt.Errorf("nbd: %d connections wait for their device: %w", n, ctx.Err())
	}
	s.sealed = true
	var list []Paused
	for nc, x := range s.conns {
		if x.parked != nil {
			list = append(list, Paused{nc, *x.parked})
		}
	}
	return list, nil
}

// pauseListener ends an Accept, if the server is paused. The caller holds s.mu.
func (s *Server) pauseListener(l net.Listener) {
	if d, ok := l.(deadliner); ok && s.paused {
		_ = d.SetDeadline(time.Unix(1, 0)) // fails only where l is closed
	}
}

type deadliner interface{ SetDeadline(time.Time) error }

// opening reports whether a connection may still open an export, and could be handed over then.
func (x *served) opening() bool { return x.conn == nil && !x.refused }

// atWork reports whether a connection is to be parked, and is not.
func (x *served) atWork() bool { return x.conn != nil && x.conn.out.secure == nil && x.parked == nil }

// counted returns how many connections are so. The caller holds s.mu.
func (s *Server) counted(is func(*served) bool) (n int) {
	for _, x := range s.conns {
		if is(x) {
			n++
		}
	}
	return n
}

// Continue undoes Pause.
func (s *Server) Continue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused, s.sealed = false, false
	s.idle.Broadcast()
}

// awaitContinue waits until Accept of a listener is to be called again after Pause. It returns false if the server is
// closed.
func (s *Server) awaitContinue(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.paused && !s.closed {
		s.idle.Wait()
	}
	if d, ok := l.(deadliner); ok && !s.closed {
		return d.SetDeadline(time.Time{}) == nil
	}
	return false
}

// park keeps a connection that was paused. It returns what to go on with after Continue, or nil if the server is closed,
// and perhaps another one has the connection.
func (s *Server) park(nc net.Conn, c *conn) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, state := s.conns[nc], c.state()
	state.Since = x.since
	x.parked = &state
	s.idle.Broadcast()
	for s.paused && !s.closed {
		s.idle.Wait()
	}
	x.parked = nil
	if s.closed || x.disconnected {
		return nil
	}
	x.conn = newConn(s, nc, c.session, c.gone)
	x.conn.goOn(state)
	_ = nc.SetDeadline(time.Time{}) // fails only where nc is closed
	return x.conn
}

// Adopt takes over a connection of another server, and opens its export. serve then serves it like ServeConn. It must be
// called even if the connection is not wanted any more; with a ctx that has ended, it only closes it.
func (s *Server) Adopt(ctx context.Context, nc net.Conn, state State) (serve func() error, err error) {
	if s.opts.TLS != nil {
		return nil, errors.New("nbd: this server needs TLS, and a connection with TLS cannot be adopted")
	}
	client, gone := context.WithCancel(ctx)
	session, err := s.reopen(s.exportsFor(client, nc), state)
	if err != nil {
		gone()
		return nil, err
	}
	c := newConn(s, nc, session, gone)
	c.goOn(state)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		gone()
		return nil, errors.Join(ErrServerClosed, s.closeExport(session))
	}
	s.conns[nc] = &served{since: state.Since, conn: c} // beyond MaxConnections if need be: it was there before
	return func() error {
		defer nc.Close()
		defer gone()
		defer s.removeConn(nc)
		defer context.AfterFunc(ctx, func() { nc.Close() })()
		err := s.transmit(ctx, nc, c)
		if err != nil && ctx.Err() == nil {
			s.logEnd(nc.RemoteAddr().String(), err)
		}
		return err
	}, nil
}

// reopen opens the export of a connection as it was.
func (s *Server) reopen(exports Exports, state State) (_ session, err error) {
	defer recovered(&err)
	var export *Export
	if r, ok := exports.(Reopener); ok {
		export, err = r.Reopen(state.Export, state.ReadOnly)
	} else {
		export, err = exports.Open(state.Export)
	}
	if err != nil {
		return session{}, fmt.Errorf("nbd: open export %q again: %w", state.Export, err)
	}
	if size := uint64(export.Device.Size()); size < state.Size || export.ReadOnly != state.ReadOnly {
		err = fmt.Errorf("nbd: export %q is another one: %d bytes, read-only %v; the client knows %d bytes, read-only %v",
			state.Export, size, export.ReadOnly, state.Size, state.ReadOnly)
		return session{}, errors.Join(err, export.close())
	}
	contexts, err := openContexts(export, state.Contexts)
	if err != nil {
		return session{}, errors.Join(fmt.Errorf("nbd: open export %q again: %w", state.Export, err), export.close())
	}
	return session{
		export: export, name: state.Export, size: state.Size, structured: state.Structured, extended: state.Extended,
		contexts: contexts, contextNames: state.Contexts,
	}, nil
}

// pause lets the receiver end. Replies that the client does not take in time are kept.
func (c *conn) pause() {
	if c.out.secure != nil {
		return
	}
	c.pausing.Store(true)
	c.ending.finish()
	_ = c.out.conn.SetReadDeadline(time.Unix(1, 0)) // these fail only where the connection is closed
	_ = c.out.conn.SetWriteDeadline(time.Now().Add(c.srv.opts.take))
}

// orPaused returns errPaused if err is how pause has ended the receiver.
func (c *conn) orPaused(err error) error {
	if c.pausing.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		return errPaused
	}
	return err
}

// keep keeps a request whose payload has not come whole. payload is what is not in the input any more.
func (c *conn) keep(req request, payload []byte) {
	if c.pausing.Load() {
		c.counters.uncount(req)
		c.partial = slices.Concat(c.head[:c.requestLen()], payload)
	}
}

// keepDiscarded keeps a request that is refused, and n bytes of whose payload have been discarded: others will do, as
// the next server refuses it, too.
func (c *conn) keepDiscarded(req request, n int, err error) error {
	if n > MaxPayload && c.orPaused(err) == errPaused {
		return fmt.Errorf("%w: a refused request has %d bytes", ErrProtocol, req.length)
	}
	c.keep(req, make([]byte, min(n, MaxPayload)))
	return err
}

// keepReceived completes partial with what the input has.
func (c *conn) keepReceived() {
	if c.in.buf != nil {
		c.partial = append(c.partial, c.in.buf.b[c.in.r:c.in.w]...)
	}
	c.partial = append(c.partial, c.in.before...)
}

// state returns the state of a connection whose run has returned errPaused.
func (c *conn) state() State {
	return State{
		Export: cmp.Or(c.export.Name, c.name), Size: c.size, ReadOnly: c.export.ReadOnly, Structured: c.structured, Extended: c.extended,
		Contexts: c.contextNames, Counters: c.counters.now(), Received: c.partial, Unsent: c.out.unsent,
	}
}

// goOn makes a new connection go on from a state.
func (c *conn) goOn(state State) {
	c.counters.set(state.Counters)
	c.in.before = state.Received
	c.unsent = state.Unsent
}

// readBefore reads what another server has received.
func (in *input) readBefore(p []byte) int {
	if p == nil {
		p = in.room()
	}
	n := copy(p, in.before)
	if in.before = in.before[n:]; len(in.before) == 0 {
		in.before = nil
	}
	return n
}

// sendUnsent sends what another server could not send, before any other reply.
func (c *conn) sendUnsent() {
	if len(c.unsent) == 0 {
		return
	}
	p := newPacket(0)
	p.vec = append(p.vec, c.unsent)
	c.unsent = nil
	c.out.send(p)
}

// errUnsent ends a connection that would leave too much behind.
var errUnsent = errors.New("a hand-over: the client takes no replies, and they are more than can be kept")

// keepUnsent keeps what could not be written because the connection is paused. It returns err if that is not the reason,
// and errUnsent if that is more than all clients may leave behind. The writer calls it.
func (s *sender) keepUnsent(err error) error {
	if !s.pausing.Load() || !s.kept && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	s.kept = true
	n := int64(0)
	for _, p := range s.vec {
		n += int64(len(p))
	}
	if !s.budget.all.keep(n) {
		s.budget.all.keep(-int64(len(s.unsent)))
		s.unsent = nil
		return errUnsent
	}
	for _, p := range s.vec {
		s.unsent = append(s.unsent, p...)
	}
	return nil
}
