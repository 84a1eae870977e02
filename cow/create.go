package cow

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
	"golang.org/x/sys/unix"
)

// Create makes a store in dir, and makes dir if it does not exist. If dir is a store already, Create does nothing. It
// refuses a directory with anything else in it (ErrNotStore), and a directory of another user (ErrForeign).
func Create(dir string) error { return CreateIn(dir, false) }

// CreateIn is like Create, but also accepts a directory of another user if foreign is true.
func CreateIn(dir string, foreign bool) error {
	if err := makeDirs(dir); err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	// Other users may still have the right to change the directory. What counts is what it holds once they have lost
	// it.
	in, err := storage.OpenFolder(dir, true)
	if err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	defer in.Close()
	// Check a foreign directory before a lock is written into it, and again under the lock, since another process may
	// be making the store.
	if is, err := isStore(in); is || err != nil {
		return err
	}
	if err := checkUninitialized(in); err != nil {
		return err
	}
	if err := in.Own(foreign); err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	lock, err := lockStore(in, 0, "vdisk create")
	if err != nil {
		if errors.Is(err, ErrBusy) {
			if is, serr := isStore(in); is {
				return serr
			}
		}
		return err
	}
	defer lock.Close()
	if is, err := isStore(in); is || err != nil {
		return err
	}
	if err := checkUninitialized(in); err != nil {
		return err
	}
	if err := makeStore(in); err != nil {
		return fmt.Errorf("make store %s: %w", dir, fault.NoSpace(err))
	}
	return nil
}

// isStore reports whether the folder is a store, by the file format. If it is, the name of that file is made durable:
// the process that made it may have been killed before its sync.
func isStore(in *storage.Folder) (bool, error) {
	_, err := readFormat(in)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, syncFolder(in)
}

var syncFolder = (*storage.Folder).Sync // tests replace it

// makeDirs makes a directory, and those above it that do not exist, and makes each name durable, from the top down. It
// syncs the name of dir even if dir exists: the process that made it may have been killed before its sync.
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

// checkUninitialized refuses a directory that holds anything but the remains of an interrupted Create.
func checkUninitialized(in *storage.Folder) error {
	names, err := in.Names()
	if err != nil {
		return fmt.Errorf("make store: %w", err)
	}
	for _, n := range names {
		switch n {
		case lockFile, tableFile, tableFile + metadata.VerifiedSuffix, metadata.CopyNames[0], metadata.CopyNames[1], formatFile + ".tmp", "lost+found":
		case chunksDir:
			if !isEmpty(in, chunksDir) {
				return fmt.Errorf("%s has chunk files but no %q file, so it is a damaged store or not one: %w", in.Path(), formatFile, ErrNotStore)
			}
		default:
			return fmt.Errorf("%s is not empty (it has %q) and is not a store; choose another --store: %w", in.Path(), n, ErrNotStore)
		}
	}
	return nil
}

// isEmpty reports whether in holds an empty directory called name.
func isEmpty(in *storage.Folder, name string) bool {
	sub, err := in.Sub(name)
	if err != nil {
		return false
	}
	defer sub.Close()
	names, err := sub.Names()
	return err == nil && len(names) == 0
}

// makeStore makes the files of a store. It writes format last: until that file exists, there is no store.
func makeStore(in *storage.Folder) error {
	var uuid [16]byte
	if _, err := rand.Read(uuid[:]); err != nil {
		return err
	}
	chunks, err := in.Sub(chunksDir)
	if err != nil {
		return err
	}
	if err := errors.Join(syncDir(chunks.Path()), chunks.Close()); err != nil {
		return err
	}
	// An interrupted Create may have left these.
	for _, name := range append(metadata.CopyNames[:], tableFile, tableFile+metadata.VerifiedSuffix) {
		if err := in.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	db, err := metadata.Open(in.Join(tableFile), metadata.Options{In: in, Create: true, Store: uuid, Copy: in.Files()})
	if err != nil {
		return err
	}
	err = db.Update(func(*metadata.Tx) error { return nil }) // now the table says which store it belongs to
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	info := format.NewStoreInfo(uuid, time.Now().UTC().Truncate(time.Second))
	text, err := info.Encode()
	if err != nil {
		return err
	}
	return in.Replace(formatFile, text, true)
}

// syncName makes the name of a directory durable. If this process may pass the parent but not read it, the parent
// cannot be synced by itself, so syncName syncs the whole file system.
func syncName(dir string) error {
	err := syncDir(filepath.Dir(dir))
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(storage.Retry(func() error { return unix.Syncfs(int(d.Fd())) }), d.Close())
}

// syncDir makes the names in a directory durable. It is a variable so that tests can observe it.
var syncDir = func(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFormat reads the file "format". If a store has lost that file, the error matches ErrUnusable, and neither
// ErrNotStore nor fs.ErrNotExist.
func readFormat(in *storage.Folder) (format.StoreInfo, error) {
	info, err := decodeFormat(in)
	if !lostFormat(err) || !hasStore(in) {
		return info, err
	}
	// Create writes the file before any chunk file exists, but perhaps after decodeFormat looked for it above.
	if info, err = decodeFormat(in); !lostFormat(err) {
		return info, err
	}
	return info, unusable(fmt.Errorf("%w: %v; the table and the chunk files are there; a copy of %s from a backup of this store will do: "+
		"it changes only when a newer vdisk first opens the store", ErrCorrupt, err, in.Join(formatFile)))
}

func decodeFormat(in *storage.Folder) (info format.StoreInfo, err error) {
	text, err := in.Read(formatFile)
	if err == nil {
		info, err = format.DecodeStoreInfo(text)
	}
	if err != nil {
		err = fmt.Errorf("store %s: file %q: %w", in.Path(), formatFile, err)
	}
	return info, err
}

// lostFormat reports whether err says that the file does not exist, or is not what Create or an upgrade writes.
func lostFormat(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrNotStore) || errors.Is(err, ErrCorrupt)
}

// hasStore reports whether a directory has a table and chunk files. An interrupted Create leaves no chunk files.
func hasStore(in *storage.Folder) bool {
	for _, name := range []string{tableFile, chunksDir} {
		if _, err := in.Lstat(name); err != nil {
			return false
		}
	}
	return !isEmpty(in, chunksDir)
}
