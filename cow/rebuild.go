package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/metadata"
)

const (
	newTableFile = tableFile + ".new"    // while it is made and proved
	asideTable   = tableFile + ".aside-" // and a number
)

// Rebuilt describes a table that was made anew.
type Rebuilt struct {
	Why       string `json:"why"`             // what was wrong with the old table; empty: nothing
	From      string `json:"from"`            // the file that the new one was made from
	Rows      int64  `json:"rows"`            // of the new table
	Record    uint64 `json:"record"`          // the number of the first record that the new table does not have
	Replayed  int64  `json:"replayed"`        // records of the log behind it
	Volumes   int    `json:"volumes"`         // with the log
	Snapshots int    `json:"snapshots"`       // with the log
	Aside     string `json:"aside,omitempty"` // the old table's new name
}

// RebuildTable makes the table of the store in dir anew from its copy (docs/format.md, The copy of the table). It refuses
// a store whose table is sound (ErrSound), unless force is true, and a store that has an owner (ErrBusy). Nothing is
// changed before the new table is proved to belong to the log and the chunks. The old table stays beside it.
func RebuildTable(dir string, force bool, o Options) (*Rebuilt, error) {
	return replaceTable(dir, force, o, "vdisk metadata rebuild", func(in *storage.Folder, copies storage.FS, uuid [16]byte) (metadata.Built, error) {
		return metadata.FromCopy(in, newTableFile, copies, uuid)
	})
}

type makeTable func(in *storage.Folder, copies storage.FS, uuid [16]byte) (metadata.Built, error)

// replaceTable replaces the table of a store by the one that mk makes under the name newTableFile.
func replaceTable(dir string, force bool, o Options, holder string, mk makeTable) (r *Rebuilt, err error) {
	err = repairTable(dir, force, o, holder, func(t *tableRepair) error {
		r = &t.done
		err := t.replace(mk)
		if err == nil && o.Replaced != nil {
			o.Replaced(t.in, r)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// repairTable calls repair with the store's lock held.
func repairTable(dir string, force bool, o Options, holder string, repair func(*tableRepair) error) (err error) {
	o.setDefaults()
	in, err := openFolder(dir, o.Foreign)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	info, err := readFormat(in)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("no store at %s: %w", dir, ErrNotFound)
	}
	if err != nil {
		return err
	}
	if err := unwritable(in); err != nil {
		return fmt.Errorf("open store %s: %w", dir, err)
	}
	lock, err := lockStore(in, o.LockTimeout, cmp.Or(o.Holder, holder))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := repair(&tableRepair{in: in, info: info, opts: o, force: force}); err != nil {
		return fmt.Errorf("store %s: %w", dir, fault.NoSpace(err))
	}
	return nil
}

// tableRepair replaces a table. The store's lock is held.
type tableRepair struct {
	in    *storage.Folder
	info  format.StoreInfo
	opts  Options
	force bool
	done  Rebuilt
}

func (t *tableRepair) replace(mk makeTable) error {
	uuid, err := t.info.ID()
	if err != nil {
		return err
	}
	why := t.prove(tableFile)
	switch {
	case why == nil && !t.force:
		return fmt.Errorf("%w, and nothing was changed; --force replaces it nevertheless", ErrSound)
	case why != nil && !t.isDamage(why) && !t.force:
		return fmt.Errorf("whether the table is sound is not known: %w", why)
	case why != nil:
		t.done.Why = why.Error()
	}
	copies := t.opts.copyFS
	if t.opts.fs == nil {
		copies = t.in.Files()
	}
	built, err := mk(t.in, copies, uuid)
	if err != nil {
		return notRebuilt(err)
	}
	t.done.From, t.done.Rows, t.done.Record = built.From, built.Rows, built.Checkpoint.Seq
	if err := t.prove(newTableFile); err != nil {
		err = fmt.Errorf("the table that was made from %s does not belong to the log and the chunks: %w", built.From, err)
		return errors.Join(notRebuilt(err), t.in.Remove(newTableFile))
	}
	return t.swap()
}

// isDamage reports whether the table is damaged by what opening it has returned. A table that lacks a part is an older
// program's, unless the store has a version that no older program has made.
func (t *tableRepair) isDamage(why error) bool {
	return errors.Is(why, ErrCorrupt) || fault.IsUnreadable(why) ||
		errors.Is(why, metadata.ErrOlder) && t.info.Version == format.StoreVersion
}

// notRebuilt makes an error about damage match ErrNotRebuilt, too.
func notRebuilt(err error) error {
	if !errors.Is(err, ErrCorrupt) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrNotRebuilt, err)
}

// with opens the store to read, with the table of the given name, and reads the whole log. It changes nothing.
func (t *tableRepair) with(name string, fn func(*Store) error) (err error) {
	in, err := storage.OpenFolder(t.in.Path(), t.opts.Foreign)
	if err != nil {
		return err
	}
	o := t.opts
	o.table, o.proves, o.Outlive, o.Repair, o.Look = name, true, false, nil, false
	o.onTable = func(*metadata.DB) error { return nil }
	o.Logger = slog.New(slog.DiscardHandler)
	s, err := build(in, t.info, o, nil, errors.New("the table is being proved"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.release()) }()
	return fn(s)
}

// prove opens the store with the table of the given name, and verifies each row.
func (t *tableRepair) prove(name string) error {
	return t.with(name, func(s *Store) error { return t.proved(name, s) })
}

func (t *tableRepair) proved(name string, s *Store) error {
	if err := s.meta.View((*metadata.Tx).Intact); err != nil {
		return err
	}
	if name == newTableFile {
		t.done.Replayed = s.recovery.Records
		info := s.Info()
		t.done.Volumes, t.done.Snapshots = info.Volumes, info.Snapshots
		if noted := metadata.NotedCheckpoint(t.in, tableFile); noted > t.done.Record {
			return fault.Corruptf("it is as of record %d, and the last table was as of record %d (if the whole store was put back from a copy, remove %s%s)",
				t.done.Record, noted, tableFile, metadata.VerifiedSuffix)
		}
		if !t.force {
			return s.allChunksThere()
		}
	}
	return nil
}

// allChunksThere returns an error if the file of a chunk with live blocks is missing. Nobody uses the store.
func (s *Store) allChunksThere() error {
	names, err := s.fs.List()
	if err != nil {
		return err
	}
	for _, c := range s.slots.all() {
		if _, found := slices.BinarySearch(names, wal.ChunkName(c.Slot)); !found && c.live > 0 && !c.gone {
			return fault.Corruptf("chunk %s has %d live bytes, and its file is missing; --force takes the table nevertheless", c.Name(), c.live)
		}
	}
	return nil
}

// swap puts the new table in the place of the old one, which stays under another name. If the file system has links,
// there is a table at any moment.
func (t *tableRepair) swap() error {
	switch st, err := t.in.Lstat(tableFile); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		n, err := t.freeNumber(st.Dev, st.Ino)
		if err != nil {
			return err
		}
		t.done.Aside = fmt.Sprint(asideTable, n)
		err = storage.Retry(func() error { return unix.Linkat(t.in.Fd(), tableFile, t.in.Fd(), t.done.Aside, 0) })
		if err != nil && !errors.Is(err, fs.ErrExist) { // not every file system has links
			if err := t.in.Rename(tableFile, t.done.Aside); err != nil {
				return err
			}
		}
		if err := syncFolder(t.in); err != nil { // else a power cut could leave the new table without the old one
			return err
		}
	}
	if err := t.in.Rename(newTableFile, tableFile); err != nil {
		return err
	}
	return syncFolder(t.in)
}

// freeNumber returns the lowest number that no table was set aside under. If a process was killed when the table had both
// names, it is that number.
func (t *tableRepair) freeNumber(dev, ino uint64) (n int, err error) {
	for n = 1; ; n++ {
		switch st, err := t.in.Lstat(fmt.Sprint(asideTable, n)); {
		case errors.Is(err, fs.ErrNotExist):
			return n, nil
		case err != nil:
			return 0, err
		case st.Dev == dev && st.Ino == ino:
			return n, nil
		}
	}
}

// RestoreTable makes the table of the store in dir from the text of a dump (DumpTable), as RebuildTable does from the
// copy.
func RestoreTable(dir, name string, dump io.Reader, force bool, o Options) (*Rebuilt, error) {
	return replaceTable(dir, force, o, "vdisk metadata restore", func(in *storage.Folder, _ storage.FS, uuid [16]byte) (metadata.Built, error) {
		b, err := metadata.FromDump(in, newTableFile, dump, uuid)
		b.From = name
		return b, err
	})
}

// DumpTable writes the table as text, as of now or, in a store that can only be read, as of its last checkpoint.
// It ends early with ctx, or with the store.
func (s *Store) DumpTable(ctx context.Context, w io.Writer) error {
	if err := s.beginTask(); err != nil {
		return err
	}
	defer s.tasks.Done()
	if s.readOnly == nil {
		if err := s.Checkpoint(); err != nil {
			return err
		}
	}
	w = stoppedWriter{w, func() error { return s.interrupted(ctx) }}
	return s.meta.View(func(tx *metadata.Tx) error { return tx.Dump(w, s.wal.UUID()) })
}

// stoppedWriter is a writer that fails once stopped returns an error.
type stoppedWriter struct {
	io.Writer
	stopped func() error
}

func (w stoppedWriter) Write(p []byte) (int, error) {
	if err := w.stopped(); err != nil {
		return 0, err
	}
	return w.Writer.Write(p)
}
