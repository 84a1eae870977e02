package nbd

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// packet is the bytes of one or more replies, and what they hold until they are sent. The sender owns a packet that it
// was given.
type packet struct {
	vec    [][]byte // the bytes, in pieces of head and buf
	head   []byte   // headers
	buf    *buffer  // freed when sent; may be nil
	charge int64    // released to the budget when sent

	sent chan<- struct{} // gets a value when p was sent or dropped; may be nil; must have room
}

// Bytes of room for headers in a pooled packet: the initial room for one header, and the most that is kept, which is
// enough for the chunks of a READ.
const pooledHead, maxPooledHead = 64, maxPieces * offsetHoleLen

var packetPool = sync.Pool{New: func() any { return &packet{head: make([]byte, 0, pooledHead)} }}

func newPacket(charge int64) *packet {
	p := packetPool.Get().(*packet)
	p.charge = charge
	return p
}

// reset empties p, but keeps its charge.
func (p *packet) reset() {
	if p.buf != nil {
		p.buf.free()
		p.buf = nil
	}
	clear(p.vec)
	p.vec, p.head = p.vec[:0], p.head[:0]
	if cap(p.head) > maxPooledHead { // made for many flushes; too large to keep
		p.head = make([]byte, 0, pooledHead)
	}
}

// sealHead makes the vector of a packet that consists only of headers.
func (p *packet) sealHead() *packet {
	p.vec = append(p.vec, p.head)
	return p
}

// sender writes packets to the socket, several at once if they come faster than they can be written.
type sender struct {
	conn   net.Conn
	secure *secureConn // conn, or nil
	budget *budget

	mu    sync.Mutex // guards the fields below; not held while writing
	queue []*packet  // waiting to be written
	spare []*packet  // empty slice that replaces queue when the writer takes it
	busy  bool       // a goroutine is writing, and will also write queue

	// failed is set after a write has failed: the connection is closed, packets are dropped, and executing further
	// requests would be pointless.
	failed atomic.Bool

	// pausing is the connection's. What cannot be sent while it is set is kept in unsent, for the next server.
	pausing *atomic.Bool

	// since is the start of the current write, in nanoseconds of Unix time; 0 if none is under way.
	since atomic.Int64

	// The goroutine that set busy owns these fields.
	err    error // why failed is set; written before failed
	kept   bool  // unsent has been begun: nothing more is written
	unsent []byte
	vec    net.Buffers // used up by a write
	store  net.Buffers // the whole slice of vec, for reuse
}

// send queues p. Unless another goroutine is writing, it writes p and everything that is queued meanwhile.
func (s *sender) send(p *packet) {
	s.mu.Lock()
	s.queue = append(s.queue, p)
	if s.busy {
		s.mu.Unlock()
		return
	}
	s.busy = true
	for len(s.queue) > 0 {
		taken := s.queue
		s.queue = s.spare[:0]
		s.mu.Unlock()
		s.write(taken)
		s.mu.Lock()
		s.spare = taken
	}
	s.busy = false
	s.mu.Unlock()
}

// write writes packets, or drops them if the connection is broken, and releases what they hold.
func (s *sender) write(packets []*packet) {
	if !s.failed.Load() {
		s.vec = s.store[:0]
		for _, p := range packets {
			s.vec = append(s.vec, p.vec...)
		}
		s.store = s.vec
		err := s.writeVec()
		if err != nil {
			err = s.keepUnsent(err)
		}
		if err != nil {
			s.err = fmt.Errorf("nbd: send: %w", err)
			s.failed.Store(true)
			s.conn.Close() // wakes the receiver
		}
		clear(s.store)
	}
	for i, p := range packets {
		packets[i] = nil
		s.budget.release(p.charge)
		sent := p.sent
		p.reset()
		p.sent = nil
		packetPool.Put(p)
		if sent != nil {
			sent <- struct{}{}
		}
	}
}

func (s *sender) writeVec() error {
	if s.kept {
		return errPaused
	}
	s.since.Store(time.Now().UnixNano())
	defer s.since.Store(0)
	if len(s.vec) == 1 {
		n, err := s.conn.Write(s.vec[0])
		s.vec[0] = s.vec[0][n:]
		return err
	}
	if s.secure != nil {
		return s.secure.writeVec(s.vec)
	}
	_, err := s.vec.WriteTo(s.conn)
	return err
}
