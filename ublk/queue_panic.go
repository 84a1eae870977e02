package ublk

import (
	"fmt"
	"runtime/debug"
	"syscall"
)

// withRecover runs f until it completes. If the handler panics, that request fails, and f is called again for the rest.
// So there is one deferred function per turn, and not one per request.
func (q *queue) withRecover(f func(*queue) error) error {
	for {
		panicked, err := q.untilPanic(f)
		if panicked == nil {
			return err
		}
		q.settle(panicked, syscall.EIO)
	}
}

func (q *queue) untilPanic(f func(*queue) error) (panicked *Request, err error) {
	defer func() {
		r := q.serving
		if r == nil {
			return
		}
		p := recover()
		if p == nil { // runtime.Goexit: the thread ends, see Device.queueRoutine
			return
		}
		q.serving, panicked = nil, r
		q.reportPanic(r, p)
	}()
	return nil, f(q)
}

// recovered is deferred where a request is served on another goroutine. It turns a panic into *err.
func (q *queue) recovered(r *Request, err *error) {
	if p := recover(); p != nil {
		*err = syscall.EIO
		q.reportPanic(r, p)
	}
}

func (q *queue) reportPanic(r *Request, p any) {
	if q.report != nil {
		q.report(&PanicError{Op: r.op, Offset: r.Offset, Length: r.Length, Value: p, Stack: debug.Stack()})
	}
}

// PanicError is passed to Options.Report after a panic of the handler. The request has failed with EIO, and the device
// continues.
type PanicError struct {
	Op     Op
	Offset int64
	Length int
	Value  any    // value of the panic
	Stack  []byte // stack of the handler
}

// Error names the request and the panic's value.
func (e *PanicError) Error() string {
	return fmt.Sprintf("ublk: the handler panicked on %v of %d bytes at %d: %v", e.Op, e.Length, e.Offset, e.Value)
}
