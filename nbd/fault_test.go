package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// allFaults reports whether the tests of faults run at their long size: every call, with every kind of fault.
func allFaults() bool { return os.Getenv("VDISK_FAULTS") == "all" }

// socketFault is what happens at one call of a connection.
type socketFault struct {
	name string
	err  error // of the call; nil: the call is done, or as do says
	part bool  // half of a write is done before it fails

	// harmless reports whether the client may not notice: for reads by system call, and for other calls.
	harmlessRaw, harmless bool

	may []error // that the connection may end with, besides err
}

var goneErrors = []error{nil, syscall.EPIPE, syscall.ECONNRESET, io.ErrUnexpectedEOF}

var socketFaults = []socketFault{
	{name: "short", harmlessRaw: true, harmless: true},
	{name: "slow", harmlessRaw: true, harmless: true},
	{name: "EINTR", err: syscall.EINTR, harmlessRaw: true},
	{name: "EAGAIN", err: syscall.EAGAIN, harmlessRaw: true},
	{name: "ECONNRESET", err: syscall.ECONNRESET},
	{name: "EPIPE", err: syscall.EPIPE},
	{name: "ETIMEDOUT", err: syscall.ETIMEDOUT},
	{name: "EIO", err: syscall.EIO},
	{name: "ENOMEM after a part", err: syscall.ENOMEM, part: true},
	{name: "end", err: io.EOF, may: []error{nil, io.ErrUnexpectedEOF}},
	{name: "closed", may: []error{nil, net.ErrClosed}},
	{name: "gone", may: goneErrors},
}

// faultPoint counts the calls of one connection, and makes the nth fail.
type faultPoint struct {
	socketFault
	nth    int
	server *Server
	nc     net.Conn // as the server has it
	peer   net.Conn

	mu       sync.Mutex // guards what follows
	calls    int
	fired    bool
	raw      bool // it was a read by system call
	lastNone bool // the last of those found nothing, so the next one waits
	conn     *conn
}

// hit counts a call and reports whether it is the one.
func (f *faultPoint) hit(raw bool) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.fired || f.calls < f.nth || raw && f.err == syscall.EAGAIN && f.lastNone {
		return false // a read that waits has been told that there is something
	}
	f.fired, f.raw = true, raw
	f.server.mu.Lock()
	if c := f.server.conns[f.nc]; c != nil {
		f.conn = c.conn
	}
	f.server.mu.Unlock()
	return true
}

// read does or fails a read.
func (f *faultPoint) read(p []byte, raw bool, do func([]byte) (int, error)) (int, error) {
	if len(p) == 0 || !f.hit(raw) {
		return do(p)
	}
	if !f.begin() {
		return do(p[:1])
	}
	if raw && f.err == io.EOF {
		return 0, nil
	}
	if f.err != nil {
		return 0, f.err
	}
	return do(p)
}

// begin does what happens before the call. It reports whether all of the call is to be done.
func (f *faultPoint) begin() bool {
	switch f.name {
	case "short":
		return false
	case "slow":
		time.Sleep(2 * time.Millisecond)
	case "closed":
		closed := make(chan struct{})
		go func() { f.nc.Close(); close(closed) }() // waits for the present system call, if there is one
		select {
		case <-closed:
		case <-time.After(time.Millisecond):
		}
	case "gone":
		f.peer.Close()
	}
	return true
}

// faultyConn is the victim's connection as the server has it.
type faultyConn struct {
	*net.UnixConn
	*faultPoint
}

func (c *faultyConn) Read(p []byte) (int, error) { return c.read(p, false, c.UnixConn.Read) }

func (c *faultyConn) Write(p []byte) (int, error) {
	if !c.hit(false) {
		return c.UnixConn.Write(p)
	}
	n := 0
	if !c.begin() || c.part {
		var err error
		if n, err = c.UnixConn.Write(p[:(len(p)+1)/2]); err != nil {
			return n, err
		}
	}
	if c.err == io.EOF {
		return n, syscall.EPIPE
	}
	if c.err != nil {
		return n, c.err
	}
	k, err := c.UnixConn.Write(p[n:])
	return n + k, err
}

// socketKind is a kind of connection.
type socketKind int

const (
	rawSocket   socketKind = iota // the receiver makes system calls
	plainConn                     // the receiver calls Read
	tightSocket                   // as rawSocket, and every send of the kernel is short
	socketKinds
)

// socketRuns runs the script with a fault at every call, or at some.
type socketRuns struct {
	*faultServer
	fd    int // the victim's
	point *faultPoint
	mu    sync.Mutex // guards fd and point
	count int
}

// sysRead is read(2) of the server.
func (s *socketRuns) sysRead(fd int, p []byte) (int, error) {
	s.mu.Lock()
	point := s.point
	if fd != s.fd {
		point = nil
	}
	s.mu.Unlock()
	do := func(p []byte) (int, error) { return syscall.Read(fd, p) }
	if point == nil {
		return do(p)
	}
	n, err := point.read(p, true, do)
	point.mu.Lock()
	point.lastNone = err == syscall.EAGAIN
	point.mu.Unlock()
	return n, err
}

// TestFaultAtEverySocketCall: the nth call of a connection's socket is short, fails, or comes late, for every n, in the
// negotiation and with many requests in flight. VDISK_FAULTS=all runs every n with every kind of fault; otherwise each
// kind of fault gets some.
func TestFaultAtEverySocketCall(t *testing.T) {
	disk := newFaultDevice()
	s := &socketRuns{fd: -1}
	s.faultServer = newFaultServer(t, disk, func() Device { return disk }, Options{read: s.sysRead, Workers: 8})
	seed := int(time.Now().UnixNano() >> 10 & 0xffff)
	t.Logf("seed %d", seed)
	for kind := range socketKinds {
		for _, how := range handshakes {
			for i, fault := range socketFaults {
				step, first := 1, 1
				if !allFaults() { // each call is hit by some fault, and a read by system call by EINTR and EAGAIN
					step = 2 * len(socketFaults)
					if kind == rawSocket && fault.err != nil && fault.harmlessRaw {
						step = 5
					}
					if testing.Short() {
						step *= 5
					}
					first = 1 + (seed+i+int(kind)*len(socketFaults))%step
				}
				for nth := first; s.run(t, kind, how, fault, nth); nth += step {
					s.count++
				}
				if t.Failed() {
					return
				}
			}
		}
	}
	s.other.disconnect()
	t.Logf("proof: faults on NBD sockets: %d", s.count)
}

// run runs the script once, and reports whether the fault came.
func (s *socketRuns) run(t *testing.T, kind socketKind, how handshake, fault socketFault, nth int) bool {
	t.Helper()
	s.disk.reset()
	client, server := connPair(t)
	v := &victim{Conn: client, disk: s.disk, how: how, slow: kind == tightSocket}
	point := &faultPoint{socketFault: fault, nth: nth, server: s.Server, peer: client}
	var nc net.Conn = &faultyConn{server, point}
	switch kind {
	case plainConn:
		nc = struct{ net.Conn }{nc} // without the system call
	case tightSocket:
		_ = server.SetWriteBuffer(1)
		nc = server
	}
	point.nc = nc
	s.begin(t, server, point)
	served, ended := make(chan error, 1), make(chan bool, 1)
	go func() { served <- s.ServeConn(context.Background(), nc) }()
	go func() { ended <- v.run() }()
	s.goesOn(t, nth)
	whole := testwatch.Wait(t, testwatch.Long, "the client", ended)
	err := testwatch.Wait(t, testwatch.Long, "the connection", served)
	s.goesOn(t, nth+1)
	s.begin(t, nil, nil)
	point.mu.Lock()
	fired, raw, c := point.fired, point.raw, point.conn
	point.mu.Unlock()
	v.check(t)
	s.nothingLeft(t, c)
	harmless := !fired || raw && fault.harmlessRaw || !raw && fault.harmless
	switch {
	case harmless && (!whole || err != nil):
		t.Errorf("the connection ended with %v after %d of %d replies", err, len(v.got), len(v.script))
	case !harmless && !s.mayEnd(fault, how, err):
		t.Errorf("the connection ended with %v", err)
	}
	if harmless {
		for _, r := range v.script {
			if errno, ok := v.got[r.cookie]; !how.abort && (!ok || errno != r.errno) {
				t.Errorf("request %d: error %d (answered: %v), want %d", r.cookie, errno, ok, r.errno)
			}
		}
	}
	if t.Failed() {
		t.Fatalf("%s at call %d (of %d), %s, socket kind %d, by system call: %v", fault.name, nth, point.calls, how.name, kind, raw)
	}
	return fired
}

// begin tells sysRead which socket is the victim's.
func (s *socketRuns) begin(t *testing.T, server *net.UnixConn, point *faultPoint) {
	t.Helper()
	fd := -1
	if server != nil {
		raw, err := server.SyscallConn()
		if err == nil {
			err = raw.Control(func(f uintptr) { fd = int(f) })
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fd, s.point = fd, point
}

// mayEnd reports whether a connection may end with err because of a fault.
func (s *socketRuns) mayEnd(fault socketFault, how handshake, err error) bool {
	if fault.err != nil && errors.Is(err, fault.err) || how.abort && err == nil {
		return true
	}
	if fault.err == io.EOF && errors.Is(err, syscall.EPIPE) {
		return true
	}
	return slices.ContainsFunc(fault.may, func(e error) bool { return e == nil && err == nil || e != nil && errors.Is(err, e) })
}
