package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
)

// ErrDisconnected is returned by ServeConn for a connection that Disconnect has ended.
var ErrDisconnected = errors.New("nbd: disconnected by the server")

// Client is a connection, as Server.Clients describes it.
type Client struct {
	Conn     net.Conn // as it was accepted
	Since    time.Time
	Export   string // in full; empty until it is open
	ReadOnly bool   // as the export was opened
	TLS      bool
	Counters Counters
}

// Counters count what a connection has asked for since it began.
type Counters struct {
	Requests     uint64 // all kinds of them, also those that failed
	ReadBytes    uint64 // of READ requests
	WrittenBytes uint64 // of WRITE requests
	Errors       uint64 // requests that were answered with an error
}

// counters are Counters at work. The receiver alone changes all but errors.
type counters struct{ requests, read, written, errors atomic.Uint64 }

func (c *counters) now() Counters {
	return Counters{Requests: c.requests.Load(), ReadBytes: c.read.Load(), WrittenBytes: c.written.Load(), Errors: c.errors.Load()}
}

// count counts a request. One goroutine calls it.
func (c *counters) count(req request) {
	c.requests.Store(c.requests.Load() + 1)
	switch req.typ {
	case cmdRead:
		c.read.Store(c.read.Load() + req.length)
	case cmdWrite:
		c.written.Store(c.written.Load() + req.length)
	}
}

// uncount takes back a count.
func (c *counters) uncount(req request) {
	c.requests.Store(c.requests.Load() - 1)
	if req.typ == cmdWrite {
		c.written.Store(c.written.Load() - req.length)
	}
}

func (c *counters) set(to Counters) {
	c.requests.Store(to.Requests)
	c.read.Store(to.ReadBytes)
	c.written.Store(to.WrittenBytes)
	c.errors.Store(to.Errors)
}

// Clients describes the connections that are served, in no order.
func (s *Server) Clients() []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Client, 0, len(s.conns))
	for nc, x := range s.conns {
		if x.refused {
			continue
		}
		c := Client{Conn: nc, Since: x.since}
		if x.conn != nil {
			c.Export, c.ReadOnly = cmp.Or(x.conn.export.Name, x.conn.name), x.conn.export.ReadOnly
			c.TLS, c.Counters = x.conn.out.secure != nil, x.conn.counters.now()
		}
		list = append(list, c)
	}
	return list
}

// Disconnect ends a connection that Clients has named, as Shutdown ends all: nothing more is received from it, what is
// under way is finished and answered, and then it is closed. If ctx ends before that, it is cut off, and the error wraps
// ctx's. It returns nil when the connection has ended, or if there is none.
func (s *Server) Disconnect(ctx context.Context, nc net.Conn) error {
	s.mu.Lock()
	x := s.conns[nc]
	if x == nil {
		s.mu.Unlock()
		return nil
	}
	x.disconnected = true
	c := x.conn
	if c != nil {
		c.ending.finish()
		_ = nc.SetReadDeadline(time.Unix(1, 0)) // fails only where nc is closed
	} else {
		nc.Close() // it has asked for nothing that could be finished
	}
	s.mu.Unlock()
	if s.awaitEnd(ctx, nc) {
		return nil
	}
	if c != nil {
		c.cut()
	}
	bounded, cancel := context.WithTimeout(context.Background(), cutTimeout)
	defer cancel()
	if !s.awaitEnd(bounded, nc) {
		return fmt.Errorf("nbd: a connection waits for its device and was given up: %w", ctx.Err())
	}
	return fmt.Errorf("nbd: a client took no replies and was cut off: %w", ctx.Err())
}

// awaitEnd waits until a connection has ended or ctx has, and reports whether the connection has.
func (s *Server) awaitEnd(ctx context.Context, nc net.Conn) bool {
	defer s.wakeWith(ctx)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.conns[nc] != nil && ctx.Err() == nil {
		s.idle.Wait()
	}
	return s.conns[nc] == nil
}

// wasDisconnected reports whether Disconnect has ended a connection.
func (s *Server) wasDisconnected(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.conns[nc]
	return x != nil && x.disconnected
}

// wakeWith wakes those who wait for idle when ctx ends, until the returned function is called.
func (s *Server) wakeWith(ctx context.Context) func() bool {
	return context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.idle.Broadcast()
	})
}
