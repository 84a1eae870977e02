// Package nbdclient is a small NBD client for tests that run a server from outside, with simple replies and any number
// of requests in flight. Numbers: the protocol's doc/proto.md, "Values".
package nbdclient

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	nbdMagic      = 0x4e42444d41474943 // "NBDMAGIC"
	optMagic      = 0x49484156454f5054 // "IHAVEOPT"
	requestMagic  = 0x25609513
	replyMagic    = 0x67446698
	optExportName = 1
	cmdRead       = 0
	cmdWrite      = 1
	cmdDisconnect = 2
	cmdFlush      = 3
	cmdTrim       = 4
	cmdZeroes     = 6
	fixedNoZeroes = 3
	flagReadOnly  = 1 << 1
	flagSendFlush = 1 << 2
)

// Flags of a request.
const (
	FUA    = 1 << 0 // the change is durable when it is answered
	NoHole = 1 << 1 // zeros take their space
)

// Errno is the error that a server answered a request with. Every other error means that the connection is lost.
type Errno struct{ syscall.Errno }

func (e Errno) Error() string { return "server's error: " + e.Errno.Error() }

// Unwrap makes an Errno match its number.
func (e Errno) Unwrap() error { return e.Errno }

// Client is a connection to an export. Its methods may be called concurrently, until one of those that end it. Each
// call is one request in flight.
type Client struct {
	c        net.Conn
	r        *bufio.Reader // used by receive only, after the handshake
	size     int64
	readOnly bool

	// Patience limits how long a request may take; 0: for ever. After that the connection is lost.
	Patience time.Duration

	sendMu sync.Mutex // a request is sent whole

	mu    sync.Mutex // guards the fields below
	last  uint64     // cookie
	calls map[uint64]call
	lost  error // why there are no more answers
}

// call is a request that waits for its answer.
type call struct {
	in   []byte // the place of what is read
	done chan<- error
}

// Dial opens an export of the server at a Unix socket.
func Dial(socket, export string) (*Client, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	return Over(c, export)
}

// Over is Dial over a connection that was made.
func Over(c net.Conn, export string) (*Client, error) {
	d := &Client{c: c, r: bufio.NewReaderSize(c, 128<<10), calls: map[uint64]call{}}
	if err := d.handshake(export); err != nil {
		c.Close()
		return nil, fmt.Errorf("handshake: %w", err)
	}
	go d.receive()
	return d, nil
}

func (d *Client) handshake(export string) error {
	var hello [18]byte
	if _, err := io.ReadFull(d.r, hello[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint64(hello[:]) != nbdMagic || binary.BigEndian.Uint64(hello[8:]) != optMagic {
		return fmt.Errorf("greeting %x", hello)
	}
	b := binary.BigEndian.AppendUint32(nil, fixedNoZeroes)
	b = binary.BigEndian.AppendUint64(b, optMagic)
	b = binary.BigEndian.AppendUint32(b, optExportName)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	if _, err := d.c.Write(append(b, export...)); err != nil {
		return err
	}
	var info [10]byte
	if _, err := io.ReadFull(d.r, info[:]); err != nil {
		return err
	}
	d.size = int64(binary.BigEndian.Uint64(info[:]))
	flags := binary.BigEndian.Uint16(info[8:])
	d.readOnly = flags&flagReadOnly != 0
	if !d.readOnly && flags&flagSendFlush == 0 {
		return fmt.Errorf("transmission flags %x: no flush", flags)
	}
	return nil
}

// Size returns the size of the export when it was opened.
func (d *Client) Size() int64 { return d.size }

// ReadOnly reports whether the export takes no writes.
func (d *Client) ReadOnly() bool { return d.readOnly }

// send sends one request, with the payload of a write.
func (d *Client) send(cmd, flags uint16, cookie uint64, off int64, n int, out []byte) error {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28+len(out)), requestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	d.sendMu.Lock()
	defer d.sendMu.Unlock()
	_, err := d.c.Write(append(b, out...))
	return err
}

// request sends one request and waits for its reply.
func (d *Client) request(cmd, flags uint16, off int64, n int, out, in []byte) error {
	if cmd == cmdDisconnect {
		return d.send(cmd, flags, 0, off, n, out)
	}
	done := make(chan error, 1)
	d.mu.Lock()
	if d.lost != nil {
		defer d.mu.Unlock()
		return d.lost
	}
	d.last++
	cookie := d.last
	d.calls[cookie] = call{in, done}
	d.mu.Unlock()
	if d.Patience > 0 {
		defer time.AfterFunc(d.Patience, func() { d.lose(os.ErrDeadlineExceeded) }).Stop()
	}
	if err := d.send(cmd, flags, cookie, off, n, out); err != nil {
		d.lose(err)
	}
	return <-done
}

// lose ends the connection, and all requests that wait.
func (d *Client) lose(err error) {
	d.c.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost == nil {
		d.lost = fmt.Errorf("the connection was lost: %w", err)
	}
	for _, c := range d.calls {
		c.done <- d.lost
	}
	clear(d.calls)
}

// receive hands replies to the requests that wait, until the connection is lost.
func (d *Client) receive() {
	for {
		if err := d.reply(); err != nil {
			d.lose(err)
			return
		}
	}
}

// reply receives one reply.
func (d *Client) reply() error {
	var head [16]byte
	if _, err := io.ReadFull(d.r, head[:]); err != nil {
		return err
	}
	cookie := binary.BigEndian.Uint64(head[8:])
	d.mu.Lock()
	c, ok := d.calls[cookie]
	d.mu.Unlock()
	if binary.BigEndian.Uint32(head[:]) != replyMagic || !ok {
		return fmt.Errorf("reply %x", head)
	}
	var result error
	data := make([]byte, len(c.in)) // c.in is not ours any more if the connection is lost meanwhile
	if e := binary.BigEndian.Uint32(head[4:]); e != 0 {
		result = Errno{syscall.Errno(e)}
	} else if _, err := io.ReadFull(d.r, data); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.calls[cookie]; ok {
		copy(c.in, data)
		delete(d.calls, cookie)
		c.done <- result
	}
	return nil
}

// ReadAt fills p.
func (d *Client) ReadAt(p []byte, off int64) (int, error) {
	return len(p), d.request(cmdRead, 0, off, len(p), nil, p)
}

// WriteAt writes p.
func (d *Client) WriteAt(p []byte, off int64) (int, error) { return len(p), d.Write(p, off, 0) }

// Write writes p, with flags: 0 or FUA.
func (d *Client) Write(p []byte, off int64, flags uint16) error {
	return d.request(cmdWrite, flags, off, len(p), p, nil)
}

// Trim says that the range is no longer needed.
func (d *Client) Trim(off, n int64, flags uint16) error {
	return d.request(cmdTrim, flags, off, int(n), nil, nil)
}

// Zero makes the range read as zeros.
func (d *Client) Zero(off, n int64, flags uint16) error {
	return d.request(cmdZeroes, flags, off, int(n), nil, nil)
}

// Sync is a flush.
func (d *Client) Sync() error { return d.request(cmdFlush, 0, 0, 0, nil, nil) }

// Desert sends a write, and goes away without its answer. With half of the payload the server has nothing to do.
func (d *Client) Desert(p []byte, off int64, half bool) error {
	n := len(p)
	if half {
		p = p[:n/2]
	}
	err := d.send(cmdWrite, 0, 0, off, n, p)
	d.c.Close()
	return err
}

// Abort goes away without a word.
func (d *Client) Abort() { d.c.Close() }

// Close says goodbye and goes away.
func (d *Client) Close() error {
	_ = d.request(cmdDisconnect, 0, 0, 0, nil, nil)         // a server that is gone is no error here
	if err := d.c.Close(); !errors.Is(err, net.ErrClosed) { // receive closes it when the server has gone
		return err
	}
	return nil
}
