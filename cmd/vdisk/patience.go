package main

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

// A system call that waits for another party, such as the other end of a pipe, cannot be interrupted. A signal must end
// the command nevertheless, so such calls run on a goroutine of their own. When the context ends, that goroutine is
// left behind, since the program is about to exit.

// patiently returns the result of f, or the cause of ctx's end if that comes first. In the second case late, unless
// nil, is called with the value of f once f returns without an error.
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

// openPatiently is os.OpenFile for a path that may be a FIFO, whose other end it waits for.
func openPatiently(ctx context.Context, path string, flags int) (*os.File, error) {
	return patiently(ctx, func() (*os.File, error) { return os.OpenFile(path, flags, 0o600) }, func(f *os.File) { _ = f.Close() })
}

// patient is a stream whose reads and writes end with ctx. The buffer of such a read or write may still be used
// afterwards.
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

// closedPipe is the error of writing to standard output after its reader has gone.
type closedPipe struct{ error }

func (e closedPipe) Unwrap() error { return e.error }

// output is standard output. Its writes end with ctx, and do not kill the process (SIGPIPE) if the reader has gone. It
// keeps the first error, because not every writer reports errors: package cli, which prints the help, does not.
type output struct {
	ctx context.Context
	*os.File
	failed *atomic.Pointer[error]
}

func newOutput(ctx context.Context, f *os.File) output {
	return output{ctx, f, new(atomic.Pointer[error])}
}

// err returns why output is missing, or nil.
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

// diagnostics is standard error. If its reader has gone or does not read, the text is lost: no work may wait for it or
// end because of it.
type diagnostics struct {
	*os.File
	since *atomic.Int64 // start of the current write, in Unix milliseconds; 0: none
}

// stuckAfter is how long a write to standard error may take before the text is given up.
const stuckAfter = 2 * time.Second

func (d diagnostics) Write(b []byte) (int, error) {
	for !d.since.CompareAndSwap(0, time.Now().UnixMilli()) {
		if since := d.since.Load(); since != 0 && time.Now().UnixMilli()-since > stuckAfter.Milliseconds() {
			return len(b), nil
		}
		time.Sleep(time.Millisecond)
	}
	text := append([]byte(nil), b...) // the caller may use b again once Write returns
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = d.File.Write(text) // there is no place to report an error
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
