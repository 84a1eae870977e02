package storage

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/testcache"
	"golang.org/x/sys/unix"
)

// TestReadDisk reads ranges of a file with any alignment, and what was just written.
func TestReadDisk(t *testing.T) {
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := make([]byte, 3*DiskAlign+777)
	for i := range want {
		want[i] = byte(rand.Uint32())
	}
	f, err := d.Create("a", int64(len(want)))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(want, 0); err != nil { // it is not on the disk yet
		t.Fatal(err)
	}
	for _, r := range []struct{ off, n int }{
		{0, DiskAlign},
		{DiskAlign, 2 * DiskAlign},
		{2 * DiskAlign, 2 * DiskAlign},
		{3 * DiskAlign, DiskAlign},
		{4 * DiskAlign, DiskAlign},
		{1, 100},
		{DiskAlign - 1, DiskAlign},
		{len(want) - 10, 20},
	} {
		p := DiskBuffer(r.n)
		n, err := f.ReadDisk(p, int64(r.off))
		left := want[min(r.off, len(want)):]
		if n != min(len(left), r.n) || !bytes.Equal(p[:n], left[:n]) || n == len(p) && err != nil || n < len(p) && !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes at %d: %d, %v", r.n, r.off, n, err)
		}
	}
	if err := d.Remove("a"); err != nil {
		t.Fatal(err)
	}
	p := DiskBuffer(DiskAlign)
	if _, err := f.ReadDisk(p, 0); err != nil || !bytes.Equal(p, want[:len(p)]) {
		t.Error("without its name:", err)
	}
}

// TestReadDiskLeavesTheCache: what memory did not have, it does not have after ReadDisk, either. Otherwise the reader of
// a whole store would push out what others use.
func TestReadDiskLeavesTheCache(t *testing.T) {
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := d.Create("a", 64*DiskAlign)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, ok := f.Hold()
	if !ok {
		t.Fatal("no descriptor")
	}
	defer f.Release()
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type == unix.TMPFS_MAGIC {
		t.Skip("this file system keeps everything in memory", err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 64*DiskAlign), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); testcache.Pages(t, fd, 64*DiskAlign) > 0; time.Sleep(10 * time.Millisecond) {
		if err := unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED); err != nil || time.Now().After(end) {
			t.Fatal("the file stays in memory", err)
		}
	}
	p := DiskBuffer(DiskAlign)
	for at := int64(0); at < 64*DiskAlign; at += DiskAlign {
		if _, err := f.ReadDisk(p, at); err != nil || p[0] != 1 {
			t.Fatal(err)
		}
	}
	if n := testcache.Pages(t, fd, 64*DiskAlign); n > 0 {
		t.Errorf("ReadDisk filled %d pages of the page cache", n)
	}
	if _, err := f.ReadAt(p, 0); err != nil || testcache.Pages(t, fd, 64*DiskAlign) == 0 {
		t.Error("a page that was just read is not in memory", err)
	}
}
