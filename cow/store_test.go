package cow

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

func newStore(t testing.TB, o Options) (*Store, string) {
	t.Helper()
	dir := t.TempDir()
	if err := Create(dir); err != nil {
		t.Fatal(err)
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func mustCheck(t testing.TB, s *Store) CheckReport {
	t.Helper()
	rep, err := s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) { t.Errorf("check: %+v", p) })
	if err := errors.Join(err, s.sumsAgree()); err != nil {
		t.Fatal(err)
	}
	return rep
}

// mustEnd checks a store, and closes it and devices of it.
func mustEnd(t testing.TB, s *Store, ds ...*Device) {
	t.Helper()
	mustCheck(t, s)
	for _, d := range ds {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestSmoke(t *testing.T) {
	s, dir := newStore(t, Options{})
	if _, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.S2}); err != nil {
		t.Fatal(err)
	}
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	if err != nil {
		t.Fatal(err)
	}
	model := make([]byte, 64<<20)
	r := rand.New(rand.NewPCG(1, 2))
	write := func() {
		n := 1 + r.IntN(200<<10)
		off := r.IntN(len(model) - n)
		p := model[off : off+n]
		for i := range p {
			p[i] = byte(r.Uint32N(16))
		}
		if _, err := d.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(d *Device, want []byte) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("content differs")
		}
	}
	for range 200 {
		write()
	}
	check(d, model)
	if err := s.Snapshot(Ref{"v", "a"}); err != nil {
		t.Fatal(err)
	}
	atA := bytes.Clone(model)
	for range 200 {
		write()
	}
	check(d, model)
	da, err := s.OpenDevice(Ref{"v", "a"}, true)
	if err != nil {
		t.Fatal(err)
	}
	check(da, atA)
	mustCheck(t, s)
	check(d, model)
	check(da, atA)
	da.Close()
	d.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s, err = Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, _ = s.OpenDevice(Ref{Volume: "v"}, false)
	check(d, model)
	d.Close()
	if err := s.Remove(Ref{"v", "a"}, false); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		mustCheck(t, s)
	}
	t.Logf("%+v", s.Info())
	d, _ = s.OpenDevice(Ref{Volume: "v"}, false)
	check(d, model)
	if err := d.Discard(0, d.Size()); err != nil {
		t.Fatal(err)
	}
	d.Close()
	mustCheck(t, s)
	mustCheck(t, s)
	t.Logf("%+v", s.Info())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Every directory that Create makes has its name made durable, from the top down, and before the store is one.
func TestCreateSyncsEveryName(t *testing.T) {
	sync := syncDir
	defer func() { syncDir = sync }()
	var synced []string
	syncDir = func(dir string) error {
		synced = append(synced, dir)
		return sync(dir)
	}
	top := t.TempDir()
	store := filepath.Join(top, "x", "y", "store")
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(Create(store))
	want := []string{top, top + "/x", top + "/x/y", store + "/chunks"} // storage.Folder syncs the store itself
	if !slices.Equal(synced, want) {
		t.Errorf("synced %q, want %q", synced, want)
	}
	synced = nil
	own := syncFolder
	defer func() { syncFolder = own }()
	syncFolder = func(in *storage.Folder) error {
		synced = append(synced, in.Path())
		return own(in)
	}
	must(Create(store)) // again: it may have been killed before the syncs
	if !slices.Equal(synced, []string{top + "/x/y", store}) {
		t.Errorf("synced %q", synced)
	}
	must(os.WriteFile(filepath.Join(top, "file"), nil, 0o600))
	if err := Create(filepath.Join(top, "file")); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
}
