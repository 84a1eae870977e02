package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"

	"go.etcd.io/bbolt"

	"github.com/vdisk/vdisk/format"
)

// Update runs fn in a read-write transaction and commits it. When Update returns nil, the changes are durable. If fn
// returns an error, nothing changes. fn may run more than once.
//
// If the error matches ErrUnwritten, nothing has changed, and the Update may be tried again. After any other error of
// the commit, every later Update returns that error.
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
		// A sync may have failed. Then the next owner would read pages that are not on the disk.
		d.unverify()
	}
	d.noting.Unlock()
	if merr := d.measure(); err == nil {
		err = merr
	}
	return err
}

// unverify removes the note. noting is held.
func (d *DB) unverify() {
	d.note.drop()
	d.note = nil
}

func (d *DB) update(fn func(*Tx) error) (err error) {
	defer guard(&err)()
	defer d.copy.settle() // after a panic
	seq, named := d.seq, d.named
	err = d.commit(func(tx *bbolt.Tx) error {
		t := &Tx{tx: tx, db: d}
		if err := errors.Join(t.loadSum(), d.copy.begin()); err != nil {
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
		if err := t.storeSum(); err != nil {
			return err
		}
		return d.copy.write(t.sum)
	})
	if err == nil {
		d.seq, d.named = seq, named
	}
	cerr := d.copy.finish(err == nil, d.failed == nil)
	if err == nil && cerr != nil { // the commit is done, but its caller may not act on it
		d.failed, err = cerr, cerr
	}
	return err
}

// View runs fn in a read-only transaction. fn sees one state, whatever is committed meanwhile. A long transaction makes
// the file grow, because no page that it sees is reused. The error matches format.ErrCorrupt if fn meets a damaged
// page.
func (d *DB) View(fn func(*Tx) error) (err error) {
	defer guard(&err)()
	return d.b.View(func(tx *bbolt.Tx) error { return fn(&Tx{tx: tx, db: d}) })
}

// Begin starts a read-only transaction. The caller ends it with Tx.Close, and uses it in Guard.
func (d *DB) Begin() (tx *Tx, err error) {
	defer guard(&err)()
	t, err := d.b.Begin(false)
	if err != nil {
		return nil, err
	}
	return &Tx{tx: t, db: d}, nil
}

// Guard runs fn, which uses a transaction of Begin. It turns a panic or a memory fault over a damaged page into an
// error that matches format.ErrCorrupt.
func Guard(fn func() error) (err error) {
	defer guard(&err)()
	return fn()
}

// guard returns the function to defer that turns a panic or a memory fault of bbolt over damaged pages into an error.
// SetPanicOnFault is a setting of the calling goroutine.
func guard(err *error) func() {
	old := debug.SetPanicOnFault(true)
	return func() {
		debug.SetPanicOnFault(old)
		if p := recover(); p != nil {
			*err = fmt.Errorf("metadata: damaged table: %v: %w", p, format.ErrCorrupt)
		}
	}
}

// Tx is a transaction. One goroutine at a time may use it. Methods that put or drop need a transaction of DB.Update. An
// error that is about damage matches format.ErrCorrupt.
type Tx struct {
	tx      *bbolt.Tx
	db      *DB
	leaves  *bbolt.Cursor // the cursor of Leaf, from its first use
	sum     sum           // the table's sum with the changes of this Update
	recount bool          // a damaged value was replaced, so sum is wrong
	seq     uint64        // the sequence number of the checkpoint that was put; 0: none was
}

// Close ends a transaction of Begin. A transaction of Update or View ends by itself.
func (t *Tx) Close() error { return t.tx.Rollback() }

func id(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

// damaged says where in the table's file the damage err is.
func (t *Tx) damaged(err error, where string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", t.db.at.name, fmt.Sprintf(where, args...), err)
}

// bucket returns a bucket. Adopt has made all of them, so a missing one is damage.
func (t *Tx) bucket(name []byte) (*bbolt.Bucket, error) {
	b := t.tx.Bucket(name)
	if b == nil {
		return nil, t.damaged(format.ErrCorrupt, "bucket %q is missing", name)
	}
	return b, nil
}
