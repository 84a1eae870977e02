// Package fault holds the errors that all parts of the engine return, and tells what an error of the system means to
// the engine: no space, no access, or damage.
package fault

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// Package cow exports these errors, and says what they mean to a caller.
var (
	ErrNotFound  = errors.New("not found")
	ErrExhausted = errors.New("numbers are used up")
	ErrFailed    = errors.New("the store has stopped after an I/O error")
	ErrClosed    = errors.New("the store is closed")
)

// NoSpace makes ENOSPC and EDQUOT match storage.ErrNoSpace.
func NoSpace(err error) error {
	if (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && !errors.Is(err, storage.ErrNoSpace) {
		return fmt.Errorf("%w: %w", storage.ErrNoSpace, err)
	}
	return err
}

// OutOfReach reports whether err is about access to a file. Such an error says nothing of what the file holds, and may
// not occur again, or not for another user.
func OutOfReach(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EACCES, syscall.EPERM, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ESTALE, syscall.EROFS} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// AsCorrupt wraps an error of reading the log as format.ErrCorrupt, so that callers that can go on without the data
// treat it as damage. Errors of [OutOfReach] stay as they are.
func AsCorrupt(err error) error {
	if err == nil || errors.Is(err, format.ErrCorrupt) || OutOfReach(err) {
		return err
	}
	return fmt.Errorf("%w: %w", format.ErrCorrupt, err)
}

// Lost makes an error about a missing chunk file, or one that is too short, match format.ErrCorrupt.
func Lost(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", format.ErrCorrupt, err)
	}
	return err
}

// Corruptf returns an error that matches format.ErrCorrupt.
func Corruptf(text string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(text, args...), format.ErrCorrupt)
}

// IsUnreadable reports whether an error is about data that the disk holds and cannot read.
func IsUnreadable(err error) bool {
	for _, e := range []error{syscall.EIO, syscall.EUCLEAN, syscall.EBADMSG, syscall.ENODATA, syscall.EILSEQ} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// IgnoreUnreadable returns nil for the errors of [IsUnreadable], and err otherwise. It is for callers that treat
// unreadable data as no record.
func IgnoreUnreadable(err error) error {
	if IsUnreadable(err) {
		return nil
	}
	return err
}
