package cow

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
)

// TestCleanReportBesideWriter: the report of Clean does not count the data that others write meanwhile, neither as
// space that cleaning gave back nor as its cost.
func TestCleanReportBesideWriter(t *testing.T) {
	var beside func() error // called once, while the table is committed
	s, _ := newStore(t, Options{chunkBytes: 1 << 20, checkpointInterval: -1, onCommit: func(done bool) error {
		f := beside
		if beside = nil; f == nil {
			return nil
		}
		return f()
	}})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	old := append(make([]byte, 0, 2<<20), noise[2<<20:]...)
	for _, content := range [][]byte{old, noise[:2<<20]} { // the second write makes two chunks dead
		if _, err := d.WriteAt(content, 8<<20); err != nil {
			t.Fatal(err)
		}
	}
	beside = func() error {
		_, err := d.WriteAt(noise, 0)
		return errors.Join(err, d.Flush())
	}
	before := s.used(true)
	r, err := s.Clean(context.Background(), 0.5)
	if err != nil {
		t.Fatal(err)
	}
	if beside != nil || s.used(true) <= before {
		t.Fatal("nothing was written meanwhile")
	}
	if r.Freed < 1<<20 || r.Freed > 3<<20 {
		t.Errorf("%d bytes were freed, about 2 MiB were dead", r.Freed)
	}
	mustEnd(t, s, d)
}
