package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
	"github.com/vdisk/vdisk/internal/stream"
)

// ErrUnsupported means that this machine cannot do it: it has no ublk driver, the process may not use the driver, or
// the kernel is too old.
var ErrUnsupported = errors.New("not supported on this machine")

// ErrNoMemory means that there is not enough memory for another device.
var ErrNoMemory = errors.New("not enough memory")

// errStopping is the answer of an owner that is about to end. The client may try again with the next owner.
var errStopping = errors.New("the owner of the store is stopping")

// ErrNoOwner means that nobody offers the store on its control socket.
var ErrNoOwner = errors.New("nobody offers the store")

// errLocked stands for a cow.LockedError that came through a pipe or socket.
var errLocked = errors.New("the store has another owner")

// codes maps errors to the names under which they travel. The names are a promise: other versions of the program read
// them.
var codes = []struct {
	code string
	err  error
}{
	{"stopping", errStopping},
	{"unsupported", ErrUnsupported},
	{"no-memory", ErrNoMemory},
	{"not-found", cow.ErrNotFound},
	{"exists", cow.ErrExists},
	{"busy", cow.ErrBusy},
	{"invalid", cow.ErrInvalid},
	{"damaged-stream", stream.ErrDamaged},
	{"cut-stream", stream.ErrCut},
	{"corrupt", cow.ErrCorrupt},
	{"no-space", cow.ErrNoSpace},
	{"quota", cow.ErrQuota},
	{"read-only", cow.ErrReadOnly},
	{"exhausted", cow.ErrExhausted},
	{"not-a-store", cow.ErrNotStore},
	{"newer-format", cow.ErrVersion},
	{"foreign", cow.ErrForeign},
	{"irregular", cow.ErrIrregular},
	{"store-failed", cow.ErrFailed},
	{"closed", cow.ErrClosed},
	{"locked", errLocked},
	{"canceled", context.Canceled},
}

// UnansweredError is that of an operation that got no answer. It is not known whether it was done, or will be.
type UnansweredError struct{ Err error }

func (e UnansweredError) Error() string { return e.Err.Error() }
func (e UnansweredError) Unwrap() error { return e.Err }

// Error is an owner's error as its client sees it: the text, and the codes of all sentinels that the error matched.
type Error struct {
	Message string   `json:"error"`
	Codes   []string `json:"codes"`
}

func (e *Error) Error() string { return e.Message }

// Is reports whether the owner's error matched the sentinel target.
func (e *Error) Is(target error) bool {
	for _, c := range codes {
		if c.err != target {
			continue
		}
		for _, have := range e.Codes {
			if have == c.code {
				return true
			}
		}
	}
	return false
}

// toWire converts an error to an Error.
func toWire(err error) *Error {
	var e *Error
	if errors.As(err, &e) && e.Message == err.Error() {
		return e
	}
	e = &Error{Message: err.Error(), Codes: []string{}}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			e.Codes = append(e.Codes, c.code)
		}
	}
	var locked *cow.LockedError
	if errors.As(err, &locked) {
		e.Codes = append(e.Codes, "locked")
	}
	return e
}

// message encodes an error for a framed stream.
func message(err error) []byte {
	b, err := json.Marshal(toWire(err))
	if err != nil { // cannot happen: strings always marshal
		return []byte("{}")
	}
	return b
}

// fromStream turns an error that came through a framed stream back into an Error.
func fromStream(err error) error {
	var remote *sparse.RemoteError
	if !errors.As(err, &remote) {
		return err
	}
	e := new(Error)
	if json.Unmarshal(remote.Message, e) != nil || e.Message == "" {
		return fmt.Errorf("the other side failed: %q", remote.Message)
	}
	return e
}
