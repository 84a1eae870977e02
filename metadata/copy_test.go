package metadata

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
)

func folderOf(t testing.TB, dir string) *storage.Folder {
	t.Helper()
	in, err := storage.OpenFolder(dir, false)
	must(t, err)
	t.Cleanup(func() { in.Close() })
	return in
}

// built makes a table from a copy, and returns its content.
func built(in *storage.Folder, copies storage.FS) (uint64, error) {
	if _, err := FromCopy(in, "built", copies, [16]byte{}); err != nil {
		return 0, err
	}
	return contentOf(in.Join("built"))
}

// copyNow is the file of the copy that counts.
func copyNow(t testing.TB, copies *crashfs.FS) (name string, content []byte) {
	t.Helper()
	r, err := newestCopy(copies, [16]byte{})
	must(t, err)
	content = make([]byte, r.size)
	_, err = r.f.ReadAt(content, 0)
	must(t, errors.Join(err, r.f.Close()))
	return r.name, content
}

// copiesOf is a directory that durably has one file.
func copiesOf(t testing.TB, name string, content []byte) *crashfs.FS {
	t.Helper()
	disk := crashfs.New()
	f, err := disk.Create(name, 0)
	must(t, err)
	_, err = f.WriteAt(content, 0)
	must(t, errors.Join(err, f.Sync(), disk.SyncDir(), f.Close()))
	return disk
}

// copyWorkload commits in many ways, and calls each after each commit. The function may open the table again. Before each
// third commit the same changes and others are undone.
func copyWorkload(t testing.TB, db **DB, commits int, each func(i int)) {
	t.Helper()
	undone := errors.New("undone")
	for i := range commits {
		if i%3 == 2 {
			err := (*db).Update(func(tx *Tx) error {
				return errors.Join(scripted(tx, i, rand.New(rand.NewPCG(8, uint64(i)))), scripted(tx, i, rand.New(rand.NewPCG(9, uint64(i)))), undone)
			})
			if !errors.Is(err, undone) {
				t.Fatal(err)
			}
		}
		must(t, (*db).Update(func(tx *Tx) error { return scripted(tx, i, rand.New(rand.NewPCG(8, uint64(i)))) }))
		each(i)
	}
}

// TestTableFromCopy makes the table anew after each commit, with bases that are made in one go, in slices between
// commits, and not at all, over several openings. It has always what the table has.
func TestTableFromCopy(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	o := Options{NoSync: true, Copy: copies, CopyLost: func(err error) { t.Error(err) }, WrongItem: func(err error) { t.Error(err) }}
	db, err := Open(path, o)
	must(t, err)
	var m *newCopy
	var items [5]int // by operation
	copyWorkload(t, &db, 36, func(i int) {
		want, err := content(db)
		must(t, err)
		if got, err := built(in, copies); err != nil || got != want {
			t.Fatalf("commit %d: the table from the copy is another: %v", i, err)
		}
		if before := db.CopyState(); before.Bytes == 0 || before.Why != nil {
			t.Fatalf("commit %d: %+v", i, before)
		}
		switch {
		case i%18 == 5:
			m, err = db.beginCopy()
			must(t, err)
		case m != nil && i%18 < 12:
			// A slice as small as one key, so that keys are changed before and behind it.
			must(t, sliceOf(db, m, 1500))
		case m != nil:
			for done := false; !done; {
				done, err = db.copyNext(m)
				must(t, err)
			}
			must(t, db.endCopy(m, nil))
			m = nil
		case i%18 == 15:
			countItems(t, copies, &items)
			must(t, db.Close())
			db, err = Open(path, o)
			must(t, err)
		}
	})
	must(t, db.Close())
	if slices.Contains(items[1:], 0) {
		t.Errorf("items by operation: %d", items[1:])
	}
	if n := copies.Handles(); n != 0 {
		t.Errorf("%d files are left open", n)
	}
}

// sliceOf adds a slice that ends after about n bytes.
func sliceOf(db *DB, m *newCopy, n int) error {
	was := copySlice
	copySlice = n
	defer func() { copySlice = was }()
	_, err := db.copyNext(m)
	return err
}

// TestChangeAtTheEndOfASlice: the last key that the slices of a new copy have had is changed, and the one behind it. The
// first change goes to the new copy, and the second comes with the next slice.
func TestChangeAtTheEndOfASlice(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	db, err := Open(path, Options{NoSync: true, Copy: copies, CopyLost: func(err error) { t.Error(err) }})
	must(t, errors.Join(err, db.Adopt()))
	m, err := db.beginCopy()
	must(t, err)
	leaves := bucketNumber(bucketLeaves)
	for m.bucket < leaves || m.key == nil {
		must(t, sliceOf(db, m, 500))
	}
	last, err := parseKey(m.key)
	must(t, err)
	must(t, db.Update(func(tx *Tx) error {
		next := last
		next.Epoch++
		return errors.Join(tx.PutLeaf(last, format.AppendLeaf(nil, leafOf(99))), tx.PutLeaf(next, format.AppendLeaf(nil, leafOf(98))))
	}))
	for done := false; !done; {
		done, err = db.copyNext(m)
		must(t, err)
	}
	must(t, db.endCopy(m, nil))
	want, err := content(db)
	must(t, errors.Join(err, db.Close()))
	if got, err := built(in, copies); err != nil || got != want {
		t.Errorf("the table from the copy is another: %v", err)
	}
}

func countItems(t *testing.T, copies *crashfs.FS, byOp *[5]int) {
	r, err := newestCopy(copies, [16]byte{})
	must(t, err)
	defer r.f.Close()
	end := r.off
	for r.off, r.base, r.last = format.CopyHeaderSize, 0, nil; r.off < end; {
		b, _, err := r.next()
		must(t, err)
		must(t, r.items(b, func(it *format.CopyItem) error {
			byOp[it.Op]++
			return nil
		}))
		r.pass(b)
	}
}

// TestEveryCallOfTheCopyFails makes each call on the files of the copy fail, in the life of a store with a copy and of
// one without. The commit goes on, the copy is never an old one, and a new one is made after it.
func TestEveryCallOfTheCopyFails(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	for _, begin := range []string{"without a copy", "with a copy"} {
		table, err := os.ReadFile(path)
		must(t, err)
		for op := crashfs.OpCreate; op <= crashfs.OpRead; op++ {
			for nth := 1; ; nth++ {
				must(t, os.WriteFile(path, table, 0o600))
				_ = os.Remove(path + VerifiedSuffix)
				errno := []error{syscall.ENOSPC, syscall.EIO}[nth%2]
				if !copyFails(t, in, path, copies.Clone(), op, nth, errno) {
					t.Logf("%s: %d calls of %v", begin, nth-1, op)
					break
				}
			}
		}
		must(t, os.WriteFile(path, table, 0o600))
		_ = os.Remove(path + VerifiedSuffix)
		db, err := Open(path, Options{NoSync: true, Copy: copies})
		must(t, err)
		copyWorkload(t, &db, 2, func(int) {})
		must(t, db.Close())
	}
}

// copyFails lets the nth operation of a kind fail. It returns false if there are not so many.
func copyFails(t *testing.T, in *storage.Folder, path string, copies *crashfs.FS, op crashfs.Op, nth int, errno error) (more bool) {
	t.Helper()
	before := copies.Count(op)
	copies.FailAt(op, nth, errno)
	what := fmt.Sprintf("%v %d fails: %v", op, nth, errno)
	db, err := Open(path, Options{NoSync: true, Copy: copies})
	must(t, err)
	for i := range 4 {
		change := func(tx *Tx) error { return scripted(tx, 13+i, rand.New(rand.NewPCG(8, uint64(13+i)))) }
		err := db.Update(change)
		if err != nil {
			// The copy was given up and could not be removed.
			if op != crashfs.OpRemove && op != crashfs.OpSyncDir || errors.Is(err, ErrUnwritten) != (errno == syscall.ENOSPC) {
				t.Fatalf("%s: %v", what, err)
			}
			must(t, db.Update(change))
		}
		want, err := content(db)
		must(t, err)
		got, err := built(in, copies.Crash(crashfs.Choice{}))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s, commit %d: %v", what, i, err)
		}
		if err == nil && got != want {
			t.Fatalf("%s, commit %d: an old copy is there", what, i)
		}
		if _, due := db.CopyDue(); due || i == 2 {
			_ = db.RenewCopy(func() bool { return false })
		}
	}
	more = copies.Count(op) >= before+nth
	for range 2 { // the fault may come in the first
		_ = db.RenewCopy(func() bool { return false })
	}
	if s := db.CopyState(); s.Bytes == 0 || s.Why != nil {
		t.Fatalf("%s: no copy was made afterwards: %+v", what, s)
	}
	want, err := content(db)
	must(t, errors.Join(err, db.Close()))
	if got, err := built(in, copies.Crash(crashfs.Choice{})); err != nil || got != want {
		t.Fatalf("%s: the copy at the end: %v", what, err)
	}
	return more
}

// TestCopyThatStays: if the copy cannot be made durable in a commit, and not removed either, the commit fails although the
// table has it, and no other follows. Its caller would remove what the copy refers to.
func TestCopyThatStays(t *testing.T) {
	path := filepath.Join(memoryDir(t), "t")
	filled(t, path)
	for op, errno := range map[crashfs.Op]error{crashfs.OpRemove: syscall.ENOSPC, crashfs.OpSyncDir: syscall.EIO} {
		copies := crashfs.New()
		db, err := Open(path, Options{NoSync: true, Copy: copies})
		must(t, errors.Join(err, db.Adopt()))
		change := func(tx *Tx) error { return scripted(tx, 13, rand.New(rand.NewPCG(8, uint64(errno.(syscall.Errno))))) }
		copies.FailAt(crashfs.OpSync, 1, syscall.EIO)
		copies.FailAt(op, 1, errno)
		first := db.Update(change)
		if !errors.Is(first, errno) || errors.Is(first, ErrUnwritten) {
			t.Errorf("%v fails: %v", op, first)
		}
		if err := db.Update(change); err == nil {
			t.Errorf("%v fails: another commit follows", op)
		}
		must(t, db.Close())
	}
}

// TestStaleCopy commits as an older program does, without the copy. The copy is then known to be stale, and made anew.
func TestStaleCopy(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	var lost []string
	for round := range 3 {
		db, err := Open(path, Options{NoSync: true, Copy: copies, CopyLost: func(err error) { lost = append(lost, err.Error()) }})
		must(t, err)
		copyWorkload(t, &db, 2, func(int) {})
		want, err := content(db)
		must(t, errors.Join(err, db.Close()))
		if got, err := built(in, copies); err != nil || got != want || len(lost) != round {
			t.Fatalf("round %d: %v; %q", round, err, lost)
		}
		old, err := Open(path, Options{NoSync: true})
		must(t, err)
		must(t, old.Update(func(tx *Tx) error {
			return tx.PutBranch(&format.Branch{ID: uint32(900 + round), Epoch: 1})
		}))
		must(t, old.Close())
	}
	if !strings.Contains(strings.Join(lost, "\n"), "another state of the table") {
		t.Errorf("%q", lost)
	}
}

// TestCopyOfAKilledOwner: a copy that an owner wrote, and was killed before it synced it, is durable before a table is made
// from it, and before a table goes on with it. Otherwise a power cut would leave a copy that is older than the table.
func TestCopyOfAKilledOwner(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	db, err := Open(path, Options{NoSync: true, Copy: copies})
	must(t, err)
	var killed *crashfs.FS
	copyWorkload(t, &db, 8, func(i int) {
		if i == 6 { // the next sync is that of the last commit's batch
			copies.OnSync(func(string) {
				if killed == nil {
					killed = copies.Clone()
				}
			})
		}
	})
	want, err := content(db)
	must(t, errors.Join(err, db.Close()))
	afterCut := func(fs *crashfs.FS) uint64 {
		got, err := built(in, fs.Crash(crashfs.Choice{}))
		must(t, err)
		return got
	}
	if afterCut(killed) == want {
		t.Fatal("the batch was durable already")
	}
	rebuilt := killed.Clone()
	if got, err := built(in, rebuilt); err != nil || got != want || afterCut(rebuilt) != want {
		t.Errorf("after a table was made, a power cut leaves an older copy: %v", err)
	}
	db, err = Open(path, Options{NoSync: true, Copy: killed})
	must(t, err)
	must(t, db.Adopt())
	if afterCut(killed) != want {
		t.Error("after the table was opened, a power cut leaves an older copy")
	}
	must(t, db.Close())
}

// TestBatchAhead: if a commit fails, its batch may stay in the copy. The next owner cuts it off durably before it does
// anything else, and not only when it commits: until then a table would be made from it.
func TestBatchAhead(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in, copies := folderOf(t, dir), crashfs.New()
	o := Options{NoSync: true, Copy: copies}
	db, err := Open(path, o)
	must(t, err)
	copyWorkload(t, &db, 4, func(int) {})
	want, err := content(db)
	must(t, err)
	p, err := os.ReadFile(path)
	must(t, err)
	disk, err := crashtable.NewDisk(p)
	must(t, err)
	_, err = crashtable.Attach(db, disk, func(s crashtable.Step) error {
		if s == crashtable.WriteMeta {
			return syscall.EIO
		}
		return nil
	})
	must(t, err)
	if err := db.Update(func(tx *Tx) error { return scripted(tx, 13, rand.New(rand.NewPCG(8, 13))) }); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the commit did not fail: %v", err)
	}
	must(t, db.Close())
	db, err = Open(path, o)
	must(t, err)
	if got, err := built(in, copies.Clone()); err != nil || got == want {
		t.Fatalf("there is no batch ahead: %v", err)
	}
	must(t, db.Adopt())
	for what, fs := range map[string]*crashfs.FS{"the owner is killed": copies.Clone(), "the power is cut": copies.Crash(crashfs.Choice{})} {
		if got, err := built(in, fs); err != nil || got != want {
			t.Errorf("%s: the table from the copy is another: %v", what, err)
		}
	}
	must(t, db.Close())
}

// TestCopyWhoseSyncFailed: what a failed sync leaves can be read, and the next sync does not fail, but it is not on the disk.
// So a new copy whose sync failed is not there for the next owner, even if nothing is committed before. What an owner
// leaves that was killed in front of that sync is not there for the owner after the one whose sync fails.
func TestCopyWhoseSyncFailed(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	in := folderOf(t, dir)
	commit := func(copies *crashfs.FS, from, n int, then func(db *DB)) {
		db, err := Open(path, Options{NoSync: true, Copy: copies})
		must(t, errors.Join(err, db.Adopt()))
		for i := from; i < from+n; i++ {
			must(t, db.Update(func(tx *Tx) error { return scripted(tx, i, rand.New(rand.NewPCG(8, uint64(i)))) }))
		}
		then(db)
		must(t, db.Close())
	}
	more := func(what string, copies *crashfs.FS, from int) {
		commit(copies, from, 2, func(db *DB) {
			want, err := content(db)
			must(t, err)
			if got, err := built(in, copies.Crash(crashfs.Choice{})); err != nil || got != want {
				t.Errorf("%s: after a power cut the copy is no copy of the table: %v", what, err)
			}
		})
	}
	for i, n := range []int{1, 2, 3} {
		copies := crashfs.New()
		commit(copies, 4*i, 2, func(db *DB) {
			copies.FailAt(crashfs.OpSync, n, syscall.EIO)
			if db.RenewCopy(func() bool { return false }) == nil {
				t.Fatalf("sync %d did not fail", n)
			}
		})
		more(fmt.Sprintf("sync %d of a new copy failed", n), copies, 4*i+2)
	}
	copies := crashfs.New()
	var killed *crashfs.FS
	commit(copies, 12, 2, func(db *DB) {
		syncs := 0
		copies.OnSync(func(string) {
			if syncs++; syncs == 5 { // it is called before and after each: this is before the third
				killed = copies.Clone()
			}
		})
		must(t, db.RenewCopy(func() bool { return false }))
	})
	killed.FailAt(crashfs.OpSync, 1, syscall.EIO)
	commit(killed, 0, 0, func(*DB) {})
	more("a killed owner left a copy", killed, 14)

	copies = crashfs.New()
	commit(copies, 18, 2, func(*DB) {})
	db, err := Open(path, Options{NoSync: true, Copy: copies})
	must(t, errors.Join(err, db.Adopt()))
	copies.FailAt(crashfs.OpSync, 1, syscall.EIO)
	copies.FailAt(crashfs.OpRemove, 1, syscall.EIO)
	err = db.Update(func(tx *Tx) error { return scripted(tx, 20, rand.New(rand.NewPCG(8, 20))) })
	if !errors.Is(err, syscall.EIO) {
		t.Fatalf("neither the sync nor the removal failed: %v", err)
	}
	_ = db.Close() // as a kill, to the copy
	more("the copy could neither be synced nor be removed", copies, 21)
	for n := 1; n <= 3; n++ {
		copies := crashfs.New()
		commit(copies, 30+4*n, 2, func(db *DB) {
			copies.FailAt(crashfs.OpSync, n, syscall.EIO)
			copies.FailAt(crashfs.OpRemove, 2, syscall.EIO) // the first one is of an older file
			if err := db.RenewCopy(func() bool { return false }); err == nil {
				t.Fatalf("sync %d did not fail", n)
			}
		})
		more(fmt.Sprintf("sync %d of a new copy failed, and its removal too", n), copies, 30+4*n+2)
	}
}

// TestDamagedCopy damages the copy at -copy.places places: cut short and with a flipped byte. A table is made from it
// only as of a state that was committed: of a copy with a flipped byte only the last, and only if the byte does not
// matter.
func TestDamagedCopy(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	in, copies := folderOf(t, dir), crashfs.New()
	db, err := Open(path, Options{NoSync: true, Create: true, Copy: copies})
	must(t, err)
	var states []uint64
	copyWorkload(t, &db, 5, func(int) {
		now, err := content(db)
		must(t, err)
		states = append(states, now)
	})
	last := states[len(states)-1]
	must(t, db.Close())
	name, whole := copyNow(t, copies)
	step := len(whole) / *copyPlaces
	refused, older := 0, 0
	for at := 0; at < len(whole); at += step {
		bad := bytes.Clone(whole)
		bad[at] ^= 1 << (at % 8)
		switch got, err := built(in, copiesOf(t, name, bad)); {
		case errors.Is(err, format.ErrCorrupt) || errors.Is(err, format.ErrVersion):
			refused++
		case err != nil:
			t.Fatalf("byte %d: %v", at, err)
		case got == last:
			t.Fatalf("byte %d: the damage was not found", at)
		case !slices.Contains(states, got):
			t.Fatalf("byte %d: a state that never was", at)
		default:
			older++ // in the last batch, which a crash can cut short as well
		}
	}
	if refused == 0 || older == 0 {
		t.Errorf("%d copies were refused, %d are as of an older state", refused, older)
	}
	for at := 0; at < len(whole); at += step {
		switch got, err := built(in, copiesOf(t, name, whole[:at])); {
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, format.ErrCorrupt):
			t.Fatalf("cut at %d: %v", at, err)
		case err == nil && !slices.Contains(states, got) && at > len(whole)/5:
			t.Fatalf("cut at %d: a state that never was", at)
		}
	}
}

var copyPlaces = flag.Int("copy.places", 150, "places at which TestDamagedCopy damages a copy")

// FuzzCopy makes a table from arbitrary bytes. It takes only what it can verify, and does not panic.
func FuzzCopy(f *testing.F) {
	dir := memoryDir(f)
	copies := crashfs.New()
	db, err := Open(filepath.Join(dir, "t"), Options{NoSync: true, Create: true, Copy: copies})
	must(f, err)
	copyWorkload(f, &db, 4, func(int) {})
	must(f, db.Close())
	in := folderOf(f, dir)
	_, whole := copyNow(f, copies)
	f.Add(whole, false)
	f.Add(whole[:len(whole)/2], true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			b = fixBatches(b)
		}
		_, err := built(in, copiesOf(t, CopyNames[0], b))
		if err != nil && !errors.Is(err, format.ErrCorrupt) && !errors.Is(err, format.ErrVersion) && !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("not an error about damage: %v", err)
		}
	})
}

// fixBatches gives the header and each batch the checksums that their bytes call for, so that what lies behind the
// checksums is read too.
func fixBatches(b []byte) []byte {
	if len(b) < format.CopyHeaderSize {
		return b
	}
	b = bytes.Clone(b)
	copy(b, format.AppendCopyHeader(nil, [16]byte{}))
	for off := format.CopyHeaderSize; off+format.CopyHeadSize <= len(b); {
		p := b[off:]
		h := format.CopyHead{Kind: format.CopyKind(1 + p[4]%3), Number: le.Uint64(p[8:]), Length: le.Uint64(p[16:]) % (1 << 20), Sum: le.Uint64(p[24:])}
		end := off + format.CopyHeadSize + int(h.Length)
		if end > len(b) {
			break
		}
		h.Items = format.Checksum(b[off+format.CopyHeadSize : end])
		head := h.Encode(int64(off))
		copy(p, head[:])
		off = end
	}
	return b
}
