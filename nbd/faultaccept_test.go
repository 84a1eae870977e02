package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// faultyListener fails its first calls of Accept.
type faultyListener struct {
	net.Listener
	errs []error
}

func (l *faultyListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", err)}
	}
	return l.Listener.Accept()
}

// TestFaultAtAccept: after an error that passes, the server accepts the next client; after another one, Serve returns it.
func TestFaultAtAccept(t *testing.T) {
	passing := []error{
		syscall.EMFILE, syscall.ENFILE, syscall.ECONNABORTED, syscall.EINTR, syscall.EAGAIN, syscall.ECONNRESET,
		syscall.ENOMEM, syscall.ENOBUFS, syscall.EPERM, syscall.EPROTO, syscall.ENETDOWN, syscall.EHOSTUNREACH,
	}
	for i, errno := range append(passing, syscall.EBADF, syscall.EINVAL, syscall.ENOTSOCK) {
		l, err := net.Listen("unix", fmt.Sprintf("%s/s%d", t.TempDir(), i))
		if err != nil {
			t.Fatal(err)
		}
		s := New(serveRAM(newRAM(1<<20)), Options{})
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background(), &faultyListener{l, []error{errno}}) }()
		if !slices.Contains(passing, errno) {
			testwatch.Do(t, testwatch.Long, "Serve", func() {
				if err := <-served; !errors.Is(err, errno) {
					t.Errorf("Serve returned %v after %v", err, errno)
				}
			})
			if _, err := net.Dial("unix", l.Addr().String()); err == nil {
				t.Errorf("it listens after %v", errno)
			}
			continue
		}
		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatalf("after %v: %v", errno, err)
		}
		_ = nc.SetDeadline(time.Now().Add(testwatch.Long))
		c := &client{tb: t, Conn: nc, served: make(chan error, 1)}
		select {
		case err := <-served:
			t.Fatalf("Serve ended after %v: %v", errno, err)
		case <-time.After(10 * time.Millisecond):
		}
		c.open("disk", false)
		c.alive()
		nc.Close()
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		testwatch.Do(t, testwatch.Long, "Serve", func() {
			if err := <-served; !errors.Is(err, ErrServerClosed) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}
