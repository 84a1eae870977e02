package nbd

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// Clients lists connections with what they opened and asked for. Disconnect ends one of them: its request under way is
// answered, and the others go on.
func TestClientsAndDisconnect(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	c, s := dialServer(t, serveRAM(d), Options{})
	c.open("disk", false)
	other, greeted := connect(t, s), connect(t, s)
	other.open("disk", false)
	greeted.greet(3)
	greeted.option(optStructuredReply)
	greeted.wantOptReply(optStructuredReply, repAck)
	c.request(0, cmdWrite, 1, 0, 4096, pattern(4096, 1))
	c.reply(0)
	c.request(0, cmdRead, 2, 0, 8192)
	c.reply(8192)
	c.request(0, cmdTrim, 3, 1<<20, 4096) // behind the end
	c.reply(0)
	var busy, opening *Client
	for _, x := range s.Clients() {
		switch {
		case x.Counters.Requests == 3:
			busy = &x
		case x.Export == "":
			opening = &x
		}
	}
	if busy == nil || opening == nil || len(s.Clients()) != 3 {
		t.Fatalf("%+v", s.Clients())
	}
	if want := (Counters{Requests: 3, ReadBytes: 8192, WrittenBytes: 4096, Errors: 1}); busy.Counters != want || busy.Export != "disk" || busy.ReadOnly || busy.TLS || busy.Since.IsZero() {
		t.Errorf("%+v, want %+v", busy, want)
	}
	d.onRead = func([]byte, int64) error { close(entered); <-release; return nil }
	c.request(0, cmdRead, 4, 0, 1<<19)
	<-entered
	ended := make(chan error, 1)
	go func() { ended <- s.Disconnect(context.Background(), busy.Conn) }()
	if err := s.Disconnect(context.Background(), opening.Conn); err != nil {
		t.Error(err)
	}
	if err := greeted.hungUp(); !errors.Is(err, ErrDisconnected) {
		t.Errorf("the one that had opened nothing: %v", err)
	}
	for !s.wasDisconnected(busy.Conn) {
		time.Sleep(time.Millisecond)
	}
	close(release)
	if r := c.reply(1 << 19); r.cookie != 4 || r.errno != 0 {
		t.Errorf("reply %d errno %d", r.cookie, r.errno)
	}
	if err := c.hungUp(); !errors.Is(err, ErrDisconnected) {
		t.Errorf("ServeConn: %v", err)
	}
	if err := testwatch.Wait(t, testwatch.Long, "Disconnect", ended); err != nil {
		t.Error(err)
	}
	d.onRead = nil
	other.alive()
	if err := s.Disconnect(context.Background(), busy.Conn); err != nil || len(s.Clients()) != 1 {
		t.Errorf("again: %v, %+v", err, s.Clients())
	}
	other.disconnect()
}

// A client that is to be put out and waits for its device is given up when the time is over.
func TestDisconnectIsBounded(t *testing.T) {
	d := newRAM(1 << 20)
	entered, release := make(chan struct{}), make(chan struct{})
	d.onRead = func([]byte, int64) error { close(entered); <-release; return nil }
	c, s := dialServer(t, serveRAM(d), Options{})
	c.open("disk", false)
	c.request(0, cmdRead, 4, 0, 1<<19)
	<-entered
	now, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Disconnect(now, s.Clients()[0].Conn); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(release)
	_ = c.hungUp()
}
