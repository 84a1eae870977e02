package guest

import "errors"

var (
	// ErrUnavailable is matched by errors of a machine that cannot build or run a guest. The text says why, and what to
	// do about it.
	ErrUnavailable = errors.New("this machine cannot build or run a guest")
	// ErrTimeout is matched if the run's deadline passed and QEMU was killed.
	ErrTimeout = errors.New("guest: deadline passed")
	// ErrPanic is matched if the guest's kernel panicked.
	ErrPanic = errors.New("guest: kernel panic")
	// ErrBoot is matched if the guest did not come up in any of the tries.
	ErrBoot = errors.New("guest: did not boot")
	// ErrDied is matched if QEMU ended before the payload did, without a panic.
	ErrDied = errors.New("guest: ended before its payload")
)
