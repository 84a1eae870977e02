package cow

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
	"github.com/vdisk/vdisk/metadata"
)

// tableImage is what a crash left of the table.
type tableImage struct {
	disk   *crashfs.FS
	note   []byte // the owner's note about the table, or nil
	boot   bool   // in the same boot: a process was killed, or ended
	failed bool   // a sync of the table has failed in this boot
	inside bool   // a commit had begun and was not durable
}

// newTable returns the table of a new store.
func (l *crashHarness) newTable() tableImage { return tableOf(l.table) }

// tableOf returns a durable table with the given content.
func tableOf(content []byte) tableImage {
	disk, err := crashtable.NewDisk(content)
	if err != nil {
		panic(err) // there is no fault on this disk
	}
	return tableImage{disk: disk}
}

// restore makes the files of the table and of its note in a store's folder.
func (i *tableImage) restore(dir string) error {
	path := filepath.Join(dir, tableFile)
	content, err := crashtable.Content(i.disk)
	if err == nil {
		err = os.WriteFile(path, content, 0o600)
	}
	if err != nil {
		return err
	}
	// The note that is there is of another table: a later one, perhaps.
	if err := os.Remove(path + metadata.VerifiedSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if i.note == nil {
		return nil
	}
	var note map[string]any
	if err := json.Unmarshal(i.note, &note); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	note["dev"], note["ino"], note["ctime"] = st.Dev, st.Ino, st.Ctim.Nano()
	if !i.boot {
		note["boot"] = "another"
	}
	text, err := json.Marshal(note)
	if err != nil {
		return err
	}
	return os.WriteFile(path+metadata.VerifiedSuffix, text, 0o600)
}

// tableNow is the table as it is for another process in this boot. The caller holds the lock.
func (c *crashInjector) tableNow() tableImage {
	return tableImage{disk: c.table.Clone(), note: c.note(), boot: true, failed: c.failed, inside: c.inside()}
}

// tableCut is the table after a power cut. Its note may be lost, since nobody syncs it. The caller holds the lock.
func (c *crashInjector) tableCut(choice crashfs.Choice) tableImage {
	i := tableImage{disk: c.table.Crash(choice), inside: c.inside()}
	if c.rng.IntN(4) > 0 {
		i.note = c.note()
	}
	return i
}

// inside reports whether a commit has begun and is not durable. The caller holds the lock.
func (c *crashInjector) inside() bool { return c.begun && c.table.Unsynced() > 0 }

// note returns the owner's note about the table, or nil. It must be read before the table: a note that is older than
// the table is one that a crash can leave, and one that is younger is not.
func (c *crashInjector) note() []byte {
	text, err := os.ReadFile(filepath.Join(c.dir, tableFile+metadata.VerifiedSuffix))
	if err != nil || !json.Valid(text) {
		return nil
	}
	return text
}

// tableChoices returns choices for the table. What the disk keeps of it has nothing to do with what it keeps of the
// chunk files. The caller holds the lock.
func (c *crashInjector) tableChoices() []crashfs.Choice {
	return c.table.Choices(c.rng.Uint64(), 3)
}

// onTable lets power cuts into the commits of the table.
func (w *modelStore) onTable(db *metadata.DB) (err error) {
	w.table, err = crashtable.Attach(db, w.injector.table, w.step)
	return err
}

// step cuts the power before a step of a commit, which then may fail.
func (w *modelStore) step(s crashtable.Step) error {
	c := w.injector
	c.mu.Lock()
	c.begun = true
	// A commit is one of many things that a cut can be in, and has many pages, which a later cut loses too.
	skip := c.rng.IntN(3) > 0 || s == crashtable.WritePage && c.rng.IntN(4) > 0
	c.mu.Unlock()
	if !skip {
		c.point("before " + s.String())
	}
	if w.failing == nil {
		return nil
	}
	err := w.failing(s)
	if err != nil {
		c.mu.Lock()
		c.failed = c.failed || s == crashtable.SyncPages || s == crashtable.SyncMeta
		c.mu.Unlock()
	}
	return err
}

// sameTable holds the copy of the table to be the file: no write went past it.
func (w *modelStore) sameTable() error {
	c := w.injector
	c.mu.Lock()
	defer c.mu.Unlock()
	content, err := crashtable.Content(c.table)
	if err != nil {
		return err
	}
	file, err := os.ReadFile(filepath.Join(w.dir, tableFile))
	if err == nil && !bytes.Equal(file, content) {
		err = errors.New("the file of the table is not what was written to its copy")
	}
	return err
}

// failAt makes one step of the next commit fail: the nth of those that may.
func (w *modelStore) failAt(nth uint32, err error, may ...crashtable.Step) {
	w.failing = func(s crashtable.Step) error {
		for _, m := range may {
			if s != m {
				continue
			}
			if nth == 0 {
				w.failing = nil
				return err
			}
			nth--
		}
		return nil
	}
}

// growTable takes space from the disk that the chunk files are on.
func (w *modelStore) growTable(n int64) error {
	if err := w.injector.fs.Take(n); err != nil {
		return err
	}
	return w.table.Grow(n)
}

// syncTable makes the table durable as another process has left it. After a failed sync the disk has any part of what
// that sync covered, and nothing else can be read any more.
func (w *modelStore) syncTable(f *os.File) error {
	c := w.injector
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.failed {
		return crashtable.Sync(c.table)
	}
	choices := c.tableChoices()
	c.table, c.failed = c.table.Crash(choices[c.rng.IntN(len(choices))]), false
	content, err := crashtable.Content(c.table)
	if err != nil {
		return err
	}
	return os.WriteFile(f.Name(), content, 0o600)
}

// syncCopy syncs the copy of the table before bbolt writes, when bbolt has written all, or beside it.
func (w *modelStore) syncCopy(f storage.File) func() error {
	w.injector.mu.Lock()
	when := w.injector.rng.IntN(3)
	w.injector.mu.Unlock()
	done := make(chan error, 1)
	switch when {
	case 0:
		return f.Sync
	case 1:
		done <- f.Sync()
	default:
		go func() { done <- f.Sync() }()
	}
	return func() error { return <-done }
}

// failCommit makes a checkpoint whose commit fails, not for want of space: the store stops.
func (w *modelStore) failCommit(o op) error {
	w.failAt(0, syscall.EIO, crashtable.Step(o.b%4))
	err := w.s.Checkpoint()
	w.failing = nil
	if !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO) {
		return errors.Join(errors.New("a commit has failed, and the store goes on"), err)
	}
	return w.check(false) // the copy of the table may now have more or less than the table, and that is no damage
}

// cut is the image of a power cut at this moment.
func (w *modelStore) cut(choice crashfs.Choice) crashImage {
	c := w.injector
	c.mu.Lock()
	defer c.mu.Unlock()
	tables := c.tableChoices()
	of := tables[c.rng.IntN(len(tables))]
	return crashImage{
		fs: c.fs.Crash(choice), table: c.tableCut(of), m: w.m, floor: c.floor,
		what: fmt.Sprintf("%v, of the table %v", choice, of),
	}
}

// TestCutInCreate cuts the power while a store is made, up to each part of its table. Until the format file is there,
// there is no store, and Create makes it anew.
func TestCutInCreate(t *testing.T) {
	root := memoryDir(t)
	whole := filepath.Join(root, "whole")
	must(t, Create(whole))
	table, err := os.ReadFile(filepath.Join(whole, tableFile))
	must(t, err)
	const parts = 24
	for i := range parts {
		dir := filepath.Join(root, fmt.Sprint(i))
		must(t, os.Mkdir(dir, 0o700))
		part := bytes.Clone(table)
		clear(part[len(part)*i/parts/512*512:])
		if i%3 == 0 { // the size was lost, too
			part = part[:len(part)*i/parts/512*512]
		}
		must(t, os.WriteFile(filepath.Join(dir, tableFile), part, 0o600))
		must(t, os.WriteFile(filepath.Join(dir, formatFile+".tmp"), make([]byte, i), 0o600))
		if i%2 == 0 {
			must(t, os.WriteFile(filepath.Join(dir, tableFile+metadata.VerifiedSuffix), make([]byte, 256), 0o600))
			must(t, os.Mkdir(filepath.Join(dir, chunksDir), 0o700))
		}
		if _, err := Open(dir, Options{}); !errors.Is(err, ErrNotFound) {
			t.Errorf("part %d: open: %v", i, err)
		}
		must(t, Create(dir))
		s, err := Open(dir, Options{})
		must(t, err)
		_, err = s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
		must(t, err)
		_, err = s.Check(t.Context(), CheckOptions{}, func(p Problem) { t.Errorf("part %d: %v", i, p) })
		must(t, errors.Join(err, s.Close()))
	}
}
