package metadata

import (
	"bytes"
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// tableEdits changes a table as a program says, six bytes an edit: how, the page, the place in it (two), the value
// (two). It gives the meta pages right checksums, if the program wants that, so that bbolt takes them.
func tableEdits(whole, program []byte, fix bool) []byte {
	b := bytes.Clone(whole)
	pages := len(b) / 4096
	for ; len(program) >= 6; program = program[6:] {
		page := int(program[1]) % pages
		at, v := page*4096+(int(program[2])<<8|int(program[3]))%4096, program[4:6]
		switch program[0] % 8 {
		case 0:
			b[at] ^= 1 << (v[0] % 8)
		case 1: // a field of the page's header
			copy(b[page*4096+int(program[2])%8*2:page*4096+16], v)
		case 2: // a field of an element
			copy(b[page*4096+16+int(program[2])%64*4:], v)
		case 3: // one page in the place of another
			copy(b[page*4096:][:4096], b[int(v[0])%pages*4096:][:4096])
		case 4:
			copy(b[at:min(at+4, len(b))], []byte{v[0], v[1], 0, 0})
		case 5: // a field of the meta page
			copy(b[page%2*4096+16+int(program[2])%14*4:], v)
		case 6:
			clear(b[at:min(at+int(v[0]), len(b))])
		case 7:
			b = b[:max(at, 8192)]
			return fixMetas(b, fix)
		}
	}
	return fixMetas(b, fix)
}

func fixMetas(b []byte, fix bool) []byte {
	for page := 0; fix && page < 2; page++ {
		m := b[page*4096+pageHeader:][:metaSize]
		h := fnv.New64a()
		h.Write(m[:metaSize-8])
		le.PutUint64(m[56:], h.Sum64())
	}
	return b
}

// FuzzTable opens damaged tables, in which a page, an element or a meta page says something else, with the right
// checksum of the meta page or without. A table that opens must hold what it held, or, if a meta page was touched, what
// it held a commit before. All else is an error about damage. bbolt would panic, or end the process, over much of it.
func FuzzTable(f *testing.F) {
	dir := memoryDir(f)
	path := filepath.Join(dir, "t")
	filled(f, path)
	whole, err := os.ReadFile(path)
	must(f, err)
	must(f, os.Remove(path+VerifiedSuffix))
	want, err := dump(path)
	must(f, err)
	for how := range byte(8) {
		f.Add([]byte{how, how * 3, 4, 16, 1, 0}, how%2 == 0)
	}
	f.Add([]byte{5, 0, 4, 0, 9, 0, 5, 1, 4, 0, 9, 0}, true) // another root
	f.Add([]byte{5, 0, 8, 0, 9, 0, 5, 1, 8, 0, 9, 0}, true) // another list of free pages
	f.Fuzz(func(t *testing.T, program []byte, fix bool) {
		if len(program) > 120 {
			return
		}
		bad := tableEdits(whole, program, fix)
		p := filepath.Join(dir, "bad")
		must(t, os.WriteFile(p, bad, 0o600))
		_ = os.Remove(p + VerifiedSuffix)
		got, err := dump(p)
		switch {
		case err != nil && !errors.Is(err, format.ErrCorrupt):
			t.Fatalf("not an error about damage: %v", err)
		case err == nil && got != want && len(bad) >= 8192 && bytes.Equal(bad[:8192], whole[:8192]):
			t.Fatal("it opens and holds something else")
		case err != nil && err.Error() == format.ErrCorrupt.Error():
			t.Fatal("the error does not say what is damaged")
		}
		if err == nil {
			useTable(t, p)
		}
	})
}

// useTable changes a table that was accepted: then bbolt reads its list of free pages, too.
func useTable(t *testing.T, path string) {
	db, err := Open(path, Options{NoSync: true})
	must(t, err)
	err = db.Update(func(tx *Tx) error {
		for leaf := range uint32(30) {
			if err := tx.PutLeaf(Version{3, leaf, 9}, format.AppendLeaf(nil, leafOf(leaf))); err != nil {
				return err
			}
		}
		return nil
	})
	must(t, errors.Join(err, db.Close()))
	if _, err := dump(path); err != nil {
		t.Fatalf("after a commit: %v", err)
	}
}

// FuzzNote reads arbitrary notes about the table. A note proves only what it says: a table counts as verified only if
// the note has the state of the file in every field.
func FuzzNote(f *testing.F) {
	dir := memoryDir(f)
	path := filepath.Join(dir, "t")
	filled(f, path)
	in, err := storage.OpenFolder(dir, true)
	must(f, err)
	f.Cleanup(func() { _ = in.Close() })
	at := place{in, "t"}
	now, err := stateOf(at)
	must(f, err)
	text, err := os.ReadFile(path + VerifiedSuffix)
	must(f, err)
	f.Add(bytes.TrimSpace(text))
	for _, s := range []string{`{}`, `null`, `[`, ``, `{"boot":"","dev":0}`, `{"boot":"BOOT","writing":true,"size":1}`, `{"checkpoint":18446744073709551615}`, `{"checkpoint":-1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, note []byte) {
		if len(note) > 2000 {
			return
		}
		text := strings.ReplaceAll(string(note), "BOOT", now.Boot)
		must(t, os.WriteFile(path+VerifiedSuffix, []byte(text), 0o600))
		was := readNote(at)
		if was.verified && (!strings.Contains(text, now.Boot) || now.Boot == "") {
			t.Fatalf("a note of another boot counts: %s", text)
		}
		if (was.verified || was.checkpoint > 0) && !strings.Contains(text, "{") {
			t.Fatalf("%q is no note", text)
		}
		if !was.verified || strings.Contains(strings.ToLower(text), "writing") { // of a commit, the state before and the one after count
			return
		}
		if !was.durable {
			t.Fatalf("no commit was under way, and yet the table may not be durable: %s", text)
		}
		b, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, b, 0o600))
		if readNote(at).verified {
			t.Fatal("a note counts though the file was written to since")
		}
	})
}

// FuzzKeys holds the keys of leaves to come back, and to sort as the table needs it: by branch and leaf, and the newest
// epoch first.
func FuzzKeys(f *testing.F) {
	f.Add(uint32(1), uint32(2), uint32(3), uint32(4), []byte("abcdefghijkl"))
	f.Add(uint32(0), uint32(0), ^uint32(0), uint32(0), []byte{})
	f.Fuzz(func(t *testing.T, branch, leaf, epoch, other uint32, raw []byte) {
		v := Version{branch, leaf, epoch}
		k := v.key()
		if got, err := parseKey(k[:]); got != v || err != nil {
			t.Fatal(got, v, err)
		}
		o := Version{branch, leaf, other}.key()
		if cmp := bytes.Compare(k[:], o[:]); (cmp < 0) != (epoch > other) || (cmp == 0) != (epoch == other) {
			t.Fatal(epoch, other, cmp)
		}
		if next := (Version{branch, leaf + 1, other}).key(); leaf != ^uint32(0) && bytes.Compare(k[:], next[:]) >= 0 {
			t.Fatal("the keys of a leaf are not before those of the next")
		}
		got, err := parseKey(raw)
		if (err == nil) != (len(raw) == 12) || err != nil && !errors.Is(err, format.ErrCorrupt) {
			t.Fatal(got, err)
		}
		if again := got.key(); err == nil && !bytes.Equal(again[:], raw) {
			t.Fatalf("%x is %+v, which is %x", raw, got, again)
		}
	})
}
