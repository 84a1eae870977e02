package storage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// few returns a directory of n files. Each holds its number. At most limit of them have a descriptor.
func few(t *testing.T, n, limit int) (*dir, []File) {
	t.Helper()
	made, _ := openDir(t)
	d := made.(*dir)
	d.files.limit = limit
	var files []File
	for i := range n {
		f, err := d.Create(name(i), 8192)
		must(t, err)
		files = append(files, f)
		_, err = f.WriteAt(content(i), 0)
		must(t, err)
	}
	t.Cleanup(func() {
		for _, f := range files {
			must(t, f.Close())
		}
	})
	return d, files
}

func name(i int) string { return fmt.Sprintf("%08x", i) }

func content(i int) []byte { return bytes.Repeat([]byte{byte(i), 'x'}, 2048) }

func (d *dir) check(t *testing.T, i int, f File) {
	t.Helper()
	got := make([]byte, 4096)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, content(i)) {
		t.Errorf("file %d: %v", i, err)
	}
}

func (t *table) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.open)
}

func TestMoreFilesThanDescriptors(t *testing.T) {
	d, files := few(t, 40, 6)
	if n := d.files.count(); n > 6 {
		t.Errorf("%d files have a descriptor", n)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for k := range 400 {
				i := k * 7 % len(files)
				d.check(t, i, files[i])
				if k%50 == 0 {
					must(t, files[i].Sync())
				}
			}
		})
	}
	wg.Wait()
	if n := d.files.count(); n > 6+8 {
		t.Errorf("%d files have a descriptor", n)
	}
	// A file that has lost its descriptor can be removed, and can still be read.
	for i, f := range files {
		must(t, d.Remove(name(i)))
		d.check(t, i, f)
	}
	if names, err := d.List(); err != nil || len(names) != 0 {
		t.Error(names, err)
	}
	for i, f := range files { // even if another file has the same name
		g, err := d.Create(name(i), 0)
		must(t, err)
		_, err = g.WriteAt([]byte("new"), 0)
		must(t, errors.Join(err, g.Close()))
		d.check(t, i, f)
	}
}

// TestHeldDescriptorsStay checks that a descriptor that is held for a ring stays open, and that Hold fails if it would
// have to wait for one.
func TestHeldDescriptorsStay(t *testing.T) {
	d, files := few(t, 20, 4)
	for _, f := range files {
		must(t, f.Sync())
	}
	held := map[int]int{}
	for i, f := range files {
		if fd, ok := f.Hold(); ok {
			held[i] = fd
		}
	}
	if len(held) < 4 {
		t.Fatalf("%d of 4 could be held", len(held))
	}
	if len(held) > 4 {
		t.Errorf("%d were held where 4 are allowed", len(held))
	}
	for i, f := range files { // other operations get a descriptor nevertheless
		d.check(t, i, f)
	}
	for i, fd := range held {
		var got [1]byte
		if _, err := unix.Pread(fd, got[:], 0); err != nil || got[0] != byte(i) {
			t.Errorf("file %d: the held descriptor reads %d, %v", i, got, err)
		}
		files[i].Release()
	}
	for _, f := range files {
		if _, ok := f.Hold(); !ok {
			t.Error("no descriptor where none is in use")
		} else {
			f.Release()
		}
	}
}

// TestEvictionSyncs checks that a descriptor is not closed before everything written through it is durable, and that
// Sync reports a failure of that.
func TestEvictionSyncs(t *testing.T) {
	d, files := few(t, 4, 100)
	for d.files.evict(false) {
	}
	for i, f := range files {
		if f := f.(*file); f.desc.Load() != nil || !f.clean() {
			t.Errorf("file %d is open or was not synced", i)
		}
		d.check(t, i, f)
	}
	if d.files.evict(true); !files[0].(*file).clean() {
		t.Error("it was synced")
	}
	_, err := files[1].WriteAt([]byte{1}, 0)
	must(t, err)
	for d.files.evict(true) { // a hasty caller closes only clean files
	}
	if files[1].(*file).desc.Load() == nil {
		t.Error("a file that was written to was closed without a sync")
	}

	// A socket cannot be synced.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(pair[0])
	f := &file{d: d, name: name(0), at: -1}
	f.wrote.Store(1)
	f.has(os.NewFile(uintptr(pair[1]), "socket"))
	for d.files.evict(false) {
	}
	if f.desc.Load() == nil {
		t.Fatal("closed, although it could not be synced")
	}
	for range 2 {
		if err := f.Sync(); !errors.Is(err, unix.EINVAL) {
			t.Error("the failure was forgotten:", err)
		}
	}
	must(t, f.desc.Load().Close())
}

// TestWriteBesideSync checks that a write that ends after a sync has begun does not count as durable.
func TestWriteBesideSync(t *testing.T) {
	d, files := few(t, 2, 100)
	f := files[0].(*file)
	must(t, f.change(func(fd *descriptor) error {
		_, err := fd.WriteAt([]byte{1}, 0)
		return errors.Join(f.Sync(), err) // a sync may come before the end of a write
	}))
	if f.clean() {
		t.Error("a write that ended after the sync counts as durable")
	}
	for d.files.evict(true) {
	}
	if f.desc.Load() == nil {
		t.Error("the file was closed without a sync")
	}
	must(t, f.Sync())
	if !f.clean() {
		t.Error("nothing is durable")
	}
}

// TestTryReadAtSyncsNothing checks that a caller that does not want to wait for the disk does not wait for the sync
// that would free a descriptor, either.
func TestTryReadAtSyncsNothing(t *testing.T) {
	d, files := few(t, 8, 4)
	for _, f := range files[:4] {
		_, err := f.WriteAt([]byte{1}, 4096)
		must(t, err)
	}
	if files[6].TryReadAt(make([]byte, 16), 0) {
		t.Error("read, although all descriptors are of files that were written to")
	}
	for i, f := range files[:4] {
		if f.(*file).clean() {
			t.Errorf("file %d was synced", i)
		}
	}
	d.check(t, 6, files[6])
	if !files[6].TryReadAt(make([]byte, 16), 0) {
		t.Error("not read, although there is a descriptor")
	}
}

// TestNoDescriptorsLeft limits the descriptors of the process. Those that are not in use must be closed, and if all are
// in use, an operation must wait for one.
func TestNoDescriptorsLeft(t *testing.T) {
	d, files := few(t, 30, 100)
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	for d.files.evict(false) {
	}
	lowest, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0) // the next free number
	must(t, err)
	must(t, unix.Close(lowest))
	lim := unix.Rlimit{Cur: uint64(lowest) + 3, Max: old.Max}
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &lim))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) }()

	for i, f := range files {
		d.check(t, i, f)
	}
	g, err := d.Create("new", 4096)
	must(t, err)
	must(t, g.Close())
	if names, err := d.List(); err != nil || len(names) != 31 {
		t.Error(len(names), err)
	}
	must(t, d.Remove(name(0)))
	d.check(t, 0, files[0])
	must(t, files[0].Close())
	files[0], err = d.Open("new")
	must(t, err)

	var held []File
	for _, f := range files[1:] {
		if _, ok := f.Hold(); ok {
			held = append(held, f)
		}
	}
	if len(held) == 0 || len(held) > 3 {
		t.Fatalf("%d held", len(held))
	}
	timer := time.AfterFunc(50*time.Millisecond, func() {
		for _, f := range held {
			f.Release()
		}
	})
	defer timer.Stop()
	d.check(t, 20, files[20])
}

// TestReadOnlyDirectory checks that nothing can be made or removed in a directory that was opened for reading.
func TestReadOnlyDirectory(t *testing.T) {
	_, path := openDir(t)
	must(t, os.WriteFile(filepath.Join(path, "a"), []byte("hello"), 0o400))
	must(t, unix.Mkfifo(filepath.Join(path, "fifo"), 0o600))
	in, err := OpenFolder(path, false)
	must(t, err)
	d := in.FilesToRead()
	defer d.Close()
	f, err := d.Open("a")
	must(t, err)
	got := make([]byte, 5)
	if _, err := f.ReadAt(got, 0); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := f.WriteAt(got, 0); err == nil {
		t.Error("written")
	}
	must(t, f.Close())
	if _, err := d.Open("fifo"); !errors.Is(err, ErrIrregular) {
		t.Error(err)
	}
	if _, err := d.Create("b", 0); !errors.Is(err, unix.EROFS) {
		t.Error("create:", err)
	}
	if err := d.Remove("a"); !errors.Is(err, unix.EROFS) {
		t.Error("remove:", err)
	}
}
