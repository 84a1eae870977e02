package cow

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"go.etcd.io/bbolt"
)

// forgetMark takes away the durable mark, as a power cut right after a flush may.
func forgetMark(t *testing.T, dir string) {
	t.Helper()
	must(t, os.Remove(filepath.Join(dir, wal.MarkName)))
}

// flushed is a store of one chunk whose owner was killed after all was flushed: three writes, a snapshot behind the
// second, and another behind the third.
type flushed struct {
	dir    string
	o      Options
	want   [3][]byte
	chunk  string   // path
	writes [3]int64 // places in the chunk
	snaps  [2]int64 // the same
}

func newFlushed(t *testing.T) *flushed {
	t.Helper()
	x := &flushed{o: Options{checkpointInterval: -1, chunkBytes: 4 << 20}}
	s, dir := newStore(t, x.o)
	x.dir = dir
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, errors.Join(err, s.Checkpoint()))
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	end := func() int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		x.chunk = filepath.Join(dir, chunksDir, s.wal.Current().Name())
		return int64(s.wal.Current().End)
	}
	for i := range x.want {
		x.writes[i], x.want[i] = end(), randomBytes(4096, uint64(i+1))
		_, err := d.WriteAt(x.want[i], int64(i)<<20)
		must(t, errors.Join(err, d.Flush()))
		if i > 0 {
			x.snaps[i-1] = end()
			must(t, s.Snapshot(Ref{"v", string(rune('a' + i))}))
		}
	}
	killStore(s)
	return x
}

// whole fails the test unless the store has everything.
func (x *flushed) whole(t *testing.T, s *Store) {
	t.Helper()
	for i, p := range x.want {
		if !holdsAt(t, s, "v", int64(i)<<20, p) {
			t.Errorf("write %d is gone", i)
		}
	}
	for _, name := range []string{"b", "c"} {
		if _, _, err := s.lookup(Ref{"v", name}); err != nil {
			t.Error(err)
		}
	}
}

// What was flushed last is known to have been durable, too: damage to it is not taken for a torn end. The mark that
// says so may be torn itself.
func TestDamageToWhatWasFlushedLast(t *testing.T) {
	tear := func(t *testing.T, x *flushed, newer bool) {
		path := filepath.Join(x.dir, wal.MarkName)
		p, err := os.ReadFile(path)
		must(t, err)
		a, aerr := format.DecodeDurableMark(p)
		b, berr := format.DecodeDurableMark(p[wal.MarkPlace:])
		must(t, errors.Join(aerr, berr))
		at := int64(0)
		if newer == (b.Seq > a.Seq) {
			at = wal.MarkPlace
		}
		change(t, path, at+33, flip, 1)
	}
	rot := func(at func(x *flushed) int64) func(*testing.T, *flushed) {
		return func(t *testing.T, x *flushed) { change(t, x.chunk, at(x), flip, 1) }
	}
	for name, c := range map[string]struct {
		damage func(*testing.T, *flushed)
		lost   uint64
	}{
		"payload of the last event":  {rot(func(x *flushed) int64 { return x.snaps[1] + 40 }), 1},
		"header of the last event":   {rot(func(x *flushed) int64 { return x.snaps[1] + 9 }), 1},
		"header of the last write":   {rot(func(x *flushed) int64 { return x.writes[2] + 9 }), 2},
		"payload of the first event": {rot(func(x *flushed) int64 { return x.snaps[0] + 40 }), 3},
		"end of the file":            {func(t *testing.T, x *flushed) { must(t, os.Truncate(x.chunk, x.snaps[1]+8)) }, 1},
		"the file":                   {func(t *testing.T, x *flushed) { must(t, os.Remove(x.chunk)) }, 5},
		"and the newer mark": {func(t *testing.T, x *flushed) {
			tear(t, x, true)
			change(t, x.chunk, x.snaps[0]+40, flip, 1)
		}, 2},
		"and the older mark": {func(t *testing.T, x *flushed) {
			tear(t, x, false)
			change(t, x.chunk, x.snaps[1]+40, flip, 1)
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := newFlushed(t)
			files := folder(t, x.dir)
			c.damage(t, x)
			was := folder(t, x.dir)
			for _, look := range []bool{true, false} {
				o := x.o
				o.Look = look
				_, err := Open(x.dir, o)
				var d *LogDamage
				if !errors.As(err, &d) || !errors.Is(err, ErrCorrupt) || d.Lost != c.lost {
					t.Fatalf("Open: %v", err)
				}
				unchanged(t, x.dir, was)
			}
			o := x.o
			o.Repair = func(*LogDamage) error { return nil }
			s := open(t, x.dir, o)
			killStore(s)
			s = open(t, x.dir, x.o) // the mark speaks of the log that there is now
			mustEnd(t, s)

			must(t, os.RemoveAll(x.dir))
			for name, text := range files {
				must(t, os.MkdirAll(filepath.Dir(filepath.Join(x.dir, name)), 0o700))
				must(t, os.WriteFile(filepath.Join(x.dir, name), []byte(text), 0o600))
			}
			s = open(t, x.dir, x.o)
			x.whole(t, s)
			mustEnd(t, s)
		})
	}
}

// A mark that says nothing is no reason to refuse a store, and is written anew: none, damage, another store's.
func TestMarkThatSaysNothing(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"none":  os.Remove,
		"empty": func(path string) error { return os.Truncate(path, 0) },
		"damaged": func(path string) error {
			return os.WriteFile(path, make([]byte, wal.MarkCount*wal.MarkPlace), 0o600)
		},
		"another store's": func(path string) error {
			p := make([]byte, wal.MarkCount*wal.MarkPlace)
			m := format.DurableMark{UUID: [16]byte{1}, Seq: math.MaxUint64}
			m.Encode(p)
			m.Encode(p[wal.MarkPlace:])
			return os.WriteFile(path, p, 0o600)
		},
		"a folder": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			x := newFlushed(t)
			path := filepath.Join(x.dir, wal.MarkName)
			must(t, spoil(path))
			s := open(t, x.dir, x.o)
			x.whole(t, s)
			if name == "a folder" {
				mustEnd(t, s)
				return
			}
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			_, err = d.WriteAt(x.want[0], 5<<20)
			must(t, errors.Join(err, d.Flush()))
			next := s.wal.NextSeq()
			killStore(s)
			p, err := os.ReadFile(path)
			must(t, err)
			a, aerr := format.DecodeDurableMark(p)
			b, berr := format.DecodeDurableMark(p[wal.MarkPlace:])
			if must(t, errors.Join(aerr, berr)); max(a.Seq, b.Seq) != next {
				t.Errorf("the marks are %+v and %+v, and the log is durable up to %d", a, b, next)
			}
			mustEnd(t, open(t, x.dir, x.o))
		})
	}
}

// badMark is a disk that does not take the mark.
type badMark struct {
	storage.FS
	off *bool
}

type badMarkFile struct {
	storage.File
	off *bool
}

func (b badMark) Create(name string, size int64) (storage.File, error) {
	f, err := b.FS.Create(name, size)
	if err == nil && name == wal.MarkName {
		f = badMarkFile{f, b.off}
	}
	return f, err
}

func (f badMarkFile) WriteAt(p []byte, off int64) (int, error) {
	if *f.off {
		return 0, syscall.EIO
	}
	return f.File.WriteAt(p, off)
}

// A mark that cannot be written costs a warning: the log goes on, and what the mark says stays true.
func TestMarkThatCannotBeWritten(t *testing.T) {
	for _, from := range []string{"the beginning", "later"} {
		dir := setup(t, 64<<20, format.Raw)
		fs, err := storage.OpenDir(filepath.Join(dir, chunksDir))
		must(t, err)
		off := from == "the beginning"
		var text strings.Builder
		s := open(t, dir, Options{fs: badMark{fs, &off}, checkpointInterval: -1, Logger: slog.New(slog.NewTextHandler(&text, nil))})
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		for i := range 4 {
			off = off || i == 2
			_, err = d.WriteAt(randomBytes(4096, 1), int64(i)<<20)
			must(t, errors.Join(err, d.Flush()))
		}
		killStore(s)
		if n := strings.Count(text.String(), "is not written down:"); n != 1 {
			t.Errorf("from %s: %d warnings:\n%s", from, n, &text)
		}
		mustEnd(t, open(t, dir, Options{fs: fs, checkpointInterval: -1}))
	}
}

// lockedMark is a disk on which the mark cannot be removed, or not be made.
type lockedMark struct {
	storage.FS
	remove, create error
}

func (l *lockedMark) Remove(name string) error {
	if name == wal.MarkName && l.remove != nil {
		return l.remove
	}
	return l.FS.Remove(name)
}

func (l *lockedMark) Create(name string, size int64) (storage.File, error) {
	if name == wal.MarkName && l.create != nil {
		return nil, l.create
	}
	return l.FS.Create(name, size)
}

// After a repair the mark speaks of records that are given up. Where it cannot be taken away the log does not go on, or
// a sound store would be refused later; where no other can be made, the store is sound without.
func TestRepairTakesTheMarkAway(t *testing.T) {
	for name, c := range map[string]struct {
		bad  lockedMark
		open bool
	}{
		"it cannot be removed": {lockedMark{remove: syscall.EIO}, false},
		"nor made anew":        {lockedMark{create: syscall.ENOSPC}, true},
	} {
		t.Run(name, func(t *testing.T) {
			x := newFlushed(t)
			must(t, os.Rename(filepath.Join(x.dir, wal.MarkName), filepath.Join(x.dir, chunksDir, wal.MarkName))) // where FS has it
			change(t, x.chunk, x.snaps[0]+40, flip, 1)
			disk, err := storage.OpenDir(filepath.Join(x.dir, chunksDir))
			must(t, err)
			c.bad.FS = disk
			o := x.o
			o.fs = &c.bad
			o.Repair = func(*LogDamage) error { return nil }
			s, err := Open(x.dir, o)
			if (err == nil) != c.open {
				t.Fatalf("Open: %v", err)
			}
			if !c.open {
				o.Repair = nil
				var d *LogDamage
				if _, err := Open(x.dir, o); !errors.As(err, &d) || !errors.Is(err, ErrDamagedLog) {
					t.Fatalf("then: %v", err)
				}
				c.bad.remove, o.Repair = nil, func(*LogDamage) error { return nil }
				s = open(t, x.dir, o)
			}
			o.Repair = nil
			for range 2 {
				d, err := s.OpenDevice(Ref{Volume: "v"}, false)
				must(t, err)
				_, err = d.WriteAt(x.want[0], 9<<20)
				must(t, errors.Join(err, d.Flush()))
				killStore(s)
				if s = open(t, x.dir, o); !holdsAt(t, s, "v", 9<<20, x.want[0]) {
					t.Error("what was flushed since is gone")
				}
			}
			mustEnd(t, s)
		})
	}
}

// A header that is damaged, of the log's last record, is not taken for nothing: a look leaves it there.
func TestLookKeepsTheLastRecord(t *testing.T) {
	for name, at := range map[string]int64{"checksum": 1, "number": 9, "block": 17, "branch": 25, "length": 29} {
		t.Run(name, func(t *testing.T) {
			x := newFlushed(t)
			forgetMark(t, x.dir)
			change(t, x.chunk, x.snaps[1]+at, flip, 1)
			was := folder(t, x.dir)
			o := x.o
			o.Look = true
			s := open(t, x.dir, o)
			if s.ReadOnly() == nil {
				t.Error("the look goes on as an owner that writes")
			}
			must(t, s.Close())
			unchanged(t, x.dir, was)
			change(t, x.chunk, x.snaps[1]+at, flip, 1)
			s = open(t, x.dir, x.o)
			x.whole(t, s)
			mustEnd(t, s)
		})
	}
}

// A look at the table of an older program finds nothing wrong with it, though it is not adopted.
func TestLookAtAnOlderTable(t *testing.T) {
	x := newFlushed(t)
	forgetMark(t, x.dir)
	change(t, x.chunk, x.snaps[1]+40, flip, 1)
	db, err := bbolt.Open(filepath.Join(x.dir, tableFile), 0o600, nil)
	must(t, err)
	must(t, errors.Join(db.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.DeleteBucket([]byte("forwards")), tx.DeleteBucket([]byte("forwarded")))
	}), db.Close()))
	o := x.o
	o.Look = true
	s := open(t, x.dir, o)
	mustCheck(t, s)
	must(t, s.Close())
	mustEnd(t, open(t, x.dir, x.o))
}

// Where the log ends before some of its records, a look leaves them as they are; the next change sets them aside.
func TestLookKeepsWhatIsDropped(t *testing.T) {
	x := newFlushed(t)
	forgetMark(t, x.dir)
	change(t, x.chunk, x.writes[2]+9, flip, 1)
	was := folder(t, x.dir)
	o := x.o
	o.Look = true
	for range 2 {
		s := open(t, x.dir, o)
		if !errors.Is(s.ReadOnly(), ErrReadOnly) || s.Recovery().DroppedBytes == 0 {
			t.Errorf("%v, %+v", s.ReadOnly(), s.Recovery())
		}
		if _, _, err := s.lookup(Ref{"v", "b"}); err != nil || !holdsAt(t, s, "v", 1<<20, x.want[1]) {
			t.Error("what lies before is not there", err)
		}
		if err := s.Snapshot(Ref{"v", "x"}); !errors.Is(err, ErrReadOnly) {
			t.Errorf("a snapshot: %v", err)
		}
		mustCheck(t, s)
		must(t, s.Close())
		unchanged(t, x.dir, was)
	}
	change(t, x.chunk, x.writes[2]+9, flip, 1)
	s := open(t, x.dir, o)
	x.whole(t, s)
	if s.ReadOnly() != nil {
		t.Error(s.ReadOnly())
	}
	mustEnd(t, s)
}
