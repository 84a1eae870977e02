package storage

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openDir(t *testing.T) (FS, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "chunks")
	d, err := OpenDir(path)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d, path
}

// fdOf returns the descriptor of a file that is open and not in use.
func fdOf(t *testing.T, f File) int {
	t.Helper()
	fd, ok := f.Hold()
	if !ok {
		t.Fatal("no descriptor")
	}
	f.Release()
	return fd
}

func TestDirectory(t *testing.T) {
	d, path := openDir(t)
	f, err := d.Create("b", 1<<20)
	must(t, err)
	var st unix.Stat_t
	must(t, unix.Fstat(fdOf(t, f), &st))
	if st.Size != 1<<20 || st.Blocks*512 < 1<<20 || st.Mode&0o777 != fileMode {
		t.Errorf("size %d, %d blocks, mode %o", st.Size, st.Blocks, st.Mode)
	}
	if flags, err := unix.FcntlInt(uintptr(fdOf(t, f)), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("descriptor flags", flags, err)
	}
	if _, err := f.WriteAt([]byte("hello"), 4096); err != nil {
		t.Fatal(err)
	}
	must(t, f.Sync())
	must(t, d.SyncDir())
	must(t, f.Truncate(8192))
	must(t, f.Close())

	f, err = d.Open("b")
	must(t, err)
	got := make([]byte, 5)
	if _, err := f.ReadAt(got, 4096); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if size, err := f.Size(); size != 8192 || err != nil {
		t.Error(size, err)
	}
	must(t, f.Close())

	if _, err := d.Create("b", 0); !errors.Is(err, fs.ErrExist) {
		t.Error("create:", err)
	}
	a, err := d.Create("a", 0)
	must(t, err)
	must(t, a.Close())
	for range 2 { // listing does not use up the directory
		if names, err := d.List(); err != nil || !slices.Equal(names, []string{"a", "b"}) {
			t.Error(names, err)
		}
	}
	must(t, d.Remove("b"))
	if _, err := d.Open("b"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("open:", err)
	}
	if err := d.Remove("b"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("remove:", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != dirMode {
		t.Error(info.Mode(), err)
	}
}

func TestNothingOutsideIsReached(t *testing.T) {
	d, path := openDir(t)
	outside := filepath.Join(filepath.Dir(path), "outside")
	must(t, os.WriteFile(outside, []byte("x"), 0o600))
	must(t, os.Symlink(outside, filepath.Join(path, "link")))
	must(t, unix.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	must(t, os.Mkdir(filepath.Join(path, "dir"), 0o700))
	for _, name := range []string{"link", "../outside", outside, "", ".", "..", "dir", "fifo", "a\x00b"} {
		if f, err := d.Open(name); err == nil {
			t.Errorf("opened %q", name)
			f.Close()
		}
	}
	for _, name := range []string{"link", "../new", "dir/new", ""} {
		if f, err := d.Create(name, 0); err == nil {
			t.Errorf("created %q", name)
			f.Close()
		}
	}
	if err := d.Remove("../outside"); !errors.Is(err, fs.ErrInvalid) {
		t.Error("remove:", err)
	}
	link := filepath.Join(filepath.Dir(path), "chunks2")
	must(t, os.Symlink(path, link))
	if _, err := OpenDir(link); err == nil {
		t.Error("opened a directory through a link")
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	d, _ := openDir(t)
	// This is more than any file system allows for a file, so none fills up first.
	if _, err := d.Create("big", 1<<62); !errors.Is(err, unix.EFBIG) && !errors.Is(err, ErrNoSpace) {
		t.Error(err)
	}
	if names, err := d.List(); err != nil || len(names) != 0 {
		t.Error(names, err)
	}
	var st unix.Statfs_t
	must(t, unix.Statfs(t.TempDir(), &st))
	if free, err := d.Free(); err != nil || free <= 0 || free > int64(st.Blocks)*st.Frsize {
		t.Error(free, "bytes free", err)
	}
}

func TestFreeDoesNotOverflow(t *testing.T) {
	for _, x := range []struct {
		n    uint64
		unit int64
		want int64
	}{
		{0, 4096, 0},
		{10, 4096, 40960},
		{1 << 48, 4096, 1 << 60},
		{1<<48 - 1, 4096, 1<<60 - 4096},
		{1 << 51, 4096, freeMost},
		{1<<64 - 1, 4096, freeMost},
		{1 << 63, 1, freeMost},
		{1, -1, 0},
	} {
		if got := bytesOf(x.n, x.unit); got != x.want {
			t.Errorf("%d of %d bytes: %d, want %d", x.n, x.unit, got, x.want)
		}
	}
}

func TestFullDiskMatchesErrNoSpace(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	must(t, err)
	f := &file{d: &dir{in: &Folder{path: "/dev"}}, name: "full", at: -1}
	f.has(full)
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	if !errors.Is(noSpace(&fs.PathError{Err: unix.EDQUOT}), ErrNoSpace) {
		t.Error("a full quota is not ErrNoSpace")
	}
}

func TestWriteZerosReserves(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, writeZeros(f, 3<<20+5))
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, make([]byte, 3<<20+5)) {
		t.Error(len(got), "bytes")
	}
}

func TestTryReadAt(t *testing.T) {
	d, _ := openDir(t)
	f, err := d.Create("a", 1<<20)
	must(t, err)
	defer f.Close()
	want := bytes.Repeat([]byte("vdisk"), 40000)
	_, err = f.WriteAt(want, 1000)
	must(t, err)
	got := make([]byte, len(want))
	if !f.TryReadAt(got, 1000) || !bytes.Equal(got, want) {
		t.Error("what was just written is not in memory")
	}
	// Once the file is out of memory, the data may be there at once or not, but must be there soon.
	must(t, f.Sync())
	must(t, unix.Fadvise(fdOf(t, f), 0, 0, unix.FADV_DONTNEED))
	clear(got)
	for i := 0; !f.TryReadAt(got, 1000); i++ {
		if i == 1000 {
			t.Fatal("nobody reads it")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !bytes.Equal(got, want) {
		t.Error("it reads otherwise than it was written")
	}
	if n := testing.AllocsPerRun(100, func() { f.TryReadAt(got, 1000) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
	if f.TryReadAt(got, 1<<20-10) || f.TryReadAt(got[:1], 2<<20) {
		t.Error("there is nothing behind the end")
	}
}
