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
	// standstill is for how long a client may take nothing of an answer before it is given up.
	standstill = 30 * time.Second
	// exportStandstill is the same for an export, which keeps nobody waiting: what consumes it may be a tape, or a disk
	// that is writing back its cache.
	exportStandstill = 10 * time.Minute
	// streamPiece is how much of an answer a client has to take in that time.
	streamPiece = 16 << 10
)

// givingUp lets the handler's clients go that stand still: the answer fails, and the operation's context ends. A client
// that takes something, however slowly, is waited for.
func givingUp(h http.Handler, patience time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		p := &patientWriter{ResponseWriter: w, rc: http.NewResponseController(w), cancel: cancel}
		p.patience.Store(int64(patience))
		h.ServeHTTP(p, r.WithContext(ctx))
		if !p.hijacked {
			_ = p.extend() // for what is still in buffers; it fails where the client is gone
		}
	})
}

// patientWriter is a ResponseWriter whose deadline moves with what its client takes.
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

// Write writes a piece after the other.
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

// FlushError is what http.ResponseController calls.
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

// Hijack is http.Hijacker's. The connection is the caller's, without a deadline.
func (p *patientWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := p.rc.Hijack()
	p.hijacked = err == nil
	if err == nil {
		err = conn.SetWriteDeadline(time.Time{})
	}
	return conn, rw, err
}

// Unwrap is for http.ResponseController.
func (p *patientWriter) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// waitLonger is for answers whose client has reason to stand still.
func waitLonger(w http.ResponseWriter, patience time.Duration) {
	if p, ok := w.(*patientWriter); ok {
		p.patience.Store(int64(patience))
	}
}
