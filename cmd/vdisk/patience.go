package main

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// A call of the system that waits for somebody else, such as the other end of a pipe, cannot be interrupted. So that a
// signal ends the command all the same, such calls are made on a goroutine of their own, which is left behind when the
// context ends: the program is about to exit.

// patiently returns what f returns, or the cause of ctx's end if that comes first. Then late, unless nil, gets what f
// returns without an error, later.
func patiently[T any](ctx context.Context, f func() (T, error), late func(T)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		if late != nil {
			go func() {
				if r := <-done; r.err == nil {
					late(r.v)
				}
			}()
		}
		var zero T
		return zero, context.Cause(ctx)
	}
}

// openPatiently is os.OpenFile, which waits for the other end of a FIFO.
func openPatiently(ctx context.Context, path string, flags int) (*os.File, error) {
	return patiently(ctx, func() (*os.File, error) { return os.OpenFile(path, flags, 0o600) }, func(f *os.File) { _ = f.Close() })
}

// patient is a stream whose reads and writes end with ctx. Bytes that are then under way may be used later.
type patient struct {
	ctx context.Context
	f   *os.File
}

func (p patient) Read(b []byte) (int, error) {
	return patiently(p.ctx, func() (int, error) { return p.f.Read(b) }, nil)
}

func (p patient) Write(b []byte) (int, error) {
	return patiently(p.ctx, func() (int, error) { return p.f.Write(b) }, nil)
}

// closedPipe is the error of a write to standard output when its reader has gone.
type closedPipe struct{ error }

func (e closedPipe) Unwrap() error { return e.error }

// output is standard output. Its writes end with ctx, and do not kill the process when the reader has gone (SIGPIPE).
// It keeps the first error: not all that writes reports it. The help, which package cli prints, does not.
type output struct {
	ctx context.Context
	*os.File
	failed *atomic.Pointer[error]
}

func newOutput(ctx context.Context, f *os.File) output {
	return output{ctx, f, new(atomic.Pointer[error])}
}

// err is why output is missing, or nil.
func (o output) err() error {
	if err := o.failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (o output) Write(b []byte) (int, error) {
	n, err := patient{o.ctx, o.File}.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		err = closedPipe{err}
	}
	if err != nil {
		o.failed.CompareAndSwap(nil, &err)
	}
	return n, err
}

// diagnostics is standard error. A reader that has gone, or does not read, loses what is written: nothing that is being
// done may wait for it, or end.
type diagnostics struct {
	*os.File
	since *atomic.Int64 // when the write that is under way began, in Unix milliseconds; 0: none is
}

// stuckAfter is how long a write to standard error may take.
const stuckAfter = 2 * time.Second

func (d diagnostics) Write(b []byte) (int, error) {
	for !d.since.CompareAndSwap(0, time.Now().UnixMilli()) {
		if since := d.since.Load(); since != 0 && time.Now().UnixMilli()-since > stuckAfter.Milliseconds() {
			return len(b), nil
		}
		time.Sleep(time.Millisecond)
	}
	text := append([]byte(nil), b...) // the caller's is the caller's again when Write returns
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = d.File.Write(text) // there is nobody else to be told
		d.since.Store(0)
	}()
	timer := time.NewTimer(stuckAfter)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
	return len(b), nil
}
