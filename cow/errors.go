package cow

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// Errors, grouped by what the caller can do about them. Each is returned wrapped with the name of the thing and, if
// there is one, the way out.
var (
	// Returned for names: no such volume, snapshot or store exists, or one exists already.
	ErrNotFound = fault.ErrNotFound
	ErrExists   = errors.New("already exists")

	// Returned when something is in use: a volume is open or has dependants, or a store has another owner
	// (LockedError).
	ErrBusy = errors.New("busy")

	// Returned by Open if the last owner was killed and its acknowledged but unwritten writes are in a shared memory
	// that this process does not have, such as that of another container. It also matches ErrBusy.
	ErrElsewhere = errors.New("the last owner's memory is elsewhere")

	// Returned for arguments: a bad name, size, range or option.
	ErrInvalid = errors.New("invalid")

	// Returned by writes that the target does not accept. ErrReadOnly also matches EROFS, and ErrNoSpace ENOSPC.
	ErrReadOnly error = &errnoError{"read-only", syscall.EROFS}
	ErrNoSpace        = storage.ErrNoSpace
	// ErrQuota is matched, besides ErrNoSpace, if it is a quota of the volume that leaves no room.
	ErrQuota = errors.New("the volume's quota is full")

	// Returned when no number is left for something new.
	ErrExhausted = fault.ErrExhausted

	// Returned when the store's files are not what they should be.
	ErrCorrupt  = format.ErrCorrupt
	ErrNotStore = format.ErrNotStore
	ErrVersion  = format.ErrVersion
	// ErrUnusable is matched, besides ErrCorrupt, by an error of Open about damage to the store. Open has changed
	// nothing then.
	ErrUnusable = errors.New("the store cannot be opened")
	// ErrSound is matched by the error of RebuildTable and RestoreTable if the table needs no repair.
	ErrSound = errors.New("the table is sound")
	// ErrNotMended is matched by the error of MendTable if more is wrong than counts.
	ErrNotMended = errors.New("more is wrong in the table than counts, and nothing was changed")
	// ErrNotRebuilt is matched, besides ErrCorrupt, by their error if what the table was to be made from is damaged, or
	// does not belong to the log. They have changed nothing then.
	ErrNotRebuilt = errors.New("the table cannot be made anew")
	// ErrDamagedLog is matched by a LogDamage.
	ErrDamagedLog = errors.New("the log is damaged")

	// Returned for a store that another user could have made or changed, and for a symbolic link, a FIFO or the like
	// with the name of one of its files.
	ErrForeign   = storage.ErrForeign
	ErrIrregular = storage.ErrIrregular

	// Returned by every change after a write or sync of the log has failed (the log's end is then unknown), and after
	// Close.
	ErrFailed = fault.ErrFailed
	ErrClosed = fault.ErrClosed
)

// IsDamage reports whether err is about data that is damaged, or that the disk has and cannot read.
func IsDamage(err error) bool { return errors.Is(err, ErrCorrupt) || fault.IsUnreadable(err) }

// LeafSize is how many bytes of a volume a leaf of the map is of.
const LeafSize = leafSize

// LeafDamage is the error about a leaf of the map that cannot be read: it is not known what its LeafSize bytes hold. It
// matches ErrCorrupt.
type LeafDamage struct {
	Offset int64 // in the volume or snapshot
	err    error
}

// leafDamage returns the error about a leaf that could not be read.
func leafDamage(index uint32, err error) error {
	if !errors.Is(err, ErrCorrupt) {
		return err
	}
	return &LeafDamage{int64(index) * LeafSize, err}
}

func (d *LeafDamage) Error() string { return d.err.Error() }

// Unwrap makes a LeafDamage match ErrCorrupt.
func (d *LeafDamage) Unwrap() error { return d.err }

type errnoError struct {
	text  string
	errno syscall.Errno
}

func (e *errnoError) Error() string { return e.text }
func (e *errnoError) Unwrap() error { return e.errno }

// LockedError says who owns the store. It matches ErrBusy.
type LockedError struct {
	Dir    string
	Holder string // content of the lock file, written by the holder: "pid 123 vdisk serve"
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("store %s is in use by %s", e.Dir, e.Holder)
}

// Unwrap makes a LockedError match ErrBusy.
func (e *LockedError) Unwrap() error { return ErrBusy }

// unusable makes an error of Open about damage match ErrUnusable, too.
func unusable(err error) error {
	if !errors.Is(err, ErrCorrupt) {
		return err
	}
	return unusableError{err}
}

type unusableError struct{ error }

func (e unusableError) Unwrap() []error { return []error{ErrUnusable, e.error} }
