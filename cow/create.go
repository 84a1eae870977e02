package cow

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// Create makes a store in dir, which is made if needed. It is no error when dir is a
// store already. A directory with anything else in it is refused (ErrNotStore).
func Create(dir string) error {
	if err := makeDirs(dir); err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	// A foreign directory is looked at before a lock is written into it, and
	// again under the lock, since another process may be making the store.
	if _, err := readFormat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := onlyLeavings(dir); err != nil {
		return err
	}
	lock, err := lockStore(dir, 0, "vdisk create")
	if err != nil {
		if errors.Is(err, ErrBusy) {
			if _, ferr := readFormat(dir); ferr == nil {
				return nil
			}
		}
		return err
	}
	defer lock.Close()
	if _, err := readFormat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := onlyLeavings(dir); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	if err := makeStore(dir); err != nil {
		return fmt.Errorf("make store %s: %w", dir, noSpace(err))
	}
	return nil
}

// makeDirs makes a directory and those above it that are not there, and makes the name of each durable, from the top
// down. It does so for the directory itself even if that is there: whoever made it may have been killed before the sync.
func makeDirs(dir string) error {
	parent := filepath.Dir(dir)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := makeDirs(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if in, serr := os.Stat(dir); serr != nil || !in.IsDir() {
			return err
		}
	}
	return syncName(dir)
}

// onlyLeavings refuses a directory that holds anything but what an interrupted Create leaves.
func onlyLeavings(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	for _, n := range names {
		switch n.Name() {
		case lockFile, tableFile, tableFile + metadata.VerifiedSuffix, formatFile + ".tmp", "lost+found":
		case chunksDir:
			if in, err := os.ReadDir(filepath.Join(dir, chunksDir)); err != nil || len(in) > 0 {
				return fmt.Errorf("%s has chunk files but no %q file, so it is a damaged store or not one: %w", dir, formatFile, ErrNotStore)
			}
		default:
			return fmt.Errorf("%s is not empty (it has %q) and is not a store; choose another --store: %w", dir, n.Name(), ErrNotStore)
		}
	}
	return nil
}

// makeStore writes format last: until it is there, there is no store.
func makeStore(dir string) error {
	var uuid [16]byte
	if _, err := rand.Read(uuid[:]); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, chunksDir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncDir(filepath.Join(dir, chunksDir)); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, tableFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{})
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	info := format.NewStoreInfo(uuid, time.Now().UTC().Truncate(time.Second))
	text, err := info.Encode()
	if err != nil {
		return err
	}
	return writeFileDurably(dir, formatFile, text)
}

// writeFileDurably replaces a file: temporary file, fsync, rename, fsync of the directory.
func writeFileDurably(dir, name string, text []byte) error {
	tmp := filepath.Join(dir, name+".tmp")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return err
	}
	return syncDir(dir)
}

// syncName makes the name of a directory durable. A parent that may be passed but not read cannot be synced by itself;
// its file system can.
func syncName(dir string) error {
	err := syncDir(filepath.Dir(dir))
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// syncDir makes the names in a directory durable; tests look on.
var syncDir = func(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readFormat(dir string) (format.StoreInfo, error) {
	text, err := os.ReadFile(filepath.Join(dir, formatFile))
	if err != nil {
		return format.StoreInfo{}, fmt.Errorf("store %s: %w", dir, err)
	}
	info, err := format.DecodeStoreInfo(text)
	if err != nil {
		return info, fmt.Errorf("store %s: %w", dir, err)
	}
	return info, nil
}
