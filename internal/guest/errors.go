package guest

import "errors"

var (
	// ErrUnavailable is matched by errors of a machine that cannot build or run a guest; the text says why and the
	// way out.
	ErrUnavailable = errors.New("a guest cannot be had here")
	// ErrTimeout is matched when a run's deadline passed and QEMU was killed.
	ErrTimeout = errors.New("guest: deadline passed")
	// ErrPanic is matched when the guest's kernel panicked.
	ErrPanic = errors.New("guest: kernel panic")
	// ErrBoot is matched when the guest did not come up, however often it was tried.
	ErrBoot = errors.New("guest: did not boot")
	// ErrDied is matched when QEMU ended before the payload did, without a panic.
	ErrDied = errors.New("guest: ended before its payload")
)
