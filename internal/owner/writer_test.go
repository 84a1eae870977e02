package owner

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/nbd"
)

// One client at a time may write to a volume; others read.
func TestOneWriter(t *testing.T) {
	w := newFakeMachine(t)
	o := w.own(true)
	c, shared := &catalog{exports: o.exports}, &catalog{exports: o.exports, shared: true}
	pipe, other := net.Pipe()
	defer pipe.Close()
	defer other.Close()
	a := view{c, t.Context(), client{process: thisProcess()}, nil}
	later := view{c, t.Context(), client{process: process{thisProcess().PID, "b"}}, nil} // with the same number
	b := view{c, t.Context(), client{process: process{2, "a"}}, nil}
	tcp := view{c, t.Context(), client{conn: pipe}, nil}
	tcp2 := view{c, t.Context(), client{conn: other}, nil}
	s := view{shared, t.Context(), client{shared: true}, nil}
	open := func(v view, readOnly bool) *nbd.Export {
		t.Helper()
		info, err := v.Describe("v")
		if err != nil {
			t.Fatal(err)
		}
		e, err := v.Open("v")
		if err != nil {
			t.Fatal(err)
		}
		if e.ReadOnly != readOnly || info.ReadOnly != readOnly || info.NoMultiConn != e.NoMultiConn {
			t.Errorf("%v: read-only %v and as described %v, want %v", v.who, e.ReadOnly, info.ReadOnly, readOnly)
		}
		if e.NoMultiConn != (!readOnly && v.who.conn != nil) {
			t.Errorf("%v: one connection: %v", v.who, e.NoMultiConn)
		}
		if readOnly != strings.Contains(info.Description, "in use for writing by") {
			t.Errorf("%v: %q", v.who, info.Description)
		}
		return e
	}
	closeAll := func(es ...*nbd.Export) {
		t.Helper()
		for _, e := range es {
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, x := range []struct{ writer, reader view }{{a, b}, {a, later}, {a, tcp}, {tcp, tcp2}, {tcp, a}, {a, s}, {s, a}} {
		first, second := open(x.writer, false), open(x.reader, true)
		again := open(x.writer, false) // it connects again, while its old connection is not known to be dead
		closeAll(first)
		closeAll(open(x.reader, true), again)
		closeAll(open(x.reader, false), second)
	}
	first, second := open(s, false), open(s, false)
	infos, err := c.ListInfo()
	if err != nil || !strings.HasSuffix(infos[0].Description, "by a client of a shared service") {
		t.Errorf("listed: %+v %v", infos, err)
	}
	closeAll(first, second)

	// A block device is a writer, too.
	first = open(a, false)
	if _, err := o.Attach(t.Context(), AttachOptions{Ref: cow.Ref{Volume: "v"}}); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "NBD client") {
		t.Errorf("attaching what an NBD client writes to: %v", err)
	}
	closeAll(first)
	w.attach(o, "v")
	closeAll(open(a, true), open(tcp, true))
	if infos, err := c.ListInfo(); err != nil || !strings.Contains(infos[0].Description, "by /dev/ublkb") {
		t.Errorf("listed: %+v %v", infos, err)
	}
	if _, err := s.Open("v"); !errors.Is(err, cow.ErrBusy) || !strings.Contains(err.Error(), "is attached as") {
		t.Errorf("a client of a shared service: %v", err)
	}
}

// TestWriterLivesOn: the process that made a connection has ended, and the connection lives, as that of nbd-client, which
// the kernel has. Nobody else becomes the writer before the connection ends.
func TestWriterLivesOn(t *testing.T) {
	o := offer(t, newStore(t))
	c := &catalog{exports: o.exports}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	peer, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ended := view{c, t.Context(), client{process: process{1 << 30, "a"}}, server}
	other := view{c, t.Context(), client{process: thisProcess()}, nil}
	open := func(v view, readOnly bool) *nbd.Export {
		t.Helper()
		e, err := v.Open("v")
		if err != nil {
			t.Fatal(err)
		}
		if e.ReadOnly != readOnly {
			t.Errorf("%v: read-only: %t", v.who, e.ReadOnly)
		}
		return e
	}
	first, again := open(ended, false), open(ended, false)
	second := open(other, true)
	if err := errors.Join(again.Close(), second.Close()); err != nil {
		t.Fatal(err)
	}
	second = open(other, true)
	_ = peer.Close()
	third := open(other, false)
	if err := errors.Join(first.Close(), second.Close(), third.Close()); err != nil {
		t.Fatal(err)
	}
}

// A process is known by all of its connections to a Unix socket.
func TestClientIsAProcess(t *testing.T) {
	o := offer(t, newStore(t))
	path, end := serving(t, o, ServeOptions{})
	a, refusal := openNBD(t, path, "v")
	b, refusal2 := openNBD(t, path, "v")
	if refusal+refusal2 != "" {
		t.Fatal(refusal, refusal2)
	}
	for _, c := range []nbdClient{a, b} {
		if errno := c.request(nbdWrite, 0, 4096, strings.Repeat("x", 4096)); errno != 0 {
			t.Errorf("errno %d", errno)
		}
	}
	if w := o.exports.writers("v")["v"]; w != (client{process: thisProcess()}) {
		t.Errorf("%v writes", w)
	}
	_ = a.Close()
	_ = b.Close()
	if err := end(); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
