package cow

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/storage"
)

// A store that cannot be written to can still be read: docs/engine.md, Read-only stores.

// unwritable returns why this process cannot write to a store, or nil. The reason is the file system, or the
// permissions of the folder or of something in it.
func unwritable(in *storage.Folder) error {
	for _, name := range []string{".", chunksDir, tableFile, lockFile} {
		err := unix.Faccessat(in.Fd(), name, unix.W_OK, unix.AT_EACCESS)
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return &unwritableError{&fs.PathError{Op: "write to", Path: filepath.Clean(in.Join(name)), Err: err}}
		}
	}
	return nil
}

// unwritableError says why a store can only be read. It matches ErrReadOnly.
type unwritableError struct{ err error }

func (e *unwritableError) Error() string   { return fmt.Sprintf("the store can only be read: %v", e.err) }
func (e *unwritableError) Unwrap() []error { return []error{ErrReadOnly, e.err} }

// ReadOnly returns why the store could only be opened for reading, or nil.
func (s *Store) ReadOnly() error { return s.readOnly }

// lockToRead keeps writing owners away from the store; it waits up to timeout for one that has the lock. Any number of
// processes may read at the same time. If there is no lock file, it returns nil: none can be made, and no owner has
// been here, since an owner would have made one.
func lockToRead(in *storage.Folder, timeout time.Duration) (*os.File, error) {
	f, err := in.Open(lockFile, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	if err := flock(f, unix.LOCK_SH, timeout); err != nil {
		return nil, errors.Join(lockedBy(in, f, err), f.Close())
	}
	return f, nil
}

// flock takes a lock on f, waiting up to timeout. It returns EWOULDBLOCK if another process still has the lock.
func flock(f *os.File, how int, timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || !time.Now().Before(deadline) {
			return err
		}
	}
}

// lockedBy returns the error about a lock that another process has. Processes that only read do not write down their
// names.
func lockedBy(in *storage.Folder, f *os.File, err error) error {
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("lock store: %w", err)
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		return &LockedError{Dir: in.Path(), Holder: "a process that reads it and cannot write to it"}
	}
	text, _ := io.ReadAll(io.NewSectionReader(f, 0, 4096)) // best effort: it improves the message
	return &LockedError{Dir: in.Path(), Holder: holderText(text)}
}

// leftInMemory refuses a store whose last owner was killed, if the acknowledged writes of that owner may still be in
// memory: only an owner that writes can put them in their place.
func (s *Store) leftInMemory() error {
	text, err := s.in.Read(ownerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var last ownerRecord
	if err == nil {
		last, err = parseOwner(text)
	}
	now, nerr := s.newOwnerRecord()
	if err = errors.Join(err, nerr); err != nil {
		return fmt.Errorf("what the last owner left in memory is not known: %w", err)
	}
	if last.Boot != now.Boot || last.Ino != now.Ino {
		return nil // of another boot, or copied with the store
	}
	name := "vdisk-" + filepath.Base(last.Buffers)
	path := filepath.Join(s.opts.SharedMemory, name)
	_, err = os.Lstat(path)
	switch {
	case last.Dev != now.Dev:
		s.log.Warn("the store's file system has another device number than its last owner saw, as a copy has: what that had answered and not written is not read", "file", path)
		s.shared.lost = true
		return nil
	case err == nil:
		return fmt.Errorf("the last owner was killed, and what it had answered is in %s: open the store once where it can be written to", path)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("what the last owner had answered and not written: %w", err)
	case (last.Shm == 0 || last.Shm != now.Shm) && !s.opts.ForgetElsewhere:
		return &elsewhereError{buffers: name, dir: s.opts.SharedMemory, there: last.Shm, here: now.Shm}
	}
	s.log.Warn("what the last owner had answered and not written is lost", "file", path)
	s.shared.lost = true
	return nil
}

// readLog is the end of openFiles for a store that cannot be written to. From here on every change is refused, and
// nothing is started that would make a change.
func (s *Store) readLog() error {
	if !s.opts.proves {
		if err := s.leftInMemory(); err != nil {
			return err
		}
	}
	if _, err := s.loadAndReplay(); err != nil {
		return unusable(err)
	}
	r := &s.recovery
	if r.Records > 0 {
		s.log.Info("read the log", "records", r.Records, "bytes", r.Bytes)
	}
	s.wal.Refuse(s.readOnly)
	return nil
}

// onlyLooks makes a store that was opened with Options.Look read-only if going on would remove something from the log
// for good. It reports whether it did.
func (s *Store) onlyLooks(left []leaving) bool {
	r := &s.recovery
	keeps := slices.ContainsFunc(left, func(f leaving) bool { return f.as != "" })
	if !s.opts.Look || r.DroppedBytes == 0 && !r.unsettled && !keeps {
		return false
	}
	why := "the log ends before some of its records, as a power cut leaves it"
	if r.DroppedBytes == 0 && !keeps {
		why = "a part of the log could not be read"
	}
	s.log.Warn(why+"; everything is kept as it is until a command changes the store",
		"records", r.Records, "droppedBytes", r.DroppedBytes, "droppedFiles", r.DroppedFiles)
	s.readOnly = fmt.Errorf("%w: this command only looks, and %s", ErrReadOnly, why)
	s.wal.Refuse(s.readOnly)
	return true
}
