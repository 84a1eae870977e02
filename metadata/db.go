// Package metadata is the durable allocation table of a store: a bbolt file
// that holds the volumes, snapshots and branches, every version of every leaf,
// and the accounting of the chunks, all as of one place in the log.
//
// It is a checkpoint, never on the path of a write: the engine changes memory
// and the log, and brings this table up to date now and then, in one
// transaction a checkpoint (Update). What the buckets and keys are is in
// docs/format.md, The table; the bytes of the values are package format's.
//
// bbolt checks its two meta pages only and panics on other damage, or faults
// when its file was cut. Every method here turns both into an error that
// matches format.ErrCorrupt.
package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
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

// ErrLocked says that another process has the file open.
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
	keyStore      = []byte("uuid") // of the store
)

// A commit that outgrows the mapping waits for every reader, a Check among them, and every new reader waits for it:
// those that hold a lock which another reader wants wait for ever. So the mapping starts larger than any table gets; it
// costs address space only. The second is for systems that do not have that much.
var initialMmaps = [2]int{1 << 40, 64 << 30}

// Options are for Open.
type Options struct {
	In      *storage.Folder // the directory of the table, which stays the caller's; nil: whatever has its path
	Timeout time.Duration   // how long to wait for bbolt's file lock; 0 is the shortest wait there is
	NoSync  bool            // tests only: commit without fdatasync
	Create  bool            // make an empty table where there is none; else that is damage, and so is an empty file
	Store   [16]byte        // the table is of this store, or of one that it does not name; zero: of any

	// ReadOnly opens the table to be read, and changes nothing, not even the note of how it was left.
	ReadOnly bool

	// Allocate gives the file blocks of its own from one size up to another, which becomes its size. An error, for
	// want of room above all, leaves the table as it is. Default: the package's Allocate.
	Allocate func(f *os.File, from, to int64) error
}

// DB is an open table. Its methods may be called concurrently; Updates come one
// after the other, and many readers beside them.
type DB struct {
	b           *bbolt.DB
	f           *os.File // b's
	at          place
	read        atomic.Int64 // leaves, since pages were given back
	room        room
	closeFolder func() error // nil: the folder is the caller's
	verified    bool         // the file is the one that the last owner left in this boot
	store       [16]byte     // Options.Store

	updating sync.Mutex // one Update at a time
	failed   error      // of a commit: what is on the disk is not known any more; guarded by updating
	adopted  bool       // Adopt has been called; guarded by updating
	named    bool       // the table says whose it is; guarded by updating
	seq      uint64     // of its checkpoint; guarded by updating

	noting sync.Mutex // taken after updating
	note   *note      // nil: what this process does to the table, the next opening verifies; guarded by noting
}

// place is where a table is: its file and its note are opened by name in their directory, and never through a link.
type place struct {
	in   *storage.Folder
	name string
}

// Open opens the table at path. It changes nothing: that a table is proved to be sound does not say that it is the
// right one. What there is to do before the first Update, Adopt does.
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
		o.Timeout = time.Millisecond // bbolt takes 0 for "for ever"
	}
	path := at.in.Join(at.name)
	noted, verified := readNote(at)
	if err := isTable(at, o.Create); err != nil {
		return nil, err
	}
	if !verified {
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
		return nil, fmt.Errorf("%s: %v: %w", path, err, format.ErrCorrupt)
	case err != nil:
		return nil, fmt.Errorf("open the table: %w", err)
	}
	db = &DB{b: b, f: f, at: at, store: o.Store, verified: verified}
	if o.ReadOnly {
		err := errors.Join(db.identify(noted), db.made(path))
		if err == nil {
			db.room.size, err = sizeOf(f)
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
		err = db.identify(noted)
	}
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	// Of a table without a list of its free pages, as older programs left them, bbolt has looked at all pages.
	return db, db.View(func(tx *Tx) error { tx.giveBack(); return nil })
}

// isTable refuses what bbolt would make a new table of, unless that is wanted.
func isTable(at place, create bool) error {
	st, err := at.in.Lstat(at.name)
	switch {
	case create && (err == nil || errors.Is(err, fs.ErrNotExist)):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return damaged("the file %s is missing", at.in.Join(at.name))
	case err != nil:
		return fmt.Errorf("open the table: %w", err)
	case st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == 0: // what is no file is refused when it is opened
		return damaged("the file %s is empty", at.in.Join(at.name))
	}
	return nil
}

// identify looks at what a table says of itself: whose it is, and as of what. noted is the checkpoint that the last
// owner's note has; 0: none is known. A commit is durable before the note has it, so an older table is one that
// somebody has put there.
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
			return damaged("it is of another store, %x", id)
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

// Verified reports whether the table is the one that the last owner left, in this boot.
func (d *DB) Verified() bool { return d.verified }

// Adopt makes the table this process's, which is sure by now that it is the right one: it makes what an older program
// had not yet, and leaves a note for the next owner. The first Update does, too.
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
	d.adopted = true
	d.noting.Lock()
	defer d.noting.Unlock()
	d.note = newNote(d.at, d.seq)
	return nil
}

// openTable opens the table with bbolt. *file is the one that bbolt uses.
func openTable(at place, o Options, file **os.File) (b *bbolt.DB, err error) {
	for _, mmap := range initialMmaps {
		b, err = bbolt.Open(at.in.Join(at.name), 0o600, &bbolt.Options{
			Timeout:         o.Timeout,
			NoSync:          o.NoSync,
			ReadOnly:        o.ReadOnly,
			NoGrowSync:      o.NoSync,
			NoFreelistSync:  false, // without, opening reads all pages to find the free ones
			FreelistType:    bbolt.FreelistMapType,
			InitialMmapSize: mmap,
			OpenFile: func(_ string, flags int, _ os.FileMode) (f *os.File, err error) {
				*file, err = at.in.Open(at.name, flags)
				return *file, err
			},
		})
		if !errors.Is(err, unix.ENOMEM) {
			break
		}
	}
	return b, err
}

// firstBuckets are those that every table has.
var firstBuckets = [][]byte{bucketStore, bucketVolumes, bucketSnapshots, bucketBranches, bucketLeaves, bucketChanges, bucketChunks}

// made refuses a table that lacks what Adopt makes.
func (d *DB) made(path string) error {
	missing, err := d.missingBuckets()
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%s was made by an older program: open it once where it can be written to", path)
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

// makeBuckets makes those that are not there, in a table that is new or of an older version.
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

// Close waits for the readers and closes the file.
func (d *DB) Close() error {
	err := d.b.Close()
	if d.note != nil {
		err = errors.Join(err, d.note.close())
	}
	if d.closeFolder != nil {
		err = errors.Join(err, d.closeFolder())
	}
	return err
}

// Pages returns what proves that the pages of the table's file hang together and that no row is missing, as Open
// does, in the state that the table has now. No Update may run meanwhile, but beside the proof, as long as a
// transaction of now is open: bbolt leaves the pages that such a one sees alone, and the list of free pages with
// them. It takes no file descriptor: there may be none left.
func (d *DB) Pages() (check func() error, err error) { return pagesOf(d.f) }

// Update runs fn in a read-write transaction and commits it; on an error
// nothing changes. When Update returns nil, the changes are durable. After an error of the commit that does not match
// ErrUnwritten there may be no other Update. fn may be run more than once.
func (d *DB) Update(fn func(*Tx) error) error {
	d.updating.Lock()
	defer d.updating.Unlock()
	if err := d.adopt(); err != nil {
		return err
	}
	d.noting.Lock()
	if d.note != nil && d.note.begin() != nil {
		d.unverify()
	}
	d.noting.Unlock()
	err := d.update(fn)
	d.noting.Lock()
	if d.note != nil && err == nil {
		d.note.last.Checkpoint = d.seq
	}
	if d.note != nil && (err != nil && !errors.Is(err, ErrUnwritten) || d.note.end() != nil) {
		// Perhaps a sync has failed, and what the next owner would read is not what is on the disk.
		d.unverify()
	}
	d.noting.Unlock()
	if merr := d.measure(); err == nil {
		err = merr
	}
	return err
}

// unverify is called with noting held.
func (d *DB) unverify() {
	d.note.drop()
	d.note = nil
}

func (d *DB) update(fn func(*Tx) error) (err error) {
	defer guard(&err)()
	seq, named := d.seq, d.named
	err = d.commit(func(tx *bbolt.Tx) error {
		t := &Tx{tx: tx, db: d}
		if err := t.loadSum(); err != nil {
			return err
		}
		if err := fn(t); err != nil {
			return err
		}
		if d.store != [16]byte{} && !d.named {
			if err := t.putStoreID(d.store); err != nil {
				return err
			}
			named = true
		}
		seq = max(seq, t.seq)
		return t.storeSum()
	})
	if err == nil {
		d.seq, d.named = seq, named
	}
	return err
}

// View runs fn in a read-only transaction: one state, whatever is committed
// meanwhile. A long one makes the file grow, since no page it sees is reused.
func (d *DB) View(fn func(*Tx) error) (err error) {
	defer guard(&err)()
	return d.b.View(func(tx *bbolt.Tx) error { return fn(&Tx{tx: tx, db: d}) })
}

// Begin starts a read-only transaction that the caller ends with Tx.Close.
func (d *DB) Begin() (tx *Tx, err error) {
	defer guard(&err)()
	t, err := d.b.Begin(false)
	if err != nil {
		return nil, err
	}
	return &Tx{tx: t, db: d}, nil
}

// Guard runs fn, which uses a transaction of Begin, and turns a panic over a
// damaged page into an error.
func Guard(fn func() error) (err error) {
	defer guard(&err)()
	return fn()
}

// guard turns a panic or a memory fault of bbolt over damaged pages into an
// error. SetPanicOnFault is a setting of the calling goroutine.
func guard(err *error) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if p := recover(); p != nil {
			*err = fmt.Errorf("metadata: damaged table: %v: %w", p, format.ErrCorrupt)
		}
	}
}

// Tx is a transaction.
type Tx struct {
	tx      *bbolt.Tx
	db      *DB
	leaves  *bbolt.Cursor // for Leaf, once it was needed
	sum     sum           // of an Update
	recount bool          // a damaged value was replaced: sum is not to be trusted
	seq     uint64        // of the checkpoint that was put; 0: none was
}

// Close ends a transaction of Begin.
func (t *Tx) Close() error { return t.tx.Rollback() }

func id(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// bucket returns a bucket, which Open has made.
func (t *Tx) bucket(name []byte) (*bbolt.Bucket, error) {
	b := t.tx.Bucket(name)
	if b == nil {
		return nil, fmt.Errorf("metadata: bucket %q is missing: %w", name, format.ErrCorrupt)
	}
	return b, nil
}
