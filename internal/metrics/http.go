package metrics

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"

	"github.com/vdisk/vdisk/internal/localhttp"
)

// ErrPublic is matched by the error of Listen for an address that other machines can reach.
var ErrPublic = localhttp.ErrPublic

// Listen listens on ADDRESS:PORT for Serve. The address is an IP address or localhost. It must be a loopback address,
// unless public permits others.
func Listen(address string, public bool) (net.Listener, error) {
	return localhttp.Listen("metrics", address, public)
}

// Bounds of the server.
const (
	maxConnections = 16
	maxRequests    = 2
)

// Serve answers GET /metrics on l with what write writes, until ctx ends, and closes l.
func Serve(ctx context.Context, l net.Listener, log *slog.Logger, write func(context.Context, io.Writer) error) error {
	h := &handler{write: write, log: log, running: make(chan struct{}, maxRequests)}
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		h.loopback = a.IP.IsLoopback()
	}
	if err := localhttp.Serve(ctx, l, maxConnections, log, h); err != nil {
		return fmt.Errorf("serving metrics: %w", err)
	}
	return nil
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
	case h.loopback && !localhttp.Local(r.Host):
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
