package cow

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/storage"
)

// LockFolder keeps owners of the store in a folder away until the returned lock is closed. It waits up to timeout. It
// is for callers that change files that belong to an owner and not to the store.
func LockFolder(in *storage.Folder, timeout time.Duration, holder string) (io.Closer, error) {
	return lockStore(in, timeout, holder)
}

// lockStore takes the store's lock, waiting up to timeout, and writes the holder into the lock file.
func lockStore(in *storage.Folder, timeout time.Duration, holder string) (*os.File, error) {
	f, err := in.Open(lockFile, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	if err := flock(f, unix.LOCK_EX, timeout); err != nil {
		return nil, errors.Join(lockedBy(in, f, err), f.Close())
	}
	if holder == "" {
		holder = filepath.Base(os.Args[0])
	}
	text := fmt.Sprintf("pid %d %s\n", os.Getpid(), holder)
	// Write before truncating: a full file system might not give a freed block back.
	if err := errors.Join(writeAt0(f, text), f.Truncate(int64(len(text)))); err != nil {
		return nil, errors.Join(fmt.Errorf("lock store: %w", err), f.Close())
	}
	return f, nil
}

func writeAt0(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// holderText returns the holder as the first line of the lock file names it, or "another process" if that line is
// empty.
func holderText(b []byte) string {
	for i, c := range b {
		if c < ' ' {
			b = b[:i]
			break
		}
	}
	if len(b) == 0 {
		return "another process"
	}
	return string(b)
}
