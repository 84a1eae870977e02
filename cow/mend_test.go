package cow

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

// TestMendTable makes each kind of count in the table wrong, and the list of changes. A check names it, MendTable makes the
// table as it was, and the store serves the same. What is more than a count is left alone.
func TestMendTable(t *testing.T) {
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	hardLife(t, dir)
	want := servedBy(t, dir)
	path := filepath.Join(dir, tableFile)
	edit := func(change func(tx *metadata.Tx, tb *metadata.Tables) error) {
		db, err := metadata.Open(path, metadata.Options{NoSync: true})
		must(t, err)
		must(t, db.Update(func(tx *metadata.Tx) error {
			tb, err := tx.Load()
			return errors.Join(err, change(tx, tb))
		}))
		must(t, db.Close())
	}
	live := func(by int) func(*metadata.Tx, *metadata.Tables) error {
		return func(tx *metadata.Tx, tb *metadata.Tables) error {
			for _, c := range tb.Chunks {
				if c.Live > 8192 {
					c.Live = uint32(int(c.Live) + by)
					return tx.PutChunk(&c)
				}
			}
			return errors.New("no chunk has so many live bytes")
		}
	}
	moved := func(by int) func(*metadata.Tx, *metadata.Tables) error {
		return func(tx *metadata.Tx, tb *metadata.Tables) error {
			f := tb.Forwarded[0]
			f.Blocks = uint32(int(f.Blocks) + by)
			return tx.PutForwarded(&f)
		}
	}
	text := dumped(t, dir)
	for _, wrong := range []struct {
		what   string
		change func(*metadata.Tx, *metadata.Tables) error
	}{{"live bytes are kept", live(48)}, {"live bytes are kept", live(-48)}, {"are noted", moved(2)}, {"are noted", moved(-1)}} {
		what := wrong.what
		edit(wrong.change)
		m, err := MendTable(t.Context(), dir, Options{})
		must(t, err)
		if len(m.Problems) == 0 || !strings.Contains(m.Problems[0].What, what) || m.Aside == "" {
			t.Errorf("%s: %+v", what, m)
		}
		if !bytes.Equal(dumped(t, dir), text) {
			t.Errorf("%s: the table is not what it was", what)
		}
		must(t, os.Remove(filepath.Join(dir, m.Aside)))
	}
	if m, err := MendTable(t.Context(), dir, Options{}); err != nil || len(m.Problems) > 0 || m.Aside != "" {
		t.Errorf("of a sound table: %+v, %v", m, err)
	}

	// The folder cannot be synced: the table that was there is there.
	edit(live(48))
	was, err := os.ReadFile(path)
	must(t, err)
	own, broken := syncFolder, errors.New("a broken folder")
	syncFolder = func(*storage.Folder) error { return broken }
	_, err = MendTable(t.Context(), dir, Options{})
	syncFolder = own
	if now, rerr := os.ReadFile(path); !errors.Is(err, broken) || rerr != nil || !bytes.Equal(now, was) {
		t.Errorf("the table was replaced: %v, %v", err, rerr)
	}
	// A block without a record is more than a count, and the counts beside it are not made right either.
	edit(func(tx *metadata.Tx, tb *metadata.Tables) error {
		var l format.Leaf
		v := metadata.Version{Branch: tb.Volumes[0].Branch, Leaf: 7, Epoch: 1}
		l.Entries[3] = format.MakeEntry(9999, 4096, 48, 1, 0)
		l.SetChanged(3)
		return tx.PutLeaf(v, format.AppendLeaf(nil, &l))
	})
	was, err = os.ReadFile(path)
	must(t, err)
	_, err = MendTable(t.Context(), dir, Options{})
	if now, rerr := os.ReadFile(path); !errors.Is(err, ErrNotMended) || rerr != nil || !bytes.Equal(now, was) {
		t.Errorf("a table with more damage: %v, %v", err, rerr)
	}
	_, err = RestoreTable(dir, "text", bytes.NewReader(text), true, Options{})
	must(t, err)
	if servedBy(t, dir) != want {
		t.Error("the store serves something else")
	}
}

// dumped is the text of the table.
func dumped(t *testing.T, dir string) []byte {
	t.Helper()
	db, err := metadata.Open(filepath.Join(dir, tableFile), metadata.Options{NoSync: true, ReadOnly: true})
	must(t, err)
	var b bytes.Buffer
	in, err := openFolder(dir, false)
	must(t, err)
	info, err := readFormat(in)
	must(t, errors.Join(err, in.Close()))
	id, err := info.ID()
	must(t, err)
	must(t, db.View(func(tx *metadata.Tx) error { return tx.Dump(&b, id) }))
	must(t, db.Close())
	return b.Bytes()
}
