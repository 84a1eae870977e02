package metadata

import (
	"bytes"
	"errors"
	"hash/maphash"
	"io/fs"
	"maps"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// checkCopy checks the copy of a table that nobody uses.
func checkCopy(t testing.TB, db *DB) (err error) {
	t.Helper()
	check, err := db.CheckCopy()
	must(t, err)
	must(t, db.View(func(tx *Tx) error {
		err = check(tx, func() error { return nil })
		return nil
	}))
	if err != nil && !errors.Is(err, ErrBadCopy) {
		t.Fatal(err)
	}
	return err
}

// flip changes a byte of a file.
func flip(t testing.TB, in *crashfs.FS, name string, at int64) {
	t.Helper()
	f, err := in.Open(name)
	must(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 1 << (at % 8)
	_, err = f.WriteAt(b[:], at)
	must(t, errors.Join(err, f.Close()))
}

// TestCheckCopy flips every byte of the copy of a table that is in use, and checks the copy. It flips bytes at
// -copy.places places of one that nobody uses, and opens the table. Then only a last batch that a crash can have left so is
// replaced without a word. Nothing is found where nothing was flipped, also while a new base is made.
func TestCheckCopy(t *testing.T) {
	path := filepath.Join(memoryDir(t), "t")
	copies := crashfs.New()
	o := Options{NoSync: true, Create: true, Copy: copies}
	db, err := Open(path, o)
	must(t, err)
	copyWorkload(t, &db, 3, func(i int) {
		if err := checkCopy(t, db); err != nil {
			t.Fatalf("commit %d: %v", i, err)
		}
	})
	m, err := db.beginCopy()
	must(t, errors.Join(err, sliceOf(db, m, 100), checkCopy(t, db)))
	_ = db.endCopy(m, errStopped)
	name, whole := copyNow(t, copies)
	r, err := newestCopy(copies, [16]byte{})
	must(t, errors.Join(err, r.f.Close()))
	last := r.last[len(r.last)-1].off
	for at := range int64(len(whole)) {
		flip(t, copies, name, at)
		if checkCopy(t, db) == nil {
			t.Fatalf("byte %d of %d: the damage is not found", at, len(whole))
		}
		flip(t, copies, name, at)
	}
	must(t, errors.Join(checkCopy(t, db), db.Close()))

	step := len(whole) / *copyPlaces
	for at := int64(0); at < int64(len(whole)); at += int64(max(1, step)) {
		copies := copiesOf(t, name, whole)
		flip(t, copies, name, at)
		o.Copy = copies
		db, err := Open(path, o)
		must(t, err)
		err = checkCopy(t, db)
		if err == nil && at < last {
			t.Fatalf("byte %d of %d: the damage is not found after the table was opened", at, len(whole))
		}
		if _, now := copyNow(t, copies); err == nil && len(now) > int(last) && bytes.Equal(now[:last], whole[:last]) {
			t.Fatalf("byte %d of %d: the damaged copy is still in use", at, len(whole))
		}
		must(t, db.Close())
	}
}

// TestCheckCopyInParts compares rows in parts of the keys, as those of a large table. Each difference is found.
func TestCheckCopyInParts(t *testing.T) {
	was := copyCheckBytes
	copyCheckBytes = 5 << 10
	defer func() { copyCheckBytes = was }()
	path := filepath.Join(memoryDir(t), "t")
	filled(t, path)
	copies := crashfs.New()
	db, err := Open(path, Options{NoSync: true, Copy: copies})
	must(t, err)
	defer db.Close()
	copyWorkload(t, &db, 3, func(int) { must(t, checkCopy(t, db)) })
	r, err := newestCopy(copies, [16]byte{})
	must(t, err)
	defer r.f.Close()
	at := *r
	at.off, at.base, at.last, at.size = format.CopyHeaderSize, 0, nil, r.off
	for i, change := range []func(rows map[string][]byte, key string){
		func(map[string][]byte, string) {},
		func(rows map[string][]byte, key string) { delete(rows, key) },
		func(rows map[string][]byte, key string) { rows[key] = append(bytes.Clone(rows[key]), 0) },
		func(rows map[string][]byte, key string) { rows[key+"0"] = rows[key] },
	} {
		bad, parts := 0, 0
		must(t, db.View(func(tx *Tx) error {
			must(t, tx.loadSum())
			k := copyChecker{tx: tx, interrupted: func() error { return nil }, parts: 4, seed: maphash.MakeSeed()}
			for ; k.part < k.parts; k.part++ {
				k.rows = map[string][]byte{}
				must(t, k.read(at))
				for key := range maps.Clone(k.rows) {
					change(k.rows, key)
					break
				}
				if err := k.compare(); errors.Is(err, ErrBadCopy) {
					bad++
				} else if err != nil {
					t.Fatal(err)
				}
				parts++
			}
			return nil
		}))
		if want := min(i, 1) * parts; bad != want {
			t.Errorf("change %d: differences were found in %d of %d parts, and should be in %d", i, bad, parts, want)
		}
	}
	stopped := errors.New("stopped")
	check, err := db.CheckCopy()
	must(t, err)
	must(t, db.View(func(tx *Tx) error {
		if err := check(tx, func() error { return stopped }); !errors.Is(err, stopped) {
			t.Errorf("a check that was stopped ends with %v", err)
		}
		return nil
	}))
	for _, name := range CopyNames {
		if err := copies.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if checkCopy(t, db) == nil {
		t.Error("the copy is missing, and that is not found")
	}
}
