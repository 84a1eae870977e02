// Package freeze freezes mounted file systems for a moment: all of their data is written to the disk, and writers wait,
// so that a snapshot of the disk can be mounted as it is. docs/retention.md says what holds; the package knows no store.
package freeze

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Errors of During and of a System.
var (
	// ErrRefused: the path is not the mount point of a file system.
	ErrRefused = errors.New("not a mount point")
	// ErrFrozen: somebody else has frozen the file system.
	ErrFrozen = errors.New("already frozen")
	// ErrUnsupported: the file system cannot be frozen.
	ErrUnsupported = errors.New("this file system cannot be frozen")
	// ErrThawed: a file system was thawed before the work was done.
	ErrThawed = errors.New("thawed too early")
)

// errLate ends the context of the work when the limit has passed.
var errLate = fmt.Errorf("%w: the limit has passed", ErrThawed)

// System is what During needs of the system: Kernel, or a double of it.
type System interface {
	// Open opens the file system at a mount point.
	Open(path string) (Mount, error)
	// After calls f in a goroutine of its own after d, unless stop is called before and returns true.
	After(d time.Duration, f func()) (stop func() bool)
}

// Mount is a mounted file system.
type Mount interface {
	// Freeze writes everything to the disk and stops writers. It cannot be interrupted.
	Freeze() error
	// Thaw lets writers go on. It returns ErrThawed if the file system is not frozen.
	Thaw() error
	Close() error
}

// uncaught are the signals that would end or stop the process while a file system is frozen. SIGKILL and SIGSTOP
// cannot be kept away.
var uncaught = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGTSTP}

// ofTerminal are the signals that would stop a process in the background that uses its terminal, as for a message. They
// are ignored: if they were caught, the write to the terminal would be tried again for ever.
var ofTerminal = []os.Signal{syscall.SIGTTIN, syscall.SIGTTOU}

// During freezes the file systems at the mount points, calls do, and thaws them: in any case, and the first of them at
// most limit after it was frozen. If that is before do has ended, the error matches ErrThawed, and what do has done may
// not be of frozen file systems. Once ctx ends, do is not called any more. The context of do ends with ctx, and when the
// limit has passed.
func During(ctx context.Context, sys System, paths []string, limit time.Duration, do func(context.Context) error) (err error) {
	var mounts []Mount
	defer func() {
		for _, m := range mounts {
			err = errors.Join(err, m.Close())
		}
	}()
	for _, path := range paths {
		m, err := sys.Open(path)
		if err != nil {
			return fmt.Errorf("freezing %s: %w", path, err)
		}
		mounts = append(mounts, m)
	}
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, uncaught...)
	defer signal.Stop(caught)
	signal.Ignore(ofTerminal...)
	defer signal.Reset(ofTerminal...)

	frozenOnly, end := context.WithCancelCause(ctx)
	defer end(nil)
	f := &frozen{}
	defer func() { err = errors.Join(err, f.thaw(false)) }()
	for i, m := range mounts {
		if ctx.Err() != nil || f.isLate() {
			return context.Cause(ctx) // thaw says what else was wrong
		}
		if err := m.Freeze(); err != nil {
			return fmt.Errorf("freezing %s: %w", paths[i], err)
		}
		f.add(m, paths[i])
		if i == 0 {
			stop := sys.After(limit, func() {
				end(errLate) // first, so that what has not begun yet does not begin
				_ = f.thaw(true)
			})
			defer stop()
		}
	}
	if ctx.Err() != nil || f.isLate() {
		return context.Cause(ctx)
	}
	if err = do(frozenOnly); errors.Is(err, errLate) {
		return nil // thaw says it
	}
	return err
}

// frozen are the file systems that are frozen.
type frozen struct {
	mu     sync.Mutex // guards the fields below
	mounts []Mount
	paths  []string
	ended  bool
	late   bool  // the limit has passed
	err    error // of thawing
}

// add adds a file system that was just frozen. If the limit has passed meanwhile, the last call of thaw thaws it.
func (f *frozen) add(m Mount, path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mounts, f.paths = append(f.mounts, m), append(f.paths, path)
}

func (f *frozen) isLate() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.late
}

// thaw thaws all file systems that are frozen, the last one first. Those that it cannot thaw are left to the next call.
// late says that the limit has passed. It returns the errors of all calls.
func (f *frozen) thaw(late bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if late && !f.ended {
		f.late = true
		f.err = errors.Join(f.err, errLate)
	}
	f.ended = true
	for i := len(f.mounts) - 1; i >= 0; i-- {
		err := f.mounts[i].Thaw()
		if err != nil {
			f.err = errors.Join(f.err, fmt.Errorf("thawing %s: %w", f.paths[i], err))
		}
		if err == nil || errors.Is(err, ErrThawed) {
			f.mounts, f.paths = slices.Delete(f.mounts, i, i+1), slices.Delete(f.paths, i, i+1)
		}
	}
	return f.err
}
