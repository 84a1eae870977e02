package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// failingClose is a store that cannot be closed cleanly.
type failingClose struct {
	owner.Store
	err error
}

func (s failingClose) Close() error { return s.err }

// TestCloseErrorsCount: an error of closing the store decides the exit code of a command that has done its work, and of
// a command that a signal has ended.
func TestCloseErrorsCount(t *testing.T) {
	failed := fmt.Errorf("the last flush: %w", cow.ErrFailed)
	stopped, stop := context.WithCancelCause(t.Context())
	stop(signalError{syscall.SIGTERM})
	for _, c := range []struct {
		name       string
		ctx        context.Context
		do, closed error
		want       int
	}{
		{"all is well", t.Context(), nil, nil, exitOK},
		{"closing fails", t.Context(), nil, failed, exitFailed},
		{"closing finds the disk full", t.Context(), nil, cow.ErrNoSpace, exitNoSpace},
		{"both fail", t.Context(), cow.ErrNotFound, failed, exitNotFound},
		{"a signal", stopped, context.Canceled, nil, exitSignal + int(syscall.SIGTERM)},
		{"a signal, and closing fails", stopped, context.Canceled, failed, exitFailed},
		{"a signal that is no error, and closing fails", stopped, nil, failed, exitFailed},
	} {
		err := use(func(owner.Store) error { return c.do })(failingClose{err: c.closed}, nil)
		got := exitOK
		if err != nil {
			got, _, _ = classify(withCause(c.ctx, err))
		}
		if got != c.want || c.closed != nil && !errors.Is(err, c.closed) {
			t.Errorf("%s: exit %d, want %d (%v)", c.name, got, c.want, err)
		}
	}
}
