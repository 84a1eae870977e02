package nbd

import (
	"fmt"
	"runtime/debug"
	"time"
)

// PanicError is a panic of a Device or of Exports. The client sees an I/O error.
type PanicError struct {
	Value any
	Stack []byte
}

// Error names the value of the panic.
func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// recovered is deferred, and makes a panic an error.
func recovered(err *error) {
	if v := recover(); v != nil {
		*err = &PanicError{Value: v, Stack: debug.Stack()}
	}
}

// guard is a Device whose panics become errors: a panic must not end the process, which serves other clients.
type guard struct {
	dev Device
	ext Extenter  // dev, or nil
	try TryReader // dev, or nil
	obs Observer  // dev, or nil
	adm Admitter  // dev, or nil
}

func guardOf(d Device) *guard {
	g := &guard{dev: d}
	g.ext, _ = d.(Extenter)
	g.try, _ = d.(TryReader)
	g.obs, _ = d.(Observer)
	g.adm, _ = d.(Admitter)
	return g
}

func (g *guard) ReadAt(p []byte, off int64) (n int, err error) {
	defer recovered(&err)
	return g.dev.ReadAt(p, off)
}

func (g *guard) WriteAt(p []byte, off int64) (n int, err error) {
	defer recovered(&err)
	return g.dev.WriteAt(p, off)
}

func (g *guard) Flush() (err error) {
	defer recovered(&err)
	return g.dev.Flush()
}

func (g *guard) Discard(off, length int64) (err error) {
	defer recovered(&err)
	return g.dev.Discard(off, length)
}

func (g *guard) WriteZeroes(off, length int64, noHole bool) (err error) {
	defer recovered(&err)
	return g.dev.WriteZeroes(off, length, noHole)
}

func (g *guard) Extents(off, length int64, fn func(off, length int64, hole bool) bool) (err error) {
	defer recovered(&err)
	return g.ext.Extents(off, length, fn)
}

func (g *guard) TryReadAt(p []byte, off int64) (done bool, err error) {
	defer recovered(&err)
	return g.try.TryReadAt(p, off)
}

func (g *guard) Observe(op Op, length int64, took time.Duration, err error) {
	var panicked error // the request has its answer
	defer recovered(&panicked)
	g.obs.Observe(op, length, took, err)
}

// Admit is not guarded by itself: the receiver, which calls it, is.
func (g *guard) Admit(write bool, bytes int64) Turn { return g.adm.Admit(write, bytes) }

// guardedContext is a Context whose panics become errors.
type guardedContext struct{ c Context }

func (g guardedContext) Status(off, length int64, fn func(off, length int64, flags uint32) bool) (err error) {
	defer recovered(&err)
	return g.c.Status(off, length, fn)
}

func (g guardedContext) Close() (err error) {
	defer recovered(&err)
	return g.c.Close()
}
