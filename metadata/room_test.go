package metadata

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
)

// putLeaves stores n leaves of about 2 KiB each.
func putLeaves(db *DB, from, n uint32) error {
	var l format.Leaf
	for i := range l.Entries {
		l.Entries[i] = format.MakeEntry(uint32(i*7919%65536), uint32(4096+i*48), 48, 1, 0)
	}
	v := format.AppendLeaf(nil, &l)
	return db.Update(func(tx *Tx) error {
		for i := range n {
			if err := tx.PutLeaf(Version{1, from + i, 1}, v); err != nil {
				return err
			}
		}
		return nil
	})
}

func leavesIn(t *testing.T, db *DB) (n int) {
	t.Helper()
	must(t, db.View(func(tx *Tx) error { var err error; n, _, err = tx.Counts(); return err }))
	return n
}

// TestTableStaysWithinItsBlocks lets the file system refuse more blocks from some point on. The commit that needs more
// changes nothing and can be tried again, and pages that were given up serve later commits.
func TestTableStaysWithinItsBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	full := false
	db, err := Open(path, Options{Create: true, Allocate: func(f *os.File, from, to int64) error {
		if full {
			return unix.ENOSPC
		}
		return Allocate(f, from, to)
	}})
	must(t, err)
	must(t, putLeaves(db, 0, 1000))
	must(t, db.Grow(1<<20)) // for 100 leaves, until the 100 before them are given up
	full = true
	info, err := os.Stat(path)
	must(t, err)
	free, used := db.Room()
	if free+used != info.Size() || used < 1000*1800 {
		t.Errorf("%d bytes free and %d used of %d", free, used, info.Size())
	}
	var s unix.Stat_t
	must(t, unix.Stat(path, &s))
	if s.Blocks*512 < s.Size {
		t.Errorf("%d bytes allocated of %d", s.Blocks*512, s.Size)
	}
	if err := putLeaves(db, 5000, 4000); !errors.Is(err, ErrUnwritten) || !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if n := leavesIn(t, db); n != 1000 {
		t.Errorf("%d leaves after a commit that failed", n)
	}
	for range 5 { // each uses the pages that the one before gave up
		must(t, db.Update(func(tx *Tx) error {
			for i := range uint32(100) {
				if err := tx.DropLeaf(Version{1, i, 1}); err != nil {
					return err
				}
			}
			return nil
		}))
		must(t, putLeaves(db, 0, 100))
	}
	if err := db.Grow(1 << 20); !errors.Is(err, ErrUnwritten) {
		t.Error("grew: ", err)
	}
	full = false
	must(t, db.Grow(1<<20))
	if more, _ := db.Room(); more < 1<<20 {
		t.Errorf("%d bytes of room after growing by 1 MiB", more)
	}
	must(t, putLeaves(db, 5000, 4000))
	must(t, db.Close())
	db, err = Open(path, Options{})
	must(t, err)
	if n := leavesIn(t, db); n != 5000 {
		t.Errorf("%d leaves", n)
	}
	must(t, db.Close())
}

// TestOldTableWithAHole opens a table whose file bbolt has grown by itself, with a hole behind its pages.
func TestOldTableWithAHole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	db, err := Open(path, Options{Create: true})
	must(t, err)
	must(t, putLeaves(db, 0, 10))
	must(t, db.Close())
	must(t, os.Truncate(path, 4<<20))
	db, err = Open(path, Options{})
	must(t, err)
	must(t, db.Adopt())
	var s unix.Stat_t
	must(t, unix.Stat(path, &s))
	if free, _ := db.Room(); s.Blocks*512 < s.Size || free < 3<<20 {
		t.Errorf("%d bytes allocated of %d, %d free", s.Blocks*512, s.Size, free)
	}
	must(t, db.Close())
}

// become puts a device in the place of bbolt's file until undo is called. Writes to /dev/null go nowhere, and its syncs
// fail. Writes to /dev/full find no room.
func become(t *testing.T, f *os.File, device string) (undo func()) {
	t.Helper()
	fd := int(f.Fd())
	kept, err := unix.Dup(fd)
	must(t, err)
	null, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Dup3(null, fd, unix.O_CLOEXEC))
	must(t, unix.Close(null))
	return func() {
		must(t, unix.Dup3(kept, fd, unix.O_CLOEXEC))
		must(t, unix.Close(kept))
	}
}

// TestFailedSyncIsFinal lets a sync fail in a commit, and later syncs succeed. Nothing more may be written, because in
// memory the pages that the last durable state refers to count as free.
func TestFailedSyncIsFinal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	db, err := Open(path, Options{Create: true})
	must(t, err)
	must(t, putLeaves(db, 0, 100))
	must(t, db.Update(func(tx *Tx) error { return tx.DropLeaf(Version{1, 1, 1}) })) // pages to write to
	undo := become(t, db.room.f, "/dev/null")
	err = db.Update(func(tx *Tx) error { return tx.DropLeaf(Version{1, 2, 1}) })
	undo()
	if err == nil || errors.Is(err, ErrUnwritten) {
		t.Fatal("the commit whose sync failed:", err)
	}
	before, err := os.ReadFile(path)
	must(t, err)
	if err := putLeaves(db, 200, 1); err == nil || errors.Is(err, ErrUnwritten) {
		t.Error("a commit after that:", err)
	}
	after, err := os.ReadFile(path)
	must(t, err)
	if string(before) != string(after) {
		t.Error("the file has been written to after its sync had failed")
	}
	if _, err := os.Stat(path + VerifiedSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Error("it counts as verified:", err)
	}
	must(t, db.Close())
}

// TestWhatIsUnwritten distinguishes a write for which there was no room from a sync that fails with the same errno,
// which bbolt returns as it is.
func TestWhatIsUnwritten(t *testing.T) {
	for _, errno := range []error{unix.ENOSPC, unix.EDQUOT, unix.EFBIG} {
		if !errors.Is(unwritten(&fs.PathError{Op: "write", Err: errno}), ErrUnwritten) {
			t.Error("a write:", errno)
		}
		if errors.Is(unwritten(errno), ErrUnwritten) {
			t.Error("a sync:", errno)
		}
	}
	if errors.Is(unwritten(&fs.PathError{Op: "write", Err: unix.EIO}), ErrUnwritten) {
		t.Error("a write that failed otherwise")
	}
}

// TestWriteWithoutRoom lets a write find no room, as on file systems that write elsewhere when they overwrite. The
// Update can be tried again.
func TestWriteWithoutRoom(t *testing.T) {
	db, err := Open(filepath.Join(t.TempDir(), "t"), Options{Create: true})
	must(t, err)
	must(t, putLeaves(db, 0, 100))
	must(t, db.Update(func(tx *Tx) error { return tx.DropLeaf(Version{1, 1, 1}) })) // pages to write to
	drop := func() error { return db.Update(func(tx *Tx) error { return tx.DropLeaf(Version{1, 2, 1}) }) }
	undo := become(t, db.room.f, "/dev/full")
	err = drop()
	undo()
	if !errors.Is(err, ErrUnwritten) || !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if n := leavesIn(t, db); n != 99 {
		t.Errorf("%d leaves after a commit that failed", n)
	}
	must(t, drop())
	if n := leavesIn(t, db); n != 98 {
		t.Errorf("%d leaves after one that worked", n)
	}
	must(t, db.Close())
}
