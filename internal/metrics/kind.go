package metrics

import (
	"errors"
	"syscall"

	"github.com/vdisk/vdisk/cow"
)

// Kinds are the kinds of errors that are told apart, by the words of the label.
var Kinds = [...]string{"no-space", "corrupt", "read-only", "invalid", "failed", "io", "other"}

// KindOf returns the kind of a request's error, as its index in Kinds.
func KindOf(err error) int {
	errno := syscall.Errno(0)
	switch {
	case errors.Is(err, cow.ErrNoSpace):
		return 0
	case errors.Is(err, cow.ErrCorrupt):
		return 1
	case errors.Is(err, cow.ErrReadOnly):
		return 2
	case errors.Is(err, cow.ErrInvalid):
		return 3
	case errors.Is(err, cow.ErrFailed):
		return 4
	case errors.As(err, &errno):
		return 5
	}
	return 6
}
