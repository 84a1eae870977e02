package nbd

import (
	"io"
	"net"
	"syscall"
)

// inputSize is how much one read of the socket can bring. It holds a small write's payload whole.
const inputSize = 128 << 10

// input buffers what is received. It is used by the receiver alone.
type input struct {
	buf  *buffer // nil where nothing is buffered and none is needed
	r, w int     // buf.b[r:w] is received and not yet used

	conn net.Conn
	// idle is called before a read has to wait, so that nothing is held back while the client may
	// be waiting for it. It may wait, and may close the connection.
	idle func()

	// raw, where conn has it, reads without waiting first: only then is it known that a read waits.
	// recv is made once, so that a read allocates nothing; the fields after it are its arguments and
	// results. While raw calls recv, the connection cannot be closed: Close waits. So recv makes a system
	// call that does not wait, and does nothing else.
	raw     syscall.RawConn
	recv    func(fd uintptr) bool
	dst     []byte // nil: the buffer
	patient bool   // wait, rather than return with nothing
	nothing bool   // there is nothing to be read
	n       int
	err     error
}

func newInput(conn net.Conn, idle func()) *input {
	in := &input{conn: conn, idle: idle}
	in.recv = in.tryRecv
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			in.raw = raw
		}
	}
	return in
}

func (in *input) buffered() int { return in.w - in.r }

// next returns the next n bytes, at most inputSize; they are valid until the next call.
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

// fill makes n bytes buffered. It returns io.EOF where the stream ends at the first of them, and
// io.ErrUnexpectedEOF where it ends after it.
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

// readFull fills p, from the socket directly where it is more than what is buffered.
func (in *input) readFull(p []byte) error {
	n := 0
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
			return err
		}
	}
	return nil
}

// discard skips n bytes.
func (in *input) discard(n int) error {
	for n > 0 {
		b, err := in.next(min(n, inputSize))
		if err != nil {
			return unexpected(err)
		}
		n -= len(b)
	}
	return nil
}

// read reads at least one byte, to p or else behind what is buffered, or returns an error.
func (in *input) read(p []byte) (int, error) {
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

// receive reads what is there, and waits until there is something if it is patient.
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

// tryRecv returns false when nothing is there and the read is patient; the runtime then waits and calls it again.
func (in *input) tryRecv(fd uintptr) bool {
	p := in.dst
	if p == nil {
		p = in.room()
	}
	for {
		n, err := syscall.Read(int(fd), p)
		switch err {
		case nil:
			in.n = n
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			in.nothing = !in.patient
			if in.patient && in.buffered() == 0 {
				in.free() // connections that wait hold none
			}
			return !in.patient
		default:
			in.err = err
			return true
		}
	}
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
