package owner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// ErrUnsupported: this machine cannot do it: no ublk driver, no right to use it, too old a kernel.
var ErrUnsupported = errors.New("not supported on this machine")

// ErrNoMemory: another device would take memory that is not there.
var ErrNoMemory = errors.New("not enough memory")

// errStopping is what an owner answers that is about to go; the asker may ask the next one.
var errStopping = errors.New("the owner of the store is stopping")

// ErrNoOwner: nobody offers the store to others on its control socket.
var ErrNoOwner = errors.New("nobody offers the store")

// errLocked matches a cow.LockedError on its way through a pipe or socket.
var errLocked = errors.New("the store has another owner")

// codes are the names under which errors travel. They are a promise: other versions of the program read them.
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
	{"corrupt", cow.ErrCorrupt},
	{"no-space", cow.ErrNoSpace},
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

// Error is an error of the owner as its client sees it: the owner's text, and all sentinels that it matched there.
type Error struct {
	Message string   `json:"error"`
	Codes   []string `json:"codes"`
}

func (e *Error) Error() string { return e.Message }

// Is makes errors.Is match the sentinels that the owner's error matched.
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

// toWire makes an Error of any error.
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

// message is the form of an error inside a framed stream.
func message(err error) []byte {
	b, err := json.Marshal(toWire(err))
	if err != nil { // cannot be: strings always marshal
		return []byte("{}")
	}
	return b
}

// fromStream gives an error that came through a framed stream its meaning back.
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
