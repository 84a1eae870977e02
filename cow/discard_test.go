package cow

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestDiscardOfTheLastBlockBesideResize: if a volume ends within its last block, a discard of that part discards the
// block. It does not if the volume has grown since its size was looked at, since then there may be data behind.
func TestDiscardOfTheLastBlockBesideResize(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	const old = 3*format.BlockSize + 3*512
	_, err := s.CreateVolume("v", VolumeOptions{Size: old, Codec: format.Raw})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	fill := func() {
		_, err := d.WriteAt(randomBytes(old, 1), 0)
		must(t, err)
	}
	got := make([]byte, old)
	read := func(p []byte, off int64) []byte {
		_, err := d.ReadAt(p, off)
		must(t, err)
		return p
	}

	fill()
	must(t, d.Discard(0, old))
	if !format.IsZero(read(got, 0)) {
		t.Error("the end of the device was not discarded")
	}
	fill()
	must(t, d.Discard(old-512, 512)) // less than the volume's part of the block, so the block stays
	if !bytes.Equal(read(got, 0), randomBytes(old, 1)) {
		t.Error("a discard of less than a block changed something")
	}

	// After a discard has looked at the size, another goroutine grows the volume, and writes behind the old end.
	must(t, s.Resize("v", 4*format.BlockSize, false))
	want := randomBytes(512, 2)
	_, err = d.WriteAt(want, old)
	must(t, err)
	must(t, d.Flush())
	if err := d.punchTo(0, 4, old); !errors.Is(err, errChanged) {
		t.Error(err)
	}
	if !bytes.Equal(read(make([]byte, 512), old), want) {
		t.Error("a flushed write behind the discarded range is gone")
	}
	if !bytes.Equal(read(got, 0), randomBytes(old, 1)) {
		t.Error("the block was changed")
	}
	mustEnd(t, s, d)
}
