package cow

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// A store of an older version opens, and is of the present version from then on: an older program would take its first
// moved record for the end of the log, and a unit without the zeros at its end for damage.
func TestOlderStoreIsUpgraded(t *testing.T) {
	s, dir := newStore(t, Options{})
	must(t, s.Close())
	for version := 1; version < format.StoreVersion; version++ {
		upgradeFrom(t, dir, version)
	}
}

// makeOlder makes a store one of an older version. It returns the file that says so, as it was and as it is.
func makeOlder(t *testing.T, dir string, version int) (was, is []byte) {
	t.Helper()
	path := filepath.Join(dir, formatFile)
	was, err := os.ReadFile(path)
	must(t, err)
	is = bytes.Replace(was, fmt.Appendf(nil, `"version":%d`, format.StoreVersion), fmt.Appendf(nil, `"version":%d`, version), 1)
	must(t, os.WriteFile(path, is, 0o600))
	return was, is
}

func upgradeFrom(t *testing.T, dir string, version int) {
	path := filepath.Join(dir, formatFile)
	text, older := makeOlder(t, dir, version)
	s, err := Open(dir, Options{})
	must(t, err)
	must(t, s.Close())
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, text) || bytes.Equal(older, text) {
		t.Errorf("the format file is %q, %v", got, err)
	}
}

// A snapshot of a store of version 3 has no GUID in its row. It gets one all the same, the same each time that the store
// is opened, whatever name it has. A new snapshot has one of its own.
func TestGUIDOfAnOlderSnapshot(t *testing.T) {
	s, dir := newStore(t, Options{})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, err)
	look := func() map[string]format.GUID {
		t.Helper()
		in, err := s.Volume("v")
		must(t, err)
		seen := map[string]format.GUID{}
		for _, sn := range in.Snapshots {
			seen[sn.Name] = sn.GUID
		}
		return seen
	}
	must(t, s.transact(func() (*format.Event, error) { // as an older program does it
		b := s.catalog.byName["v"].branch.Branch
		sn := format.Snapshot{ID: s.catalog.newID(), Volume: s.catalog.byName["v"].ID, Name: "old", Branch: b.ID, Epoch: b.Epoch, Size: 1 << 20, Created: Now()}
		b.Epoch++
		return &format.Event{Op: "snapshot", Snapshots: []format.Snapshot{sn}, Branches: []format.Branch{b}}, nil
	}))
	guids := look()
	must(t, s.Close())
	makeOlder(t, dir, 3)
	s, err = Open(dir, Options{})
	must(t, err)
	must(t, s.Snapshot(Ref{"v", "new"}))
	if guids["new"] = look()["new"]; !maps.Equal(look(), guids) || guids["old"].IsZero() || guids["new"].IsZero() || guids["old"] == guids["new"] {
		t.Error(look(), guids)
	}
	must(t, s.Rename(Ref{"v", "old"}, Ref{"v", "older"}))
	must(t, s.Close())
	s, err = Open(dir, Options{})
	must(t, err)
	if got := look(); got["older"] != guids["old"] || got["new"] != guids["new"] {
		t.Error(got, guids)
	}
	must(t, s.Close())
}
