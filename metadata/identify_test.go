package metadata

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// TestWhoseTable: a table is refused if it is another store's, if it is missing or empty, or if it is older than the
// one that was here. That is so however little it has in common with the right one.
func TestWhoseTable(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "table")
	o := Options{NoSync: true, Store: [16]byte{1}}
	refused := func(what, why string) {
		t.Helper()
		db, err := Open(path, o)
		if err == nil {
			err = db.Close()
			t.Errorf("%s is opened (%v)", what, err)
		} else if !errors.Is(err, format.ErrCorrupt) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", what, err)
		}
	}
	put := func(seq uint64) {
		t.Helper()
		o := o
		o.Create = true
		db, err := Open(path, o)
		must(t, err)
		must(t, db.Update(func(tx *Tx) error {
			return tx.PutCheckpoint(&format.Checkpoint{Seq: seq, ChunkSeq: 1, Offset: 8192, NextID: 1, NextChunkSeq: 2})
		}))
		must(t, db.Close())
	}
	refused("no table", "missing")
	must(t, os.WriteFile(path, nil, 0o600))
	refused("an empty file", "empty")
	put(5)
	old, err := os.ReadFile(path)
	must(t, err)
	put(9)
	o.Store = [16]byte{2}
	refused("the table of another store", "it is of store 01")
	o.Store = [16]byte{1}
	must(t, os.WriteFile(path, old, 0o600))
	refused("an older table", "older")
	must(t, os.Remove(path+VerifiedSuffix))
	put(9) // nothing says any more that it is an older one
}

// TestTornMetaPage: of the two meta pages, one that does not verify says nothing, however new it seems.
func TestTornMetaPage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table")
	filled(t, path)
	must(t, os.Remove(path+VerifiedSuffix))
	whole, err := os.ReadFile(path)
	must(t, err)
	page := int(le.Uint32(whole[pageHeader+8:]))
	newer := 0
	if le.Uint64(whole[page+pageHeader+48:]) > le.Uint64(whole[pageHeader+48:]) {
		newer = page
	}
	le.PutUint64(whole[newer+pageHeader+16:], 1<<40) // the root page
	must(t, os.WriteFile(path, whole, 0o600))
	db, err := Open(path, Options{NoSync: true})
	must(t, err)
	must(t, db.Close())
}
