package owner

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/ublk"
)

// scarce is a directory whose files never have a descriptor for Hold.
type scarce struct{ storage.FS }

type scarceFile struct{ storage.File }

func (s scarce) Open(name string) (storage.File, error) {
	f, err := s.FS.Open(name)
	return scarceFile{f}, err
}

func (s scarce) Create(name string, size int64) (storage.File, error) {
	f, err := s.FS.Create(name, size)
	return scarceFile{f}, err
}

func (scarceFile) Hold() (fd int, ok bool) { return -1, false }

// TestReadWithoutDescriptors: if the queue's ring can get no descriptors for a read, a worker executes it. The queue's
// thread does not wait, because its own reads may be using all descriptors.
func TestReadWithoutDescriptors(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(cow.Create(dir))
	inner, err := storage.OpenDir(filepath.Join(dir, "chunks"))
	must(err)
	defer inner.Close()
	s, err := cow.OpenOver(dir, scarce{inner}, cow.Options{})
	must(err)
	defer s.Close()
	_, err = s.CreateVolume("v", cow.VolumeOptions{Size: 1 << 20, Codec: format.Raw})
	must(err)
	dev, err := s.OpenDevice(cow.Ref{Volume: "v"}, false)
	must(err)
	defer dev.Close()
	want := bytes.Repeat([]byte("some text "), 410)[:4096]
	_, err = dev.WriteAt(want, 8192)
	must(errors.Join(err, dev.Flush()))

	target := &target{dev: dev, jobs: make(chan *ublk.Request, 1)} // nobody works
	r := &ublk.Request{Op: ublk.OpRead, Buf: make([]byte, 4096), Length: 4096, Offset: 8192}
	for range 2 {
		clear(r.Buf)
		if err := target.ServeUBLK(r); !errors.Is(err, ublk.ErrAsync) {
			t.Fatal("the queue's thread waits:", err)
		}
		must(target.work(<-target.jobs))
		if !bytes.Equal(r.Buf, want) {
			t.Error("it reads otherwise than it was written")
		}
	}
}

// TestNoUnmapKeepsSpace: zeros with NoUnmap leave blocks mapped, and others unmap them.
func TestNoUnmapKeepsSpace(t *testing.T) {
	o := newFakeMachine(t).own(true)
	dev, err := o.store.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	target := &target{dev: dev}
	mapped := func() (n int64) {
		if err := dev.Extents(0, 1<<20, func(_, length int64, hole bool) bool {
			if !hole {
				n += length
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if _, err := dev.WriteAt(bytes.Repeat([]byte("data"), 16<<10), 32<<10); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		noUnmap bool
		want    int64
	}{{true, 64 << 10}, {false, 0}} {
		if err := target.work(&ublk.Request{Op: ublk.OpWriteZeroes, Length: 1 << 20, NoUnmap: x.noUnmap}); err != nil {
			t.Fatal(err)
		}
		if n := mapped(); n != x.want {
			t.Errorf("no unmap %v: %d bytes are mapped, want %d", x.noUnmap, n, x.want)
		}
		p := make([]byte, 1<<20)
		if _, err := dev.ReadAt(p, 0); err != nil || !format.IsZero(p) {
			t.Errorf("no unmap %v: not zero, or %v", x.noUnmap, err)
		}
	}
	if err := errors.Join(dev.Close(), o.Close()); err != nil {
		t.Error(err)
	}
}
