package metrics

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
)

// serveTest serves metrics with a handler, and returns the address.
func serveTest(t *testing.T, write func(context.Context, io.Writer) error) string {
	t.Helper()
	l, err := Listen("127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, slog.New(slog.DiscardHandler), write) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func one(_ context.Context, w io.Writer) error {
	_, err := io.WriteString(w, "one 1\n")
	return err
}

// TestHTTP asks for the metrics, and for what is refused.
func TestHTTP(t *testing.T) {
	address := serveTest(t, one)
	for _, x := range []struct {
		method, path, host string
		code               int
	}{
		{"GET", "/metrics", "", 200},
		{"GET", "/metrics", "localhost:1", 200},
		{"GET", "/metrics", "[::1]", 200},
		{"HEAD", "/metrics", "", 200},
		{"POST", "/metrics", "", 405},
		{"GET", "/", "", 404},
		{"GET", "/debug/pprof/", "", 404},
		{"GET", "/metrics", "evil.example", 403},
		{"GET", "/metrics", "127.0.0.1.evil.example:80", 403},
	} {
		r, err := http.NewRequest(x.method, "http://"+address+x.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = x.host
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != x.code {
			t.Errorf("%v: %d %q, %v", x, resp.StatusCode, body, err)
		}
		if x.code == 200 && (resp.Header.Get("Content-Type") != ContentType || x.method == "GET" && string(body) != "one 1\n") {
			t.Errorf("%v: %q %q", x, resp.Header.Get("Content-Type"), body)
		}
	}
}

// TestHTTPFails: a reading that fails is an error, and not half an answer. Clients are not told why.
func TestHTTPFails(t *testing.T) {
	address := serveTest(t, func(_ context.Context, w io.Writer) error {
		_, _ = io.WriteString(w, "one 1\n")
		return errors.New("there is no owner")
	})
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusServiceUnavailable || strings.Contains(string(body), "owner") || len(body) == 0 {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
}

// TestBounds opens more connections than are permitted, and asks more than may ask at once.
func TestBounds(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	address := serveTest(t, func(ctx context.Context, w io.Writer) error {
		begun <- struct{}{}
		<-goOn
		return one(ctx, w)
	})
	answers := make(chan string)
	ask := func() {
		resp, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			answers <- err.Error()
			return
		}
		_ = resp.Body.Close()
		answers <- resp.Status
	}
	for range maxRequests {
		go ask()
		<-begun
	}
	go ask()
	if got := <-answers; !strings.HasPrefix(got, "503") {
		t.Errorf("one request too many: %s", got)
	}
	// The last answer's connection may be kept, or not: these are certainly too many.
	for range maxConnections {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "GET /metrics HTTP/1.0\r\n\r\n") // it may be closed already
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("one connection too many: %d bytes, %v", n, err)
	}
	close(goOn)
	for range maxRequests {
		if got := <-answers; got != "200 OK" {
			t.Error(got)
		}
	}
}

// TestListen refuses addresses that others can reach, unless that was asked for.
func TestListen(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "example.org:0", "127.0.0.1.example.org:0"} {
		if l, err := Listen(address, false); !errors.Is(err, ErrPublic) {
			t.Errorf("%s: %v, %v", address, l, err)
		}
	}
	for _, address := range []string{"", "127.0.0.1", "127.0.0.1:x"} {
		if l, err := Listen(address, false); err == nil {
			t.Errorf("%s: %v", address, l)
		}
	}
	for address, public := range map[string]bool{"localhost:0": false, "127.1.2.3:0": false, "0.0.0.0:0": true} {
		l, err := Listen(address, public)
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
	}
}
