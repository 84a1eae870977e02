package nbd

import (
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"time"
)

// maxUnproven is how many clients may be on their way to TLS at a time. Anybody can get so far. So one more takes the
// place of the client that has been on its way for longest: the others need no longer than a few round trips.
const maxUnproven = 256

// startTLS is the negotiation until TLS has begun. It knows only STARTTLS and ABORT, so nothing that came in the clear,
// where anybody may have put it, counts later. All of it has to be done in the time of one step.
func (n *negotiation) startTLS() error {
	for {
		opt, err := n.readOption()
		switch {
		case err != nil:
			return err
		case opt.id == optAbort:
			_ = n.reply(opt, repAck)
			return errAborted
		case opt.id == optExportName: // it has no error reply
			return fmt.Errorf("%w: EXPORT_NAME without TLS", ErrProtocol)
		case opt.id != optStartTLS:
			err = n.refuse(opt, repErrTLSRequired, "this server needs TLS")
		case len(opt.data) != 0:
			err = n.refuse(opt, repErrInvalid, "STARTTLS takes no data")
		default:
			if err := n.reply(opt, repAck); err != nil {
				return err
			}
			return n.shakeHands()
		}
		if err != nil {
			return err
		}
	}
}

// shakeHands does the TLS handshake. The connection is secure from then on.
func (n *negotiation) shakeHands() error {
	if err := n.within(); err != nil {
		return err
	}
	below := &belowTLS{Conn: n.conn}
	below.in = newInput(n.conn, n.sysRead, func() {})
	c := &secureConn{Conn: tls.Server(below, n.tls), below: below}
	if err := c.Handshake(); err != nil {
		return fmt.Errorf("nbd: TLS handshake: %w", err)
	}
	n.conn, n.by = c, time.Time{}
	return n.proven()
}

// secureConn is a connection with TLS.
type secureConn struct {
	*tls.Conn
	below *belowTLS
}

// belowTLS is the connection that carries TLS. It is read like one without TLS, so the receiver's idle is called before
// a read that has to wait.
type belowTLS struct {
	net.Conn
	in *input
}

// Read is that of net.Conn.
func (b *belowTLS) Read(p []byte) (int, error) { return b.in.read(p) }

// Close closes the connection at once. The Close of crypto/tls may wait for a client that takes nothing.
func (c *secureConn) Close() error { return c.below.Close() }

// bye tells the client that the end of the connection is no attack.
func (c *secureConn) bye() {
	if c.below.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
		_ = c.CloseWrite() // the client may have gone
	}
}

// tlsRecord is the most that fits in a record of TLS.
const tlsRecord = 16 << 10

// writeVec writes the pieces in records that are as large as possible, because each one is a system call.
func (c *secureConn) writeVec(vec [][]byte) error {
	buf := newBuffer(tlsRecord)
	defer buf.free()
	b := buf.b[:0]
	for _, p := range vec {
		for len(p) > 0 {
			if whole := len(p) - len(p)%tlsRecord; len(b) == 0 && whole > 0 {
				if _, err := c.Write(p[:whole]); err != nil {
					return err
				}
				p = p[whole:]
				continue
			}
			n := min(len(p), tlsRecord-len(b))
			b, p = append(b, p[:n]...), p[n:]
			if len(b) < tlsRecord {
				continue
			}
			if _, err := c.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	if len(b) == 0 {
		return nil
	}
	_, err := c.Write(b)
	return err
}

// readTLS is the read of an input above TLS.
func (in *input) readTLS(p []byte) (n int, err error) {
	switch {
	case p != nil:
		n, err = in.conn.Read(p)
	case in.buffered() > 0:
		n, err = in.conn.Read(in.room())
	default:
		// One byte is awaited without a buffer, as waiting connections hold none. The rest of its record follows at once.
		n, err = in.conn.Read(in.first[:])
		copy(in.room(), in.first[:n])
	}
	if n > 0 { // the last bytes come together with io.EOF, which comes again
		err = nil
	}
	return n, err
}

// over makes in the input above TLS. What is below it then waits as in does without TLS.
func (in *input) over(c *secureConn) {
	in.secure = true
	c.below.in.idle = func() {
		in.idle()
		if in.buffered() == 0 {
			in.free()
		}
	}
}

// withTLS returns a server's TLS configuration: at least version 1.2, as the specification wants it.
func withTLS(c *tls.Config) *tls.Config {
	if c == nil {
		return nil
	}
	c = c.Clone()
	c.MinVersion = max(c.MinVersion, tls.VersionTLS12)
	return c
}

// beginTLS counts a client that is on its way to TLS, and may end another one for it. The caller holds s.mu.
func (s *Server) beginTLS(nc net.Conn) {
	if len(s.unproven) >= s.opts.unproven {
		s.unproven[0].Close()
		s.unproven = slices.Delete(s.unproven, 0, 1)
	}
	s.unproven = append(s.unproven, nc)
	s.conns[nc] = newServed(false)
}

// proven admits a client that has begun TLS. It returns what addConn does.
func (s *Server) proven(nc net.Conn) (refuse, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.endTLS(nc) { // another one has its place
		return nil, net.ErrClosed
	}
	delete(s.conns, nc)
	if s.closed {
		s.conns[nc] = newServed(false)
		return nil, nil // its next option is refused
	}
	return s.admit(nc)
}

// endTLS ends beginTLS, and reports whether nc counted still. The caller holds s.mu.
func (s *Server) endTLS(nc net.Conn) bool {
	i := slices.Index(s.unproven, nc)
	if i < 0 {
		return false
	}
	s.unproven = slices.Delete(s.unproven, i, i+1)
	return true
}
