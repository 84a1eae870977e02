package localhttp

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"
	"testing"
)

// failingOnce is a listener whose first accept fails.
type failingOnce struct {
	net.Listener
	err error
}

func (l *failingOnce) Accept() (net.Conn, error) {
	if err := l.err; err != nil {
		l.err = nil
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", err)}
	}
	return l.Listener.Accept()
}

// TestServeGoesOn: a lack of memory or of descriptors passes, and then others are served.
func TestServeGoesOn(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.ENOBUFS, syscall.EMFILE} {
		l, err := Listen("a test", "localhost:0", false)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
		go func() { ended <- Serve(ctx, &failingOnce{l, errno}, 1, slog.New(slog.DiscardHandler), h) }()
		resp, err := http.Get("http://" + l.Addr().String())
		if err != nil {
			t.Errorf("after %v: %v", errno, err)
		} else {
			_ = resp.Body.Close()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("after %v: %v", errno, err)
		}
	}
}

// TestEveryRequestIsGuarded: net/http would answer OPTIONS * itself, for any host.
func TestEveryRequestIsGuarded(t *testing.T) {
	l, err := Listen("a test", "localhost:0", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	go func() { ended <- Serve(ctx, l, 1, slog.New(slog.DiscardHandler), h) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = io.WriteString(c, "OPTIONS * HTTP/1.1\r\nHost: evil.example\r\n\r\n")
	status := make([]byte, len("HTTP/1.1 418"))
	if _, rerr := io.ReadFull(c, status); err != nil || rerr != nil || string(status) != "HTTP/1.1 418" {
		t.Errorf("%s, %v, %v", status, err, rerr)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
