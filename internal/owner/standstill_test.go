package owner

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testwatch"
)

// streaming starts a server that gives up clients. Its operation answers until that fails, or until its context ends.
func streaming(t *testing.T, patience time.Duration, op func(w http.ResponseWriter, r *http.Request) error) (address string, ended <-chan error) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	c := make(chan error, 1)
	s := httptest.NewUnstartedServer(givingUp(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { c <- op(w, r) }), patience))
	s.Listener = l
	s.Start()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return l.Addr().String(), c
}

func ask(t *testing.T, address, request string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", address)
	if err == nil {
		_, err = io.WriteString(conn, request)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

const get = "GET / HTTP/1.1\r\nHost: vdisk\r\n\r\n"

// TestStandingClientIsGivenUp: if a client reads neither lines nor a body, the operation is ended, and not only its
// answer.
func TestStandingClientIsGivenUp(t *testing.T) {
	for name, op := range map[string]func(w http.ResponseWriter, r *http.Request) error{
		"lines": func(w http.ResponseWriter, r *http.Request) error {
			lines := newLineWriter(w)
			for r.Context().Err() == nil {
				lines.write(checkLine{Progress: &[2]int64{1, 2}})
			}
			return r.Context().Err()
		},
		"body": func(w http.ResponseWriter, r *http.Request) error {
			p := make([]byte, 1<<20)
			for {
				if _, err := w.Write(p); err != nil {
					return errors.Join(err, r.Context().Err())
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			address, ended := streaming(t, 100*time.Millisecond, op)
			ask(t, address, get)
			err := testwatch.Wait(t, testwatch.Long, "the operation of a client that stands still", ended)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("the operation ended with %v", err)
			}
		})
	}
}

// TestSlowClientIsWaitedFor: a client that takes a little at a time gets everything, however long it takes.
func TestSlowClientIsWaitedFor(t *testing.T) {
	const size, patience = 4 << 20, 2 * time.Second
	address, ended := streaming(t, patience, func(w http.ResponseWriter, _ *http.Request) error {
		_, err := w.Write(make([]byte, size)) // in one piece
		return err
	})
	conn := ask(t, address, get)
	got, buf := 0, make([]byte, 128<<10)
	for start := time.Now(); got < size; {
		if time.Since(start) < patience+time.Second { // longer than anybody is waited for who takes nothing
			time.Sleep(patience / 8)
		}
		n, err := conn.Read(buf)
		if got += n; err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
