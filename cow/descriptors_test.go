package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"golang.org/x/sys/unix"
)

// limitFiles allows the process to open n more files than it has open now. It assumes that nothing else is opened
// meanwhile.
func limitFiles(t *testing.T, n int) {
	t.Helper()
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	fds, err := make([]int, n), error(nil) // the lowest free numbers; what other tests have left open may lie between them
	for i := range fds {
		fds[i], err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
	}
	for _, fd := range fds {
		must(t, unix.Close(fd))
	}
	lim := unix.Rlimit{Cur: uint64(fds[n-1] + 1), Max: old.Max}
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &lim))
	t.Cleanup(func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) })
}

// TestMoreChunksThanDescriptors: a store that has more chunks than the process may have descriptors can be read,
// written, cleaned and checked like any other.
func TestMoreChunksThanDescriptors(t *testing.T) {
	o := Options{checkpointInterval: -1, chunkBytes: 128 << 10}
	s, dir := newStore(t, o)
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	want := make([]byte, 16<<20)
	for i := range int64(16) {
		p := randomBytes(1<<20, uint64(i+1))
		copy(want[i<<20:], p)
		_, err = d.WriteAt(p, i<<20)
		must(t, err)
	}
	must(t, errors.Join(d.Close(), s.Close()))
	for name, early := range map[string]bool{"before it is opened": true, "while it is open": false} {
		t.Run(name, func(t *testing.T) {
			if early {
				limitFiles(t, 24)
			}
			s := open(t, dir, o)
			if n := s.Info().Chunks; n < 100 {
				t.Fatalf("%d chunks", n)
			}
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			if !early {
				limitFiles(t, 16)
			}
			var wg sync.WaitGroup
			for g := range 6 {
				wg.Go(func() {
					buf := make([]byte, 4096)
					for i := range int64(256) {
						off := (i*5 + int64(g)*17) % 256 << 16
						if _, err := d.ReadAt(buf, off); err != nil || !bytes.Equal(buf, want[off:off+4096]) {
							t.Errorf("read at %d: %v", off, err)
							return
						}
					}
				})
			}
			wg.Wait()
			large := make([]byte, len(want)) // all chunks in one read
			if _, err := d.ReadAt(large, 0); err != nil || !bytes.Equal(large, want) {
				t.Errorf("read of all: %v", err)
			}
			p := randomBytes(1<<20, 99)
			copy(want[3<<20:], p)
			_, err = d.WriteAt(p, 3<<20)
			must(t, err)
			must(t, d.Flush())
			_, err = d.WriteAt(p[:512], 7<<20+100) // a partial block, so the write reads
			must(t, err)
			copy(want[7<<20+100:], p[:512])
			must(t, s.Snapshot(Ref{"v", fmt.Sprint("s", early)}))
			_, err = s.Clean(context.Background(), 0.3)
			must(t, err)
			mustEnd(t, s, d)
		})
	}
}

// TestPlanWithoutDescriptors: Hold gets the descriptors of all of a plan's fetches, or keeps none. In the latter case
// Fetch still does the read.
func TestPlanWithoutDescriptors(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1, chunkBytes: 128 << 10})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	want := randomBytes(4<<20, 1)
	_, err = d.WriteAt(want, 0)
	must(t, err)
	must(t, errors.Join(d.Close(), s.Close()))

	limitFiles(t, 24) // enough for a store in which Hold can keep a quarter of the descriptors, at least 4
	s = open(t, dir, Options{checkpointInterval: -1})
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	plan := func(n int) (*ReadPlan, []byte) {
		p, pl := make([]byte, n), new(ReadPlan)
		must(t, d.PlanRead(pl, p, 0))
		return pl, p
	}
	large, got := plan(len(want))
	small, few := plan(4096)
	if large.Hold() {
		t.Errorf("%d descriptors are held", len(large.Fetches()))
	}
	if !small.Hold() {
		t.Error("a plan that could have nothing has kept what others need")
	}
	for _, f := range small.Fetches() {
		if n, err := unix.Pread(f.Fd(), f.Buf, f.Off); n != len(f.Buf) || err != nil {
			t.Error(n, err)
		}
	}
	must(t, small.Finish(nil))
	must(t, large.Fetch())
	if !bytes.Equal(got, want) || !bytes.Equal(few, want[:4096]) {
		t.Error("it reads otherwise than it was written")
	}
	mustEnd(t, s, d)
}

// failing is a directory in which the content of one file cannot be read.
type failing struct {
	storage.FS
	name string
	err  error
}

type failingFile struct {
	storage.File
	err error
}

func (f *failing) Open(name string) (storage.File, error) {
	in, err := f.FS.Open(name)
	if name == f.name && err == nil && f.err != nil {
		return &failingFile{in, &fs.PathError{Op: "read", Path: name, Err: f.err}}, nil
	}
	return in, err
}

func (f *failingFile) ReadAt([]byte, int64) (int, error) { return 0, f.err }
func (f *failingFile) TryReadAt([]byte, int64) bool      { return false }
func (f *failingFile) Size() (int64, error)              { return 0, f.err }
func (f *failingFile) Hold() (fd int, ok bool)           { return -1, false }

// TestAccessIsNoDamage: neither a check nor the cleaner nor Open calls a file damaged that cannot be accessed.
func TestAccessIsNoDamage(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4<<20, 1), 0)
	must(t, err)
	_, err = d.WriteAt(randomBytes(512<<10, 2), 0) // makes half of the first chunk dead
	must(t, err)
	must(t, errors.Join(d.Close(), s.Close()))
	inner, err := storage.OpenDir(filepath.Join(dir, chunksDir))
	must(t, err)
	defer inner.Close()
	for errno, damage := range map[syscall.Errno]bool{syscall.EACCES: false, syscall.EMFILE: false, syscall.ENFILE: false, syscall.EIO: false, syscall.EINVAL: true} {
		if err := os.Remove(filepath.Join(dir, damageFile)); !errors.Is(err, fs.ErrNotExist) {
			must(t, err) // a store that knows of damage reads it again, beside this test
		}
		f := &failing{FS: inner, name: wal.ChunkName(0)}
		s := open(t, dir, Options{checkpointInterval: -1, fs: f})
		f.err = errno
		rep, err := s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) {
			if (p.Kind == KindCorrupt) != damage {
				t.Errorf("%v: %+v", errno, p)
			}
		})
		must(t, err)
		if damage && rep.Corrupt == 0 || !damage && rep.Unreadable == 0 {
			t.Errorf("%v: %+v", errno, rep)
		}
		_, err = s.Clean(context.Background(), 0.05)
		s.mu.Lock()
		marked := s.slots.get(0).damaged
		s.mu.Unlock()
		if reach := !damage && errno != syscall.EIO; marked == reach || reach && !errors.Is(err, errno) {
			t.Errorf("%v: cleaning says %v; the chunk is marked as damaged: %v", errno, err, marked)
		}
		must(t, s.Close())
	}
	// If a header cannot be read, Open does not advise to move the file away.
	s = open(t, dir, Options{checkpointInterval: -1})
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(4096, 3), 0)
	must(t, errors.Join(err, d.Flush()))
	name := s.wal.Current().Name()
	killStore(s)
	_, err = Open(dir, Options{checkpointInterval: -1, fs: &failing{FS: inner, name: name, err: syscall.EACCES}})
	if !errors.Is(err, syscall.EACCES) || errors.Is(err, ErrCorrupt) || strings.Contains(err.Error(), "move it away") {
		t.Error(err)
	}
	mustEnd(t, open(t, dir, Options{checkpointInterval: -1}))
}
