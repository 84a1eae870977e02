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

// lockStore takes the store's lock, waiting up to timeout, and writes down who has it.
func lockStore(in *storage.Folder, timeout time.Duration, holder string) (*os.File, error) {
	f, err := in.Open(lockFile, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	deadline := time.Now().Add(timeout)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || !time.Now().Before(deadline) {
			text, _ := io.ReadAll(io.LimitReader(f, 4096)) // best effort: the message is better with it
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, &LockedError{Dir: in.Path(), Holder: holderText(text)}
			}
			return nil, fmt.Errorf("lock store: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if holder == "" {
		holder = filepath.Base(os.Args[0])
	}
	text := fmt.Sprintf("pid %d %s\n", os.Getpid(), holder)
	if err := errors.Join(f.Truncate(0), writeAt0(f, text)); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock store: %w", err)
	}
	return f, nil
}

func writeAt0(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

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
