package storage

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSetAside: no file that is set aside takes the place of another, and only those with the prefix are ever removed.
func TestSetAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "chunks")
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for i, as := range []string{"x-1", "x-1", "x-1", "y-1", "x-2"} {
		f, err := d.Create("a", 0)
		if err == nil {
			_, err = f.WriteAt([]byte{byte(i)}, 0)
			err = errors.Join(err, f.Close(), d.SetAside("a", as))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	look := func(want map[string]byte) {
		t.Helper()
		entries, err := os.ReadDir(path + asideSuffix)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(path+asideSuffix, e.Name()))
			if i, ok := want[e.Name()]; err != nil || !ok || !slices.Equal(text, []byte{i}) {
				t.Errorf("%s has %v, %v", e.Name(), text, err)
			}
		}
		if len(entries) != len(want) {
			t.Errorf("%v are there, want %v", entries, want)
		}
	}
	look(map[string]byte{"x-1": 0, "x-1.1": 1, "x-1.2": 2, "y-1": 3, "x-2": 4})
	if err := d.PruneAside("x-", 1); err != nil {
		t.Fatal(err)
	}
	look(map[string]byte{"y-1": 3, "x-2": 4})
	if err := d.PruneAside("x-", 1); err != nil {
		t.Fatal(err)
	}
	look(map[string]byte{"y-1": 3, "x-2": 4})
}

// TestFailureOfAnUnaskedSync: a sync that failed when another file needed the descriptor is the error of every later
// Sync, since the system reports it once.
func TestFailureOfAnUnaskedSync(t *testing.T) {
	d, err := OpenDir(filepath.Join(t.TempDir(), "d"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	f, err := d.Create("a", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	own := f.(*file)
	own.mu.Lock()
	own.failed = unix.EIO
	own.mu.Unlock()
	for range 2 {
		if err := f.Sync(); !errors.Is(err, unix.EIO) {
			t.Error("a sync after one that had failed: ", err)
		}
	}
}
