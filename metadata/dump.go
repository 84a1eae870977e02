package metadata

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// dumpVersion is the version of the text of a dump.
const dumpVersion = 1

// dumpLine is a line of a dump: the first, one for each row, or the last.
type dumpLine struct {
	Version int    `json:"vdisk_table,omitempty"` // in the first line
	Store   string `json:"store,omitempty"`

	Bucket string          `json:"bucket,omitempty"`
	Key    string          `json:"key,omitempty"` // in hex
	Row    json.RawMessage `json:"row,omitempty"` // of rows that are JSON, without their checksum
	Value  []byte          `json:"value,omitempty"`

	Rows *int64 `json:"rows,omitempty"` // in the last line
	Sum  string `json:"sum,omitempty"`  // of the table, in hex; without it the text was edited
}

// Dump writes the table as text, an object of JSON a line, from which FromDump makes the same table.
func (t *Tx) Dump(w io.Writer, store [16]byte) error {
	if err := t.loadSum(); err != nil {
		return err
	}
	b := bufio.NewWriterSize(w, 64<<10)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	if err := e.Encode(dumpLine{Version: dumpVersion, Store: hex.EncodeToString(store[:])}); err != nil {
		return err
	}
	var n int64
	for _, name := range copyBuckets {
		bucket, err := t.bucket(name)
		if err != nil {
			return err
		}
		err = bucket.ForEach(func(k, v []byte) error {
			t.read(1)
			if isSum(name, k) {
				return nil
			}
			if !intact(v) {
				return t.damaged(format.ErrCorrupt, "the value of %q %x", name, k)
			}
			n++
			l := dumpLine{Bucket: string(name), Key: hex.EncodeToString(k), Value: v}
			if len(v) > 4 && v[4] == '{' && json.Valid(v[4:]) {
				l.Row, l.Value = json.RawMessage(v[4:]), nil
			}
			return e.Encode(l)
		})
		if err != nil {
			return err
		}
	}
	if err := e.Encode(dumpLine{Rows: &n, Sum: fmt.Sprintf("%016x", uint64(t.sum))}); err != nil {
		return err
	}
	return b.Flush()
}

// FromDump makes a table called name in a folder from the text of a dump. The table is durable, but its name is not. An
// error about the text matches format.ErrCorrupt.
func FromDump(in *storage.Folder, name string, r io.Reader, store [16]byte) (Built, error) {
	return buildTable(in, name, func(db *DB) error {
		d := json.NewDecoder(r)
		d.DisallowUnknownFields()
		var first dumpLine
		if err := d.Decode(&first); err != nil || first.Version == 0 {
			return errors.Join(fmt.Errorf("it is no dump of a table: %w", format.ErrCorrupt), err)
		}
		if first.Version > dumpVersion {
			return fmt.Errorf("the dump has version %d: %w", first.Version, format.ErrVersion)
		}
		if want := hex.EncodeToString(store[:]); first.Store != want {
			return fmt.Errorf("the dump is of store %s, not %s: %w", first.Store, want, format.ErrCorrupt)
		}
		return db.fill(d)
	})
}

// fill puts the rows of a dump into an empty table.
func (d *DB) fill(lines *json.Decoder) error {
	var held []dumpLine // of one transaction, whose function may run more than once
	var rows int64
	for {
		var l dumpLine
		if err := lines.Decode(&l); err != nil {
			return fmt.Errorf("the dump ends, or is damaged, behind row %d: %w", rows, errors.Join(format.ErrCorrupt, err))
		}
		if l.Rows == nil {
			held = append(held, l)
			rows++
		}
		if len(held) == 4096 || l.Rows != nil {
			if err := d.Update(func(tx *Tx) error { return tx.putLines(held) }); err != nil {
				return err
			}
			held = held[:0]
		}
		if l.Rows == nil {
			continue
		}
		sum, err := d.sumNow()
		if err == nil && *l.Rows != rows {
			err = fmt.Errorf("the dump has %d rows, and says %d: %w", rows, *l.Rows, format.ErrCorrupt)
		}
		if got := fmt.Sprintf("%016x", uint64(sum)); err == nil && l.Sum != "" && l.Sum != got {
			err = fmt.Errorf("the rows of the dump sum up to %s, and it says %s; if it was edited, take \"sum\" out of its last line: %w", got, l.Sum, format.ErrCorrupt)
		}
		if _, more := lines.Token(); err == nil && !errors.Is(more, io.EOF) {
			err = fmt.Errorf("there is more behind the last line of the dump: %w", format.ErrCorrupt)
		}
		return err
	}
}

func (t *Tx) putLines(lines []dumpLine) error {
	for _, l := range lines {
		key, err := hex.DecodeString(l.Key)
		value := l.Value
		if l.Row != nil {
			value = append(le.AppendUint32(nil, format.Checksum(l.Row)), l.Row...)
		}
		if value == nil {
			value = []byte{}
		}
		if n := bucketNumber([]byte(l.Bucket)); err != nil || len(key) == 0 || int(n) >= len(copyBuckets) || !intact(value) || isSum([]byte(l.Bucket), key) {
			return fmt.Errorf("the dump's row %q %q: %w", l.Bucket, l.Key, format.ErrCorrupt)
		}
		if err := t.set([]byte(l.Bucket), key, value); err != nil {
			return err
		}
	}
	return nil
}
