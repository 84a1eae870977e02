package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// ErrPublic is matched by the error of Listen for an address that other machines can reach.
var ErrPublic = errors.New("other machines can reach that address")

// Listen listens on ADDRESS:PORT for Serve. The address is an IP address or localhost. It must be a loopback address,
// unless public permits others.
func Listen(address string, public bool) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("the address %q for metrics: %w: ADDRESS:PORT is needed", address, err)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	if !public && !loopback(host) {
		return nil, fmt.Errorf("the address %q for metrics: %w, or it is no IP address", address, ErrPublic)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("listening for metrics: %w", err)
	}
	return &limited{Listener: l, slots: make(chan struct{}, maxConnections)}, nil
}

// loopback reports whether host is a loopback address.
func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}

// Bounds of the server.
const (
	maxConnections = 16
	maxRequests    = 2
	requestTimeout = 5 * time.Second
	answerTimeout  = 30 * time.Second
	idleTimeout    = 5 * time.Second // a scrape may connect anew; idle connections must not keep it out
)

// Serve answers GET /metrics on l with what write writes, until ctx ends, and closes l.
func Serve(ctx context.Context, l net.Listener, log *slog.Logger, write func(context.Context, io.Writer) error) error {
	h := &handler{write: write, log: log, running: make(chan struct{}, maxRequests)}
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		h.loopback = a.IP.IsLoopback()
	}
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: requestTimeout, ReadTimeout: requestTimeout, WriteTimeout: answerTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: 16 << 10, BaseContext: func(net.Listener) context.Context { return ctx },
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		_ = s.Close() // a scrape that is cut off is tried again
	})
	err := s.Serve(l)
	if !stop() {
		<-ended
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serving metrics: %w", err)
}

// handler answers the requests of a metrics server.
type handler struct {
	write    func(context.Context, io.Writer) error
	log      *slog.Logger
	running  chan struct{} // a value for each request under way
	loopback bool          // nobody but this machine can connect
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	switch {
	case h.loopback && !local(r.Host):
		http.Error(w, "this address is asked for by its number or as localhost", http.StatusForbidden)
		return
	case r.URL.Path != "/metrics":
		http.Error(w, "there is only /metrics", http.StatusNotFound)
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "metrics can only be read", http.StatusMethodNotAllowed)
		return
	}
	select {
	case h.running <- struct{}{}:
		defer func() { <-h.running }()
	default:
		http.Error(w, "others are reading the metrics", http.StatusServiceUnavailable)
		return
	}
	Answer(w, r, h.log, h.write)
}

// Answer answers an HTTP request with what write writes. Its error is logged, and not told to clients.
func Answer(w http.ResponseWriter, r *http.Request, log *slog.Logger, write func(context.Context, io.Writer) error) {
	var text bytes.Buffer
	if err := write(r.Context(), &text); err != nil {
		log.Warn("metrics cannot be read", "err", err)
		http.Error(w, "the metrics cannot be read; the log of vdisk says why", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", ContentType)
	_, _ = text.WriteTo(w) // fails if the client is gone
}

// local reports whether the Host of a request names this machine by number, or as localhost. A web page that was made
// to come from this address has another name.
func local(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if n := len(host); n > 2 && host[0] == '[' && host[n-1] == ']' {
		host = host[1 : n-1]
	}
	return host == "localhost" || loopback(host)
}

// limited is a listener with a limit on the open connections: those beyond it are closed at once.
type limited struct {
	net.Listener
	slots chan struct{} // a value for each open connection
}

// Accept accepts the next connection for which there is room.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			_ = c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

// Close closes the connection and makes room for another.
func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
