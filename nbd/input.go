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
	buf  *buffer
	r, w int // buf.b[r:w] is received and not yet used

	conn net.Conn
	// idle is called before a read has to wait, so that nothing is held back while the client may
	// be waiting for it.
	idle func()

	// raw, where conn has it, reads without waiting first: only then is it known that a read waits.
	// recv is made once, so that a read allocates nothing; dst, n and err are its arguments and
	// results.
	raw  syscall.RawConn
	recv func(fd uintptr) bool
	dst  []byte
	n    int
	err  error
}

func newInput(conn net.Conn, idle func()) *input {
	in := &input{buf: newBuffer(inputSize), conn: conn, idle: idle}
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
		got, err := in.read(in.buf.b[in.w:])
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
	n := copy(p, in.buf.b[in.r:in.w])
	in.r += n
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
			return err
		}
		n -= len(b)
	}
	return nil
}

// read reads at least one byte, or returns an error.
func (in *input) read(p []byte) (int, error) {
	if in.raw == nil {
		in.idle()
		return in.conn.Read(p)
	}
	in.dst, in.n, in.err = p, 0, nil
	err := in.raw.Read(in.recv)
	in.dst = nil
	switch {
	case err != nil: // closed, or past the deadline
		return 0, err
	case in.err != nil:
		return 0, in.err
	case in.n == 0:
		return 0, io.EOF
	}
	return in.n, nil
}

// tryRecv returns false when nothing is there; the runtime then waits and calls it again.
func (in *input) tryRecv(fd uintptr) bool {
	for {
		n, err := syscall.Read(int(fd), in.dst)
		switch err {
		case nil:
			in.n = n
			return true
		case syscall.EINTR:
		case syscall.EAGAIN:
			in.idle()
			return false
		default:
			in.err = err
			return true
		}
	}
}

func (in *input) free() {
	in.buf.free()
	in.buf = nil
}
