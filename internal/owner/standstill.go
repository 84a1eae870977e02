package owner

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

const (
	// standstill is how long a client may take nothing of an answer before its connection is given up.
	standstill = 30 * time.Second
	// exportStandstill is the same for an export, which blocks nobody else: its reader may be a tape, or a disk that is
	// writing back its cache.
	exportStandstill = 10 * time.Minute
	// streamPiece is how much of an answer a client must take in that time.
	streamPiece = 16 << 10
)

// givingUp wraps h and gives up clients that stand still: writing the answer fails, and the operation's context ends.
// It waits for a client that takes something, however slowly.
func givingUp(h http.Handler, patience time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		p := &patientWriter{ResponseWriter: w, rc: http.NewResponseController(w), cancel: cancel}
		p.patience.Store(int64(patience))
		h.ServeHTTP(p, r.WithContext(ctx))
		if !p.hijacked {
			_ = p.extend() // for what is still buffered; it fails if the client is gone
		}
	})
}

// patientWriter is a ResponseWriter that moves its deadline each time its client has taken a piece.
type patientWriter struct {
	http.ResponseWriter
	rc       *http.ResponseController
	cancel   context.CancelCauseFunc
	patience atomic.Int64 // a Duration
	hijacked bool
}

func (p *patientWriter) extend() error {
	return p.rc.SetWriteDeadline(time.Now().Add(time.Duration(p.patience.Load())))
}

// Write writes b in pieces and extends the deadline for each of them.
func (p *patientWriter) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		var k int
		piece := b[:min(len(b), streamPiece)]
		if err = p.extend(); err == nil {
			k, err = p.ResponseWriter.Write(piece)
		}
		n, b = n+k, b[k:]
	}
	if err != nil {
		p.cancel(err)
	}
	return n, err
}

// FlushError flushes the response. http.ResponseController calls it.
func (p *patientWriter) FlushError() error {
	err := p.extend()
	if err == nil {
		err = p.rc.Flush()
	}
	if err != nil {
		p.cancel(err)
	}
	return err
}

// Hijack implements http.Hijacker. The connection then belongs to the caller and has no write deadline.
func (p *patientWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := p.rc.Hijack()
	p.hijacked = err == nil
	if err == nil {
		err = conn.SetWriteDeadline(time.Time{})
	}
	return conn, rw, err
}

// Unwrap returns the wrapped writer for http.ResponseController.
func (p *patientWriter) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// waitLonger sets a longer patience for an answer whose client has reason to stand still.
func waitLonger(w http.ResponseWriter, patience time.Duration) {
	if p, ok := w.(*patientWriter); ok {
		p.patience.Store(int64(patience))
	}
}
