package cow

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// copyFileOf is the file of the copy that the store in dir has.
func copyFileOf(t *testing.T, dir string) string {
	t.Helper()
	for _, name := range metadata.CopyNames {
		if path := filepath.Join(dir, name); !isMissing(t, path) {
			return path
		}
	}
	t.Fatal("there is no copy")
	return ""
}

func isMissing(t *testing.T, path string) bool {
	_, err := os.Stat(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err != nil
}

// TestCheckFindsABadCopy damages the copy of the table of a store in use, of one that nobody uses, and of one that can only
// be read. A check says so, and that it has made a new one if it may; the next one finds nothing.
func TestCheckFindsABadCopy(t *testing.T) {
	dir := setup(t, 8<<20, format.Raw)
	s := open(t, dir, Options{})
	problems := func() (out []Problem) {
		t.Helper()
		report, err := s.Check(t.Context(), CheckOptions{}, func(p Problem) { out = append(out, p) })
		must(t, err)
		if report.Corrupt != len(out) {
			t.Errorf("%d problems, and the report says %d", len(out), report.Corrupt)
		}
		return out
	}
	check := func(what, way string) {
		t.Helper()
		ps := problems()
		if len(ps) != 1 || ps[0].Kind != KindCopy || !strings.Contains(ps[0].What, way) {
			t.Errorf("%s: %+v", what, ps)
		}
	}
	sound := func() {
		t.Helper()
		if ps := problems(); ps != nil {
			t.Errorf("nothing is damaged: %+v", ps)
		}
	}
	sound()
	for _, at := range []int64{3, 50, 100} {
		flipByte(t, copyFileOf(t, dir), at)
		check("in use", "a new one has been made")
		sound()
	}
	must(t, s.Close())
	for _, at := range []int64{3, 50, 100} {
		flipByte(t, copyFileOf(t, dir), at)
		s = open(t, dir, Options{})
		check("opened", "a new one has been made")
		sound()
		must(t, s.Close())
	}
	flipByte(t, copyFileOf(t, dir), 100)
	must(t, repairTable(dir, true, Options{}, "test", func(r *tableRepair) error {
		return r.with(tableFile, func(readOnly *Store) error {
			s = readOnly
			check("read-only", "where the store can be written to, 'vdisk check' makes a new one")
			return nil
		})
	}))
}

// TestBadCopyOfABadTable damages both the table and its copy. The copy is reported, and stays as it is.
func TestBadCopyOfABadTable(t *testing.T) {
	dir := setup(t, 8<<20, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	must(t, s.Checkpoint())
	must(t, s.meta.Update(func(tx *metadata.Tx) error {
		return tx.PutLeaf(metadata.Version{Branch: 1, Leaf: 1, Epoch: 1}, []byte("rotten"))
	}))
	path := copyFileOf(t, dir)
	flipByte(t, path, 100)
	kinds := map[string]int{}
	_, err := s.Check(t.Context(), CheckOptions{}, func(p Problem) {
		if kinds[p.Kind]++; p.Kind == KindCopy && !strings.Contains(p.What, "when the table is right again") {
			t.Error(p.What)
		}
	})
	must(t, err)
	if kinds[KindCopy] != 1 || kinds[KindCorrupt] == 0 || copyFileOf(t, dir) != path {
		t.Errorf("%v, and the copy is %s", kinds, copyFileOf(t, dir))
	}
	must(t, s.Close())
}
