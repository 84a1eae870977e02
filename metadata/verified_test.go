package metadata

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/testcache"
)

// TestVerified holds the note to be believed for a table as its owner left it, and for no other.
func TestVerified(t *testing.T) {
	change := func(fn func(*verified)) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			text, err := os.ReadFile(path + VerifiedSuffix)
			must(t, err)
			var v verified
			must(t, json.Unmarshal(text, &v))
			fn(&v)
			text, err = json.Marshal(v)
			must(t, err)
			must(t, os.WriteFile(path+VerifiedSuffix, text, 0o600))
		}
	}
	rewrite := func(t *testing.T, path string) { // the same bytes, written by somebody else
		whole, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, whole, 0o600))
	}
	for name, c := range map[string]struct {
		do   func(t *testing.T, path string)
		want bool
	}{
		"closed":     {func(*testing.T, string) {}, true},
		"rewritten":  {rewrite, false},
		"other boot": {change(func(v *verified) { v.Boot = "another" }), false},
		"no boot":    {change(func(v *verified) { v.Boot = "" }), false},
		"in a commit": {func(t *testing.T, path string) {
			change(func(v *verified) { v.Writing = true })(t, path)
			rewrite(t, path)
		}, true},
		"in a commit, before":         {change(func(v *verified) { v.Writing, v.Size = true, 0 }), true},
		"in a commit of another boot": {change(func(v *verified) { v.Writing, v.Boot = true, "another" }), false},
		"no note":                     {func(t *testing.T, path string) { must(t, os.Remove(path+VerifiedSuffix)) }, false},
		"cut note":                    {func(t *testing.T, path string) { must(t, os.Truncate(path+VerifiedSuffix, 20)) }, false},
		"moved": {func(t *testing.T, path string) {
			must(t, os.Rename(path, path+"2"))
			must(t, os.Rename(path+"2", path))
		}, false},
		"exchanged": {func(t *testing.T, path string) {
			whole, err := os.ReadFile(path)
			must(t, errors.Join(err, os.WriteFile(path+"2", whole, 0o600), os.Rename(path+"2", path)))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "t")
			filled(t, path)
			c.do(t, path)
			if got := verifiedAt(t, path); got != c.want {
				t.Errorf("verified: %t", got)
			}
			must(t, open(t, path).Close())
			if !verifiedAt(t, path) {
				t.Error("not verified after it was opened and closed")
			}
		})
	}
}

// TestFailedCommitIsNotVerified lets a commit fail. It leaves no note, because what can be read may not be what it
// wrote.
func TestFailedCommitIsNotVerified(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	filled(t, path)
	db := open(t, path)
	must(t, db.Update(func(tx *Tx) error { return tx.DropChunk(1) }))
	if !verifiedAt(t, path) {
		t.Error("not verified after a commit")
	}
	if err := db.Update(func(*Tx) error { return errLost }); !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	if verifiedAt(t, path) {
		t.Error("verified after a commit that failed")
	}
	must(t, db.Update(func(tx *Tx) error { return tx.DropChunk(2) }))
	must(t, db.Close())
	if verifiedAt(t, path) {
		t.Error("verified again by one that succeeded")
	}
}

var errLost = errors.New("lost")

// TestKilledInCommitIsVerified writes to the table as a commit does, and looks at the note before the commit ends: the
// pages of an owner that is killed there need not be verified again.
func TestKilledInCommitIsVerified(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	filled(t, path)
	db := open(t, path)
	must(t, db.Update(func(tx *Tx) error { return tx.DropChunk(1) })) // from here on there is a note
	must(t, db.Update(func(tx *Tx) error {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		p := make([]byte, 1)
		_, err = f.ReadAt(p, 0)
		must(t, err)
		_, err = f.WriteAt(p, 0)
		must(t, errors.Join(err, f.Close()))
		if !verifiedAt(t, path) {
			t.Error("not verified in a commit")
		}
		return tx.DropChunk(2)
	}))
	must(t, db.Close())
}

// TestSumAfterDamagedChecksum replaces and removes rows whose checksum is damaged. What they had added to the sum is
// not known, and the table is sound without them.
func TestSumAfterDamagedChecksum(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	filled(t, path)
	b, err := bbolt.Open(path, 0o600, nil)
	must(t, err)
	must(t, b.Update(func(tx *bbolt.Tx) error {
		rows := tx.Bucket(bucketChunks)
		for _, slot := range []uint32{3, 4} {
			bad := bytes.Clone(rows.Get(id(slot)))
			bad[0] ^= 1
			must(t, rows.Put(id(slot), bad))
		}
		return nil
	}))
	must(t, b.Close())
	db := open(t, path)
	must(t, db.Update(func(tx *Tx) error {
		return errors.Join(tx.PutChunk(&format.Chunk{Slot: 3, Seq: 3, End: 1 << 20, Live: 16}), tx.DropChunk(4))
	}))
	must(t, db.Close())
	must(t, os.Remove(path+VerifiedSuffix)) // so that all pages are read
	must(t, open(t, path).Close())
}

// TestDamagedFreeList names a page in use in the list of free pages. bbolt would overwrite that page.
func TestDamagedFreeList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	filled(t, path)
	whole, err := os.ReadFile(path)
	must(t, err)
	c := &pageChecker{size: int64(len(whole))}
	c.f, err = os.Open(path)
	must(t, err)
	defer c.f.Close()
	must(t, c.meta())
	root, free := c.root, c.free
	if free == noFreeList {
		t.Fatal("there is no list")
	}
	list := whole[int64(free)*c.page:]
	if le.Uint16(list[10:]) < 2 {
		t.Fatal("it is too short")
	}
	for name, damage := range map[string]func(p []byte){
		"a page in use":   func(p []byte) { le.PutUint16(p[10:], 1); le.PutUint64(p[16:], root) }, // it alone, so that the order is right
		"itself":          func(p []byte) { le.PutUint64(p[16:], free) },
		"a meta page":     func(p []byte) { le.PutUint64(p[16:], 1) },
		"behind the end":  func(p []byte) { le.PutUint64(p[16+8*(int(le.Uint16(p[10:]))-1):], c.pages) },
		"one twice":       func(p []byte) { copy(p[24:32], p[16:24]) },
		"too many":        func(p []byte) { le.PutUint16(p[10:], 2000) },
		"far too many":    func(p []byte) { le.PutUint16(p[10:], 0xffff); le.PutUint64(p[16:], 1<<60) },
		"of another kind": func(p []byte) { p[8] = flagLeaf },
	} {
		bad := append([]byte(nil), whole...)
		damage(bad[int64(free)*c.page:])
		p := filepath.Join(t.TempDir(), "bad")
		must(t, os.WriteFile(p, bad, 0o600))
		if db, err := Open(p, Options{NoSync: true}); !errors.Is(err, format.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				must(t, db.Close())
			}
		}
	}
}

// TestPagesBesideCommits verifies the pages of one state while other states are committed, as long as somebody reads
// that state.
func TestPagesBesideCommits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	filled(t, path)
	for _, held := range []bool{true, false} {
		db := open(t, path)
		tx, err := db.Begin()
		must(t, err)
		check, err := db.Pages()
		must(t, err)
		if !held {
			must(t, tx.Close())
		}
		rounds := uint32(20)
		if !held {
			// bbolt takes free pages at random, so a few rounds may not take one that the state had.
			rounds = 500
		}
		for round := range rounds {
			must(t, db.Update(func(tx *Tx) error {
				for leaf := range uint32(10) {
					must(t, tx.PutLeaf(Version{1 + round%12, leaf, 3 + round}, format.AppendLeaf(nil, leafOf(leaf*7+round))))
				}
				return nil
			}))
		}
		if err := check(); (err == nil) != held {
			t.Errorf("held: %v; %v", held, err)
		}
		if held {
			must(t, tx.Close())
		}
		must(t, db.Close())
	}
}

func verifiedAt(t *testing.T, path string) bool {
	in, err := storage.OpenFolder(filepath.Dir(path), false)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	return readNote(place{in, filepath.Base(path)}).verified
}

// TestSettled opens tables as owners leave them. A commit that may not be on the disk is made durable before the table
// is read, so that no later commit writes over pages which the disk still needs. Nothing is synced for a table that its
// owner has closed, nor by a reader.
func TestSettled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	syncs := 0
	o := Options{NoSync: true, Sync: func(f *os.File) error { syncs++; return nil }}
	opens := func(what string, o Options, want int) *DB {
		t.Helper()
		syncs = 0
		db, err := Open(path, o)
		must(t, err)
		if syncs != want {
			t.Errorf("%s: %d syncs, not %d", what, syncs, want)
		}
		return db
	}
	filled(t, path)
	db := opens("closed", o, 0)
	must(t, db.Update(func(tx *Tx) error { return tx.DropChunk(1) }))
	must(t, db.note.begin()) // the owner is killed in the next commit
	must(t, db.Close())
	reader := o
	reader.ReadOnly = true
	must(t, opens("in a commit, read", reader, 0).Close())
	db = opens("in a commit", o, 1)
	must(t, db.Close())
	db = opens("in a commit, and only looked at", o, 1)
	must(t, db.Adopt())
	must(t, db.Close())
	db = opens("adopted", o, 0)
	if err := db.Update(func(*Tx) error { return errLost }); !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	must(t, db.Close())
	o.Sync = func(*os.File) error { return errLost }
	if _, err := Open(path, o); !errors.Is(err, errLost) {
		t.Error("after a commit that failed:", err)
	}
}

// TestSyncForgets looks for a file's content in the page cache after Sync, which must not leave what a failed sync
// called clean.
func TestSyncForgets(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer f.Close()
	var st unix.Statfs_t
	must(t, unix.Fstatfs(int(f.Fd()), &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("on a tmpfs all is in memory")
	}
	_, err = f.WriteAt(make([]byte, 4096), 0)
	must(t, err)
	must(t, f.Sync())
	if testcache.Pages(t, int(f.Fd()), 4096) == 0 {
		t.Error("what was just written is not in memory")
	}
	for i := 0; ; i++ {
		must(t, Sync(f))
		if testcache.Pages(t, int(f.Fd()), 4096) == 0 {
			return
		}
		if i == 100 {
			t.Fatal("the content is still in memory")
		}
		time.Sleep(10 * time.Millisecond) // a page that a processor has just taken may stay (posix_fadvise(2), DONTNEED)
	}
}
