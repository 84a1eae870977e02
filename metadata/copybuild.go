package metadata

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// buildStep is how many bytes of items are put into a table in one transaction while it is made.
const buildStep = 8 << 20

// errUncompleted is the error of a file of the copy whose base was never completed.
var errUncompleted = errors.New("it was never completed")

// Built describes a table that was made anew.
type Built struct {
	From       string // the file that it was made from
	Batches    int64  // batches of the copy that it was made from
	Rows       int64  // rows of the table
	Checkpoint format.Checkpoint
}

// FromCopy makes a table called name in a folder from the copy that is in the directory copies. The table is as of the
// last whole batch of the copy, and is durable, but its name is not. The error matches fs.ErrNotExist if there is no
// copy, and format.ErrCorrupt if the copy is damaged before its last batch.
func FromCopy(in *storage.Folder, name string, copies storage.FS, store [16]byte) (Built, error) {
	r, err := newestCopy(copies, store)
	if err != nil {
		return Built{}, err
	}
	// A process that was killed may have written the last batch without a sync. The table must not be ahead of the copy.
	last := r.last[len(r.last)-1]
	if err := durable(copies, r.f, last.off, last.end()); err != nil {
		return Built{}, errors.Join(fmt.Errorf("make the copy of the table durable: %w", err), r.f.Close())
	}
	b, err := buildTable(in, name, func(db *DB) error { return r.apply(db, last) })
	b.From, b.Batches = r.name, int64(last.Number-r.first)+1
	return b, errors.Join(err, r.f.Close())
}

// newestCopy returns the file of the copy with the highest number. It has been read to the end of its last whole batch.
// A file whose base was never completed is none. If a file is damaged before its last batch, it may be the one that
// counts, and the error matches format.ErrCorrupt.
func newestCopy(in storage.FS, store [16]byte) (newest *copyReader, err error) {
	for _, name := range CopyNames {
		r, rerr := openCopy(in, name, store)
		if errors.Is(rerr, fs.ErrNotExist) {
			continue
		}
		if rerr == nil {
			rerr = r.whole()
		}
		if rerr == nil && (newest == nil || r.number() > newest.number()) {
			r, newest = newest, r
		}
		if r != nil {
			rerr = errors.Join(rerr, r.f.Close())
		}
		if !errors.Is(rerr, errUncompleted) {
			err = errors.Join(err, rerr)
		}
	}
	if err == nil && newest == nil {
		return nil, fmt.Errorf("there is no copy of the table: %w", fs.ErrNotExist)
	}
	if err != nil && newest != nil {
		err = errors.Join(err, newest.f.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("the copy of the table cannot be used: %w", err)
	}
	return newest, nil
}

func (r *copyReader) number() uint64 { return r.last[len(r.last)-1].Number }

// whole goes to the end of the last whole batch. It returns errUncompleted if the base was never completed, and an error
// that matches format.ErrCorrupt if there are batches behind one that is damaged.
func (r *copyReader) whole() error {
	whole, err := r.toEnd()
	if err != nil {
		return err
	}
	if !whole {
		// A crash leaves any part of what was not durable, but neither the end of the base nor anything behind it.
		return cmp.Or(r.noneBehind(format.CopyHeaderSize, func(h format.CopyHead) bool { return h.Kind != format.CopyBase }), errUncompleted)
	}
	expected := r.number() + 1
	return r.noneBehind(r.off, func(h format.CopyHead) bool { return h.Number > expected })
}

// noneBehind looks for heads of batches from an offset on that a file without damage does not have there.
func (r *copyReader) noneBehind(off int64, bad func(format.CopyHead) bool) error {
	const overlap = format.CopyHeadSize
	p := make([]byte, max(overlap+1, min(copyBuffer, r.size-off)))
	for ; off < r.size; off += int64(len(p)) - overlap {
		n, err := readUpTo(r.f, p, off)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		for i := 0; ; i++ {
			j := bytes.Index(p[i:n], format.CopyBatchMagic)
			if j < 0 {
				break
			}
			i += j
			if h, err := format.DecodeCopyHead(p[i:n], off+int64(i)); err == nil && bad(h) {
				return fmt.Errorf("%s: it is damaged before batch %d: %w", r.name, h.Number, format.ErrCorrupt)
			}
		}
	}
	return nil
}

// apply puts the content of the copy up to the batch last into an empty table.
func (r *copyReader) apply(db *DB, last batchAt) error {
	at := *r
	at.off, at.base, at.last = format.CopyHeaderSize, 0, nil
	for at.off < last.end() {
		// The function may run more than once.
		from := at
		err := db.Update(func(tx *Tx) error {
			at = from
			at.last = append([]batchAt(nil), from.last...)
			for at.off < last.end() && at.off-from.off < buildStep {
				if err := at.applyNext(tx); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *copyReader) applyNext(tx *Tx) error {
	b, ok, err := r.next()
	if err != nil {
		return err
	}
	if ok {
		ok, err = r.verify(b)
	}
	if err == nil && !ok {
		err = fmt.Errorf("%s: the batch at %d is damaged: %w", r.name, r.off, format.ErrCorrupt)
	}
	if err == nil {
		err = r.items(b, func(it *format.CopyItem) error { return tx.applyItem(it) })
	}
	if err != nil {
		return err
	}
	r.pass(b)
	if r.base > 0 && uint64(tx.sum) != b.Sum {
		return fmt.Errorf("%s: the table sums up to %016x after batch %d, which says %016x: %w", r.name, uint64(tx.sum), b.Number, b.Sum, format.ErrCorrupt)
	}
	return nil
}

// applyItem makes a change that a copy names.
func (t *Tx) applyItem(it *format.CopyItem) error {
	if int(it.Bucket) >= len(copyBuckets) {
		return fmt.Errorf("bucket %d: %w", it.Bucket, format.ErrCorrupt)
	}
	name := copyBuckets[it.Bucket]
	var value []byte
	switch it.Op {
	case format.CopyRemove:
		return t.drop(name, it.Key)
	default: // bbolt keeps the value until the commit
		b, err := t.bucket(name)
		if err != nil {
			return err
		}
		if value, err = it.Apply(b.Get(it.Key)); err != nil {
			return err
		}
	}
	if isSum(name, it.Key) || !intact(value) {
		return fmt.Errorf("the value of %q %x: %w", name, it.Key, format.ErrCorrupt)
	}
	return t.set(name, bytes.Clone(it.Key), value)
}

// Mended makes a table called name, which is the table from with the changes of mend. It is durable, but its name is not.
// After an error there is none.
func Mended(in *storage.Folder, from, name string, mend func(*Tx) error) (Built, error) {
	b, err := makeTable(in, name, func() error { return copyTable(in, from, name) }, func(db *DB) error { return db.Update(mend) })
	b.From = from
	return b, err
}

func copyTable(in *storage.Folder, from, name string) error {
	r, err := in.Open(from, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := in.Open(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// buildTable makes a table, which fill fills. It is verified as Open does, and durable, but its name is not. After an
// error there is none.
func buildTable(in *storage.Folder, name string, fill func(*DB) error) (Built, error) {
	return makeTable(in, name, func() error { return nil }, fill)
}

// makeTable is buildTable with a file that begin may make.
func makeTable(in *storage.Folder, name string, begin func() error, fill func(*DB) error) (b Built, err error) {
	if err := removeTable(in, name); err != nil {
		return b, err
	}
	at := place{in, name}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a table: %w", err), removeTable(in, name))
		}
	}()
	if err := begin(); err != nil {
		return b, err
	}
	db, err := Open(in.Join(name), Options{In: in, NoSync: true, Create: true})
	if err != nil {
		return b, err
	}
	if err := fill(db); err != nil {
		return b, errors.Join(err, db.Close())
	}
	err = db.View(func(tx *Tx) (err error) {
		b.Checkpoint, err = tx.checkpoint()
		for _, bucket := range copyBuckets {
			b.Rows += int64(tx.tx.Bucket(bucket).Stats().KeyN)
		}
		return err
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return b, err
	}
	if err := in.Remove(name + VerifiedSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	f, err := in.Open(name, os.O_RDONLY)
	if err != nil {
		return b, err
	}
	if err := errors.Join(Sync(f), f.Close()); err != nil {
		return b, err
	}
	return b, checkPages(at)
}

// removeTable removes a table and its note, if they are there.
func removeTable(in *storage.Folder, name string) error {
	for _, n := range []string{name, name + VerifiedSuffix} {
		if err := in.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Intact returns an error that matches format.ErrCorrupt if the checksum of any value in the table does not verify. Open
// leaves such a value to its reader.
func (t *Tx) Intact() error {
	for _, name := range copyBuckets {
		b, err := t.bucket(name)
		if err != nil {
			return err
		}
		err = b.ForEach(func(k, v []byte) error {
			t.read(1)
			if !intact(v) && !isSum(name, k) {
				return t.damaged(format.ErrCorrupt, "the value of %q %x", name, k)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
