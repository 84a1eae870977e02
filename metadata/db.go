package metadata

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// ErrLocked is matched by the error of Open when another process has the file open.
var ErrLocked = errors.New("metadata: the table is open in another process")

var (
	bucketStore     = []byte("store")
	bucketVolumes   = []byte("volumes")
	bucketSnapshots = []byte("snapshots")
	bucketBranches  = []byte("branches")
	bucketLeaves    = []byte("leaves")
	bucketChanges   = []byte("changes")
	bucketChunks    = []byte("chunks")
	bucketForwarded = []byte("forwarded")
	bucketForwards  = []byte("forwards")

	keyCheckpoint = []byte("checkpoint")
	keySum        = []byte("sum")
	keyCold       = []byte("cold")
	keyStore      = []byte("uuid") // the store's id
)

// initialMmaps are the sizes in bytes of the mapping that bbolt starts with. A commit that outgrows the mapping waits
// for every reader, a Check among them, and every new reader waits for that commit. Readers that hold a lock which
// another reader wants would then wait for ever. So the mapping is larger from the start than any table becomes. It
// costs address space only. The second size is for systems that do not have that much.
var initialMmaps = [2]int{1 << 40, 64 << 30}

// Options are the options of Open.
type Options struct {
	// In is the directory of the table. It stays the caller's, who closes it after the DB. If it is nil, Open opens the
	// directory of the path.
	In *storage.Folder
	// Timeout bounds the wait for bbolt's file lock. 0 is the shortest wait there is.
	Timeout time.Duration
	// NoSync commits without fdatasync. It is for tests only.
	NoSync bool
	// Create makes an empty table if there is none. Without it, a missing or empty file is damage.
	Create bool
	// Store is the id of the store that the table must belong to. A table that does not name its store is accepted.
	// Zero accepts the table of any store.
	Store [16]byte

	// Distrust reads and verifies all pages, whatever the last owner's note says.
	Distrust bool
	// ReadOnly opens the table for reading only. Nothing is changed then, not even the note of how the table was left.
	ReadOnly bool

	// Allocate gives the file blocks of its own from one size in bytes up to another, which becomes the file's size. If
	// it returns an error, as it does above all when the disk is full, the table stays as it is. The default is the
	// function Allocate of this package.
	Allocate func(f *os.File, from, to int64) error
	// Copy is the directory of the copy of the table: docs/format.md, The copy of the table. It stays the caller's, who
	// closes it after the DB. If it is nil, no copy is kept. A copy that is there is then not changed, and the next
	// opening with one finds that it is not of this table.
	Copy storage.FS
	// CopyLost is called when the copy is given up, with the reason. The default does nothing.
	CopyLost func(error)
	// SyncCopy begins the sync of a file of the copy. The commit goes on beside it, and calls wait before it is done. The
	// default syncs in a goroutine. Other functions are for tests only.
	SyncCopy func(f storage.File) (wait func() error)
	// WrongItem is called if the copy does not get a value that the table gets. It is for tests, which have each item
	// verified with it. Otherwise only the sums of the batches would tell, when the copy is read.
	WrongItem func(error)
	// Sync makes durable what an earlier process may have left in memory, before this one reads the file, which Sync must
	// not change. The default is the function Sync of this package, or nothing with NoSync.
	Sync func(f *os.File) error
}

// DB is an open table. Its methods may be called concurrently, and none after Close. Updates run one after the other,
// and any number of readers run beside them.
type DB struct {
	b           *bbolt.DB
	f           *os.File // the file of b
	at          place
	read        atomic.Int64 // leaves that were read since pages were given back
	room        room
	closeFolder func() error // nil: the folder is the caller's
	verified    bool         // the file is the one that the last owner left in this boot
	store       [16]byte     // Options.Store

	copy tableCopy

	updating sync.Mutex // one Update at a time; guards the fields up to seq, and copy
	failed   error      // a commit failed with this error, and what is on the disk is not known any more
	adopted  bool       // Adopt has been called
	named    bool       // the table names its store
	seq      uint64     // the sequence number of the table's checkpoint

	noting sync.Mutex // taken after updating
	note   *note      // nil: the next opening verifies what this process writes; guarded by noting
}

// place is where a table is. The table's file and its note are opened by name in their directory, and never through a
// symbolic link.
type place struct {
	in   *storage.Folder
	name string
}

// Open opens the table at path. It changes nothing, unless Options.Create is set: a table that is proved to be sound
// may still be the wrong one, so the caller looks at it first. Adopt then makes the changes that are needed before the
// first Update. With Options.Create, Open calls Adopt itself.
//
// The error matches ErrLocked if another process has the file open. It matches format.ErrCorrupt if the table is
// missing, damaged, of another store, or older than the one that its last owner left.
func Open(path string, o Options) (*DB, error) {
	at := place{o.In, filepath.Base(path)}
	if at.in == nil {
		var err error
		if at.in, err = storage.OpenFolder(filepath.Dir(path), true); err != nil {
			return nil, fmt.Errorf("open the table: %w", err)
		}
	}
	db, err := openAt(at, o)
	if o.In != nil {
		return db, err
	}
	if err != nil {
		return nil, errors.Join(err, at.in.Close())
	}
	db.closeFolder = at.in.Close
	return db, nil
}

func openAt(at place, o Options) (db *DB, err error) {
	defer guard(&err)()
	if o.Timeout <= 0 {
		o.Timeout = time.Millisecond // bbolt would wait for ever with 0
	}
	path := at.in.Join(at.name)
	was := readNote(at)
	if err := isTable(at, o.Create); err != nil {
		return nil, err
	}
	if !was.durable && !o.ReadOnly {
		if err := settle(at, o); err != nil {
			return nil, err
		}
	}
	was.verified = was.verified && !o.Distrust
	if !was.verified {
		if err := checkPages(at); err != nil {
			return nil, err
		}
	}
	var f *os.File
	b, err := openTable(at, o, &f)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%s: %w", path, ErrLocked)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		// bbolt does not say that it could not read the file.
		if rerr := checkPages(at); rerr != nil && !errors.Is(rerr, format.ErrCorrupt) {
			return nil, rerr
		}
		return nil, fmt.Errorf("%s: %v: %w", path, err, format.ErrCorrupt)
	case err != nil:
		return nil, fmt.Errorf("open the table: %w", err)
	}
	db = &DB{b: b, f: f, at: at, store: o.Store, verified: was.verified}
	db.copy = tableCopy{in: o.Copy, store: o.Store, lost: o.CopyLost, sync: o.SyncCopy, wrong: o.WrongItem}
	if db.copy.sync == nil {
		db.copy.sync = startSync
	}
	if o.ReadOnly {
		err := errors.Join(db.identify(was.checkpoint), db.made(path))
		if err == nil {
			db.room.size, err = sizeOf(f)
		}
		if err == nil {
			err = db.lookForCopy()
		}
		if err != nil {
			return nil, errors.Join(err, b.Close())
		}
		return db, nil
	}
	err = db.initRoom(f, o)
	if err == nil && o.Create {
		err = db.Adopt()
	}
	if err == nil {
		err = db.identify(was.checkpoint)
	}
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	// bbolt has read all pages of a table without a list of its free pages, as older programs left them.
	return db, db.View(func(tx *Tx) error { tx.giveBack(); return nil })
}

// isTable refuses a file that bbolt would make a new table of, unless the caller wants a new one.
func isTable(at place, create bool) error {
	st, err := at.in.Lstat(at.name)
	switch {
	case create && (err == nil || errors.Is(err, fs.ErrNotExist)):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return damaged("the file %s is missing", at.in.Join(at.name))
	case err != nil:
		return fmt.Errorf("open the table: %w", err)
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0: // other kinds of file are refused at opening
		return damaged("the file %s is empty", at.in.Join(at.name))
	}
	return nil
}

// identify verifies that the table belongs to the right store and is not an older one. noted is the checkpoint in the
// note of the last owner, or 0 if none is known. A commit is durable before the note has its checkpoint, so an older
// table is one that somebody has put there.
func (d *DB) identify(noted uint64) error {
	return d.View(func(tx *Tx) error {
		for _, name := range firstBuckets {
			if tx.tx.Bucket(name) == nil {
				return damaged("bucket %q is missing", name)
			}
		}
		id, err := tx.storeID()
		if err != nil {
			return err
		}
		var zero [16]byte
		if d.named = id != zero; d.named && d.store != zero && id != d.store {
			return damaged("it is of store %x, and the file format names store %x", id, d.store)
		}
		cp, err := tx.checkpoint()
		if err != nil {
			return err
		}
		if d.seq = cp.Seq; noted > cp.Seq {
			return damaged("it is older than the one that was here: as of record %d, not %d (if the whole store was put back from a copy, remove %s%s)",
				cp.Seq, noted, d.at.in.Join(d.at.name), VerifiedSuffix)
		}
		return nil
	})
}

// Verified reports whether Open took the table as verified, because it is the one that the last owner left in this
// boot.
func (d *DB) Verified() bool { return d.verified }

// Adopt makes the table this process's. The caller has made sure that it is the right table. Adopt adds what an older
// program had not made yet, and leaves a note for the next owner. The first Update does the same.
func (d *DB) Adopt() error {
	d.updating.Lock()
	defer d.updating.Unlock()
	return d.adopt()
}

// adopt is Adopt. updating is held.
func (d *DB) adopt() (err error) {
	if d.adopted {
		return nil
	}
	defer guard(&err)()
	if err := d.fillRoom(); err != nil {
		return err
	}
	if err := d.makeBuckets(); err != nil {
		return err
	}
	if err := d.findCopy(); err != nil {
		return err
	}
	d.adopted = true
	d.noting.Lock()
	defer d.noting.Unlock()
	d.note = newNote(d.at, d.seq)
	return nil
}

// openTable opens the table with bbolt. It sets *file to the file that bbolt uses.
func openTable(at place, o Options, file **os.File) (b *bbolt.DB, err error) {
	for _, mmap := range initialMmaps {
		bo := &bbolt.Options{
			Timeout:         o.Timeout,
			NoSync:          o.NoSync,
			ReadOnly:        o.ReadOnly,
			NoGrowSync:      o.NoSync,
			NoFreelistSync:  false, // without the list, opening reads all pages to find the free ones
			FreelistType:    bbolt.FreelistMapType,
			InitialMmapSize: mmap,
			OpenFile: func(_ string, flags int, _ os.FileMode) (f *os.File, err error) {
				*file, err = at.in.Open(at.name, flags)
				return *file, err
			},
		}
		// bbolt does not try its lock again if a signal comes.
		err = storage.Retry(func() (err error) { b, err = bbolt.Open(at.in.Join(at.name), 0o600, bo); return err })
		if !errors.Is(err, unix.ENOMEM) {
			break
		}
	}
	return b, err
}

// firstBuckets are the buckets that every table has.
var firstBuckets = [][]byte{bucketStore, bucketVolumes, bucketSnapshots, bucketBranches, bucketLeaves, bucketChanges, bucketChunks}

// ErrOlder is matched by the error of a table that can only be read and lacks what opening it to write would add.
var ErrOlder = errors.New("made by an older program")

// made refuses a table that lacks a bucket which Adopt would make.
func (d *DB) made(path string) error {
	missing, err := d.missingBuckets()
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%s was %w: open it once where it can be written to", path, ErrOlder)
	}
	return err
}

func (d *DB) missingBuckets() (missing [][]byte, err error) {
	err = d.b.View(func(tx *bbolt.Tx) error {
		for _, name := range append(slices.Clone(firstBuckets), bucketForwarded, bucketForwards) {
			if tx.Bucket(name) == nil {
				missing = append(missing, name)
			}
		}
		return nil
	})
	return missing, err
}

// makeBuckets makes the buckets that are missing, in a table that is new or of an older version.
func (d *DB) makeBuckets() error {
	missing, err := d.missingBuckets()
	if err != nil || len(missing) == 0 {
		return err // a commit would cost two syncs
	}
	err = d.commit(func(tx *bbolt.Tx) error {
		for _, name := range missing {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, d.measure())
}

// Close waits for the readers and closes the file. The DB must not be used afterwards.
func (d *DB) Close() error {
	err := errors.Join(d.b.Close(), d.copy.close())
	if d.note != nil {
		err = errors.Join(err, d.note.close())
	}
	if d.closeFolder != nil {
		err = errors.Join(err, d.closeFolder())
	}
	return err
}

// Pages returns a function that verifies the table in its present state, as Open does: that the pages form trees, and
// that no row is missing. An error about damage matches format.ErrCorrupt.
//
// No Update may run during the call of Pages. check may run beside Updates as long as a transaction that was begun in
// the same state is open: bbolt does not overwrite the pages that such a transaction sees, nor the list of free pages.
// check may be called once. It opens no file, because there may be no file descriptor left.
func (d *DB) Pages() (check func() error, err error) { return pagesOf(d.f) }
