package nbd

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// inputSize is how much one read of the socket can bring. A small write's payload fits in it.
const inputSize = 128 << 10

// input buffers received bytes. Only the receiver uses it.
type input struct {
	buf  *buffer // nil if nothing is buffered and no buffer is needed
	r, w int     // buf.b[r:w] has been received and not used yet

	before []byte // what was received before, by another server; it comes first
	conn   net.Conn
	secure bool    // conn has TLS, and calls idle itself
	first  [1]byte // see readTLS
	// idle is called before a read that has to wait, so that no reply is held back while the client may be waiting for
	// it. idle may wait, and may close the connection.
	idle func()

	// raw, if conn has one, reads without waiting first, because only that shows whether a read has to wait. recv is
	// made once, so that a read allocates nothing; the fields after it are its arguments and results. While raw calls
	// recv, the connection cannot be closed, because Close waits. So recv makes one system call that does not wait, and
	// does nothing else.
	raw     syscall.RawConn
	recv    func(fd uintptr) bool
	sysRead func(fd int, p []byte) (int, error) // read(2)
	dst     []byte                              // nil: read into the buffer
	patient bool                                // wait instead of returning with nothing
	nothing bool                                // nothing is there to be read
	n       int
	err     error
}

func newInput(conn net.Conn, sysRead func(fd int, p []byte) (int, error), idle func()) *input {
	in := &input{conn: conn, sysRead: sysRead, idle: idle}
	in.recv = in.tryRecv
	if c, ok := conn.(*secureConn); ok {
		in.over(c)
		return in
	}
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			in.raw = raw
		}
	}
	return in
}

func (in *input) buffered() int { return in.w - in.r }

// next returns the next n bytes, at most inputSize. They are valid until the next call.
func (in *input) next(n int) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	if in.buffered() < n {
		if err := in.fill(n); err != nil {
			return nil, err
		}
	}
	b := in.buf.b[in.r : in.r+n]
	in.r += n
	return b, nil
}

// fill reads until n bytes are buffered. It returns io.EOF if the stream ends before the first of them, and
// io.ErrUnexpectedEOF if it ends after that.
func (in *input) fill(n int) error {
	if in.r == in.w {
		in.r, in.w = 0, 0
	} else if in.r+n > len(in.buf.b) {
		in.w = copy(in.buf.b, in.buf.b[in.r:in.w])
		in.r = 0
	}
	for in.buffered() < n {
		got, err := in.read(nil)
		in.w += got
		if err == io.EOF && in.buffered() > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readFull fills p. It reads bytes that are not buffered directly from the socket. It returns how much it has filled.
func (in *input) readFull(p []byte) (n int, err error) {
	if in.buffered() > 0 {
		n = copy(p, in.buf.b[in.r:in.w])
		in.r += n
	}
	for n < len(p) {
		got, err := in.read(p[n:])
		n += got
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// discard skips n bytes. It returns how many it has skipped.
func (in *input) discard(n int) (skipped int, err error) {
	for skipped < n {
		b, err := in.next(min(n-skipped, inputSize))
		if err != nil {
			return skipped, unexpected(err)
		}
		skipped += len(b)
	}
	return skipped, nil
}

// read reads at least one byte, into p or, if p is nil, into the buffer, or returns an error.
func (in *input) read(p []byte) (int, error) {
	if len(in.before) > 0 {
		return in.readBefore(p), nil
	}
	if in.secure {
		return in.readTLS(p)
	}
	if in.raw == nil {
		in.idle()
		if p == nil {
			p = in.room()
		}
		return in.conn.Read(p)
	}
	n, err := in.receive(p, false)
	if in.nothing {
		in.idle()
		n, err = in.receive(p, true)
	}
	return n, err
}

// receive reads what is there. If it is patient, it waits until there is something.
func (in *input) receive(p []byte, patient bool) (int, error) {
	in.dst, in.patient, in.nothing, in.n, in.err = p, patient, false, 0, nil
	err := in.raw.Read(in.recv)
	in.dst = nil
	switch {
	case err != nil: // closed, or past the deadline
		in.nothing = false
		return 0, err
	case in.err != nil:
		return 0, in.err
	case in.n == 0 && !in.nothing:
		return 0, io.EOF
	}
	return in.n, nil
}

// tryRecv returns false if nothing is there and the read is patient. The runtime then waits, and calls it again.
func (in *input) tryRecv(fd uintptr) bool {
	p := in.dst
	if p == nil {
		p = in.room()
	}
	for {
		n, err := in.sysRead(int(fd), p)
		switch err {
		case nil:
			in.n = n
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			in.nothing = !in.patient
			if in.patient && in.buffered() == 0 {
				in.free() // waiting connections hold no buffer
			}
			return !in.patient
		default:
			in.err = err
			return true
		}
	}
}

// ended reports whether the client sends nothing more, although there may still be something to be received. It is false
// if that cannot be seen.
func (in *input) ended() bool {
	raw := in.raw
	if c, ok := in.conn.(*secureConn); ok {
		raw = c.below.in.raw
	}
	if raw == nil {
		return false
	}
	p := []unix.PollFd{{Events: unix.POLLRDHUP}}
	err := raw.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p, 0) // if it fails, nothing is seen
	})
	return err == nil && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}

// room returns the free part of the buffer.
func (in *input) room() []byte {
	if in.buf == nil {
		in.buf, in.r, in.w = newBuffer(inputSize), 0, 0
	}
	return in.buf.b[in.w:]
}

func (in *input) free() {
	if in.buf != nil {
		in.buf.free()
		in.buf, in.r, in.w = nil, 0, 0
	}
}
