package owner

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/nbdclient"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// TestDurableOverNBD cuts the power right after each kind of answer that promises durability, with nothing else that
// syncs: of a flush, also of another connection's writes, and of requests with FUA, those that the connection's own
// goroutine makes and those of workers. A server that ignored FUA would lose nothing in a test that kills it, since the
// page cache outlives it.
func TestDurableOverNBD(t *testing.T) {
	dir := t.TempDir()
	if err := cow.Create(dir); err != nil {
		t.Fatal(err)
	}
	disk := crashfs.New()
	o := quick
	o.Offer, o.fs = true, disk
	s, err := Own(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	const size = 2 << 20
	if _, err := s.CreateVolume(t.Context(), "v", cow.VolumeOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	path, end := serving(t, s, ServeOptions{})
	defer func() {
		if err := end(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	dial := func() *nbdclient.Client {
		c, err := nbdclient.Dial(path, "v")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c, other := dial(), dial()
	defer c.Close()
	defer other.Close()

	want := make([]byte, size)
	write := func(c *nbdclient.Client, off int64, n int, content byte, flags uint16) error {
		p := bytes.Repeat([]byte{content}, n)
		copy(want[off:], p)
		return c.Write(p, off, flags)
	}
	empty := func(off int64, n int, do func(off, n int64, flags uint16) error) error {
		clear(want[off : off+int64(n)])
		return do(off, int64(n), nbdclient.FUA)
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"a small write and a flush", func() error { return errors.Join(write(c, 0, 512, 1, 0), c.Sync()) }},
		{"a write and a flush of another connection", func() error { return errors.Join(write(c, 4096, 4096, 2, 0), other.Sync()) }},
		{"a small write with FUA", func() error { return write(c, 8192, 4096, 3, nbdclient.FUA) }},
		{"a large write with FUA", func() error { return write(c, 1<<20, 768<<10, 4, nbdclient.FUA) }},
		{"a trim with FUA", func() error { return empty(1<<20, 256<<10, c.Trim) }},
		{"zeroes with FUA", func() error { return empty(1<<20+256<<10, 256<<10, c.Zero) }},
		{"FUA beside another connection's write", func() error {
			return errors.Join(write(other, 64<<10, 8192, 5, 0), write(c, 128<<10, 512, 6, nbdclient.FUA))
		}},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got := afterPowerCut(t, dir, disk); !bytes.Equal(got, want) {
			at := 0
			for got[at] == want[at] {
				at++
			}
			t.Errorf("%s: after a power cut byte %d is %d and should be %d", step.name, at, got[at], want[at])
		}
	}
}

// afterPowerCut returns the content of the volume v if the power was cut now, and the disk has only what was synced.
func afterPowerCut(t *testing.T, dir string, disk *crashfs.FS) []byte {
	t.Helper()
	left := t.TempDir()
	for _, name := range []string{"format", "meta.db"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(left, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := cow.OpenOver(left, disk.Crash(crashfs.Choice{}), cow.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	d, err := s.OpenDevice(cow.Ref{Volume: "v"}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = d.Close() }()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}
