package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/freeze"
	"github.com/vdisk/vdisk/internal/image"
	"github.com/vdisk/vdisk/internal/owner"
	streams "github.com/vdisk/vdisk/internal/stream"
)

// Exit codes. They are a promise to scripts.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitExists      = 4
	exitBusy        = 5
	exitCorrupt     = 6
	exitLeaks       = 7
	exitUnsupported = 8
	exitNoSpace     = 9
	exitDiffer      = 10
	exitSignal      = 128 // plus the signal's number
)

// usageError is a mistake in how the command was written.
type usageError struct {
	c   *cli.Context // may be nil
	err error
}

func (e usageError) Error() string { return e.err.Error() }

func usagef(format string, args ...any) error { return usageError{nil, fmt.Errorf(format, args...)} }

// signalError is the cause when a signal ends a command.
type signalError struct{ signal syscall.Signal }

func (e signalError) Error() string { return "stopped by a signal (" + e.signal.String() + ")" }

// closeError is an error of closing a store. Data written before may not be durable, so it takes precedence over the
// signal that ended the command.
type closeError struct{ err error }

func (e closeError) Error() string { return e.err.Error() }
func (e closeError) Unwrap() error { return e.err }

// hintedError is an error with a hint of its own, in place of that of its kind.
type hintedError struct {
	error
	hint string
}

func (e hintedError) Unwrap() error { return e.error }

// partly gives an error of an operation that keeps what it has done, and goes on with it when it is given again, a hint
// that says so.
func partly(err error) error {
	if !errors.Is(err, cow.ErrNoSpace) || errors.Is(err, cow.ErrQuota) {
		return err
	}
	return hintedError{err, "free space on the store's file system, or remove snapshots or volumes (vdisk rm), and go on: what was done counts"}
}

// errLeaks is the result of a check that found nothing worse than leaked space.
var errLeaks = errors.New("space is lost to leaks; the data is sound")

// kinds maps errors to exit codes. The first match counts.
var kinds = []struct {
	err  error
	exit int
	code string
	hint string // what to do, if the error itself cannot say it
}{
	{errLeaks, exitLeaks, "leaks", ""},
	{errDiffer, exitDiffer, "differ", ""},
	{cow.ErrQuota, exitNoSpace, "no-space", ""},
	{cow.ErrNoSpace, exitNoSpace, "no-space", "the operation changed nothing; free space on the store's file system, or remove snapshots or volumes (vdisk rm)"},
	{syscall.ENOSPC, exitNoSpace, "no-space", "free space on that file system"},
	{syscall.EDQUOT, exitNoSpace, "no-space", "raise the quota, or free space"},
	{cow.ErrNotRebuilt, exitCorrupt, "corrupt", "nothing was changed; restore meta.db, or the whole store, from a backup"},
	{cow.ErrDamagedLog, exitCorrupt, "corrupt", "nothing was changed; restore that file from a better copy, or give up the records behind the damage: 'vdisk check --repair'"},
	{cow.ErrUnusable, exitCorrupt, "corrupt", "nothing was changed; restore the missing, damaged or foreign file, or the whole store, from a backup; if it is the table (meta.db), 'vdisk metadata rebuild' makes it anew from its copy"},
	{cow.ErrSound, exitFailed, "sound", ""},
	{streams.ErrDamaged, exitCorrupt, "corrupt", "the store is as sound as it was; 'vdisk stream check FILE' verifies a stream that is kept in a file"},
	{streams.ErrCut, exitFailed, "cut", ""},
	{freeze.ErrThawed, exitFailed, "thawed", "a longer --freeze-timeout may help"},
	{freeze.ErrFrozen, exitBusy, "busy", "'fsfreeze --unfreeze MOUNTPOINT' thaws it, if nobody else is at work"},
	{freeze.ErrRefused, exitUsage, "invalid", ""},
	{freeze.ErrUnsupported, exitUnsupported, "unsupported", ""},
	{cow.ErrCorrupt, exitCorrupt, "corrupt", "'vdisk check --read-data' lists all damage; 'vdisk export --salvage' saves all readable data, with zeros for the rest"},
	{cow.ErrVersion, exitUnsupported, "newer-format", "nothing was changed; use the version of vdisk that wrote it, or a later one"},
	{cow.ErrForeign, exitFailed, "foreign", "run vdisk as the store's owner (sudo -u USER vdisk ...); if you trust everybody who can change it, use --foreign or VDISK_FOREIGN=1"},
	{cow.ErrIrregular, exitFailed, "irregular", "find out who put it there, and remove it"},
	{cow.ErrNotStore, exitFailed, "not-a-store", "nothing was changed; choose another folder with --store or VDISK_STORE"},
	{image.ErrMissing, exitUnsupported, "missing-program", "nothing was changed; install it, and try again"},
	{owner.ErrUnsupported, exitUnsupported, "unsupported", "'vdisk features' shows what this machine supports; 'vdisk serve' (NBD) needs no kernel driver"},
	{owner.ErrNoMemory, exitFailed, "no-memory", "detach unneeded devices, raise the memory limit of the machine or the cgroup, or attach with fewer --queues"},
	{cow.ErrExhausted, exitFailed, "exhausted", ""},
	{cow.ErrReadOnly, exitFailed, "read-only", "commands that only read work: ls, info, check, export, send, diff, compare and the like, and serve with --socket elsewhere"},
	{cow.ErrNotFound, exitNotFound, "not-found", "'vdisk ls -t all' lists what there is"},
	{fs.ErrNotExist, exitNotFound, "not-found", ""},
	{cow.ErrExists, exitExists, "exists", "choose another name, or remove or rename the existing one (vdisk rm, vdisk rename)"},
	{fs.ErrExist, exitExists, "exists", ""},
	{cow.ErrBusy, exitBusy, "busy", ""},
	{cow.ErrInvalid, exitUsage, "invalid", ""},
	{cow.ErrFailed, exitFailed, "store-failed", "look for I/O errors in the kernel's log; flushed data is safe, and is there when the store is opened again"},
	{fs.ErrPermission, exitFailed, "permission", "a store belongs to the user who created it; run as that user, or choose another --store"},
}

// classify returns an error's exit code, its name in the JSON output, and a hint.
func classify(err error) (exit int, code, hint string) {
	var usage usageError
	var signal signalError
	var locked *cow.LockedError
	var noStore noStoreError
	var closing closeError
	switch {
	case errors.As(err, &noStore):
		return exitNotFound, "not-found", "the first 'vdisk create' or 'vdisk import' creates it; choose another with --store or VDISK_STORE"
	case errors.As(err, &locked):
		return exitBusy, "busy", "wait until that process has ended, or use a longer --lock-timeout"
	case errors.As(err, &closedPipe{}) && !errors.As(err, &closing):
		return exitSignal + int(syscall.SIGPIPE), "closed-pipe", ""
	case errors.As(err, &signal) && !errors.As(err, &closing):
		return exitSignal + int(signal.signal), "signal", ""
	case errors.As(err, &usage):
		if usage.c != nil && usage.c.Command != nil && usage.c.Command.UsageText != "" {
			hint = usage.c.Command.UsageText
		}
		return exitUsage, "usage", hint
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			hint := k.hint
			if own := (hintedError{}); errors.As(err, &own) {
				hint = own.hint
			}
			return k.exit, k.code, hint
		}
	}
	return exitFailed, "failed", ""
}

// errorJSON is an error in the JSON output.
type errorJSON struct {
	Error string `json:"error"`
	Code  string `json:"code"`
	Exit  int    `json:"exit"`
	Hint  string `json:"hint,omitempty"`
}

// oneLine returns an error's text in one line; joined errors have one line each.
func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// fail prints an error and returns the exit code.
func (a *app) fail(err error) int {
	exit, code, hint := classify(err)
	if code == "closed-pipe" { // the reader of the output has seen enough
		return exit
	}
	if a.json {
		_ = json.NewEncoder(a.stderr).Encode(errorJSON{oneLine(err), code, exit, hint})
		return exit
	}
	fmt.Fprintf(a.stderr, "vdisk: %s\n", oneLine(err))
	switch {
	case hint == "":
	case code == "usage":
		fmt.Fprintf(a.stderr, "usage: %s\n", hint)
	default:
		fmt.Fprintf(a.stderr, "hint: %s\n", hint)
	}
	return exit
}
