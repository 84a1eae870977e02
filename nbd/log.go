package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"
)

// sparseLog logs at most one error per second: a full or damaged disk may fail every request, and clients that are
// refused may try again at once.
type sparseLog struct {
	logger     *slog.Logger
	lastReport atomic.Int64 // time of the last log message, in Unix seconds
	suppressed atomic.Int64 // errors not logged since
}

func (l *sparseLog) log(level slog.Level, text string, err error, args ...any) {
	now, last := time.Now().Unix(), l.lastReport.Load()
	if now == last || !l.lastReport.CompareAndSwap(last, now) {
		l.suppressed.Add(1)
		return
	}
	args = append(args, "err", err)
	if p := new(PanicError); errors.As(err, &p) {
		args = append(args, "stack", string(p.Stack))
	}
	if n := l.suppressed.Swap(0); n > 0 {
		args = append(args, "not_logged_before", n)
	}
	l.logger.Log(context.Background(), level, text, args...)
}

var commandNames = [...]string{
	cmdRead: "READ", cmdWrite: "WRITE", cmdDisc: "DISC", cmdFlush: "FLUSH", cmdTrim: "TRIM", cmdCache: "CACHE",
	cmdWriteZeroes: "WRITE_ZEROES", cmdBlockStatus: "BLOCK_STATUS",
}

// logFailed logs a request that the device failed.
func (s *Server) logFailed(export string, req request, err error) {
	log := &s.log
	if p := new(PanicError); errors.As(err, &p) {
		log = &s.panics
	}
	log.log(slog.LevelError, "nbd request failed", err,
		"export", export, "request", commandNames[req.typ], "offset", req.off, "length", req.length)
}

// logPanic logs an error of exports if it is a panic. Only the client learns of other errors.
func (s *Server) logPanic(err error) {
	var p *PanicError
	if errors.As(err, &p) {
		s.panics.log(slog.LevelError, "nbd exports failed", err)
	}
}

// logEnd logs why a connection ended.
func (s *Server) logEnd(client string, err error) {
	switch {
	case errors.Is(err, ErrServerClosed):
	case errors.Is(err, ErrDisconnected):
		s.opts.Logger.Info("nbd client disconnected", "client", client)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		s.opts.Logger.Info("nbd client went away", "client", client, "err", err)
	default:
		s.log.log(slog.LevelWarn, "nbd connection failed", err, "client", client)
	}
}
