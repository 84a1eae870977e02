// Package crashtable cuts the power within the commits of a bbolt file.
//
// bbolt commits in this order, and order_test.go of cmd/vdisk holds it to that by its system calls:
//
//	write         the pages that the commit has made, in the order of their numbers
//	fdatasync
//	write         one of the two meta pages, which makes the new state the file's
//	fdatasync
//
// A [Table] sees each of these writes with its bytes, and copies it to a file in a crashfs, which then says what a power
// cut leaves: any prefix of the pages, any subset, and any sectors of them, with the file grown or not; or all pages
// and any sectors of the meta page.
//
// bbolt passes all writes through one function, db.ops.writeAt, which its own tests replace. It is not exported, so it
// is found by reflection here; if bbolt moves it, [Attach] panics. Everything else would be less exact or less simple.
// A comparison of the file before and after a commit shows neither the order nor the commits that fail. ptrace and
// seccomp need another process that copies the state of this one at each system call. A file system of FUSE that allows
// a shared mapping needs root. The syncs are system calls of bbolt's own, which nothing in the process can see. So they
// are known by their place: one is before each write of a meta page, and one after it.
package crashtable

import (
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"unsafe"

	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// Step is a step of a commit.
type Step uint8

// The steps of a commit, in order. The first comes once for each page, which may have overflow pages.
const (
	WritePage Step = iota
	SyncPages
	WriteMeta
	SyncMeta
)

// String returns a description of the step.
func (s Step) String() string {
	return [...]string{"the write of a page", "the sync of the pages", "the write of the meta page", "the sync of the meta page"}[s]
}

const name = "table"

var pageSize = os.Getpagesize() // bbolt's, too

// NewDisk returns a disk that durably has a table with the given content.
func NewDisk(content []byte) (*crashfs.FS, error) {
	disk := crashfs.New()
	f, err := disk.Create(name, int64(len(content)))
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(content, 0); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	return disk, disk.SyncDir()
}

// Content returns what a process that reads the table on the disk sees.
func Content(disk *crashfs.FS) ([]byte, error) {
	f, err := disk.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	p := make([]byte, size)
	_, err = f.ReadAt(p, 0)
	return p, err
}

// Sync makes the table on the disk durable, but for what a failed sync covered.
func Sync(disk *crashfs.FS) error {
	f, err := disk.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Table is a table in use, and its copy on a disk that can lose power. One commit runs at a time.
type Table struct {
	disk   *crashfs.FS
	f      storage.File
	next   func(p []byte, off int64) (int, error) // writes to the file itself
	before func(Step) error
}

// Attach makes the commits of db, which is a *metadata.DB, go to a disk as well, which has the table as it is now.
// Before each step of a commit it calls before. If that returns an error, the step fails with it: of a write that fails,
// half of the pages are written, and nothing if it is one page.
func Attach(db any, disk *crashfs.FS, before func(Step) error) (*Table, error) {
	f, err := disk.Open(name)
	if err != nil {
		return nil, err
	}
	b := reflect.ValueOf(db).Elem().FieldByName("b").Elem()
	field := b.FieldByName("ops").FieldByName("writeAt")
	writeAt := (*func([]byte, int64) (int, error))(unsafe.Pointer(field.UnsafeAddr()))
	t := &Table{disk: disk, f: f, next: *writeAt, before: before}
	*writeAt = t.writeAt
	return t, nil
}

// Grow makes the copy n bytes larger. It must be called when the file becomes larger.
func (t *Table) Grow(n int64) error {
	size, err := t.f.Size()
	if err != nil {
		return err
	}
	return t.f.Allocate(size + n)
}

// writeAt stands in for bbolt's function.
func (t *Table) writeAt(p []byte, off int64) (int, error) {
	if off >= int64(2*pageSize) {
		return t.write(WritePage, p, off)
	}
	if err := t.sync(SyncPages); err != nil {
		return 0, err
	}
	if n, err := t.write(WriteMeta, p, off); err != nil {
		return n, err
	}
	return len(p), t.sync(SyncMeta)
}

func (t *Table) write(s Step, p []byte, off int64) (int, error) {
	failure := t.before(s)
	if failure != nil {
		p = p[:len(p)/pageSize/2*pageSize]
		failure = &fs.PathError{Op: "write", Path: name, Err: failure}
	}
	if _, err := t.f.WriteAt(p, off); err != nil {
		return 0, err
	}
	n, err := t.next(p, off)
	if err == nil {
		err = failure
	}
	return n, err
}

func (t *Table) sync(s Step) error {
	failure := t.before(s)
	if failure != nil {
		t.disk.FailAt(crashfs.OpSync, 1, failure)
	}
	if err := t.f.Sync(); err != nil {
		return fmt.Errorf("%v: %w", s, err)
	}
	return nil
}
