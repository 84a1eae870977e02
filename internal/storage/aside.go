package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// asideSuffix is added to the directory's name to get the name of the directory beside it.
const asideSuffix = ".aside"

// aside opens the directory of the files that were set aside. If it does not exist and create is true, aside makes it.
func (d *dir) aside(create bool) (*Folder, error) {
	name := filepath.Base(d.in.path) + asideSuffix
	up, err := openAt(d.in, "..")
	if err != nil {
		return nil, err
	}
	defer up.Close()
	if _, err := up.Lstat(name); err != nil && (!create || !errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	return up.Sub(name)
}

// openAt opens a directory relative to another.
func openAt(in *Folder, name string) (*Folder, error) {
	path := in.Join(name)
	fd, err := retry(func() (int, error) {
		return unix.Openat(in.Fd(), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	d, err := newFolder(path, f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

func (d *dir) SetAside(name, as string) (err error) {
	for _, n := range []string{name, as} {
		if _, err := joined(d.in.path, n); err != nil {
			return fmt.Errorf("set aside: %w", err)
		}
	}
	aside, err := d.aside(true)
	if err != nil {
		return fmt.Errorf("set aside %s: %w", name, noSpace(err))
	}
	defer func() { err = errors.Join(err, aside.Close()) }()
	to := as
	for i := 1; ; i++ { // no other process sets anything aside
		_, err := aside.Lstat(to)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return fmt.Errorf("set aside: %w", err)
		}
		to = fmt.Sprintf("%s.%d", as, i)
	}
	if err := Retry(func() error { return unix.Renameat(d.in.Fd(), name, aside.Fd(), to) }); err != nil {
		return fmt.Errorf("set aside: %w", noSpace(&os.LinkError{Op: "rename", Old: d.in.Join(name), New: aside.Join(to), Err: err}))
	}
	return aside.Sync()
}

func (d *dir) PruneAside(prefix string, keep int) error {
	aside, err := d.aside(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("set aside: %w", err)
	}
	names, err := aside.Names()
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, prefix) })
	for i := 0; i < len(names)-keep && err == nil; i++ {
		err = aside.Remove(names[i])
	}
	return errors.Join(err, aside.Close())
}
