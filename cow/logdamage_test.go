package cow

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// folder returns what is in a folder, by path. The lock says who looked last.
func folder(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || e.Name() == lockFile {
			return err
		}
		p, err := os.ReadFile(path)
		all[strings.TrimPrefix(path, dir+"/")] = string(p)
		return err
	}))
	return all
}

// unchanged compares a folder with what it was.
func unchanged(t *testing.T, dir string, was map[string]string) {
	t.Helper()
	now := folder(t, dir)
	for name := range was {
		if now[name] != was[name] {
			t.Errorf("%s has changed, or is gone", name)
		}
	}
	for name := range now {
		if _, there := was[name]; !there {
			t.Errorf("%s is new", name)
		}
	}
}

// badSector is a disk that does not give back what is at a place of a file.
type badSector struct {
	storage.FS
	name string
	at   int64
}

type badFile struct {
	storage.File
	at int64
}

func (b badSector) Open(name string) (storage.File, error) {
	f, err := b.FS.Open(name)
	if err == nil && name == b.name {
		f = badFile{f, b.at}
	}
	return f, err
}

func (f badFile) ReadAt(p []byte, off int64) (int, error) {
	if off <= f.at && f.at < off+int64(len(p)) {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(p, off)
}

// rotten is a store whose log goes on for many chunks behind its checkpoint, all of it flushed.
type rotten struct {
	dir   string
	o     Options
	want  [][]byte // by MiB
	chunk string   // where the volume's second snapshot is an event
	event int64    // its place
	later string   // a full chunk behind
}

func newRotten(t *testing.T) *rotten {
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20}
	s, dir := newStore(t, o)
	r := &rotten{dir: dir, o: o}
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
	must(t, errors.Join(err, s.Checkpoint()))
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	write := func() {
		p := randomBytes(1<<20, uint64(len(r.want)+1))
		_, err := d.WriteAt(p, int64(len(r.want))<<20)
		must(t, errors.Join(err, d.Flush()))
		r.want = append(r.want, p)
	}
	write()
	must(t, s.Snapshot(Ref{"v", "a"}))
	write()
	s.mu.Lock()
	r.chunk, r.event = s.wal.Current().Name(), int64(s.wal.Current().End)
	s.mu.Unlock()
	must(t, s.Snapshot(Ref{"v", "b"}))
	for range 6 {
		write()
		if len(r.want) == 5 {
			r.later = s.wal.Current().Name()
		}
	}
	s.wal.WaitIdle()
	killStore(s)
	return r
}

// has reports how many MiB and which snapshots a store has; the rest must be as it was before.
func (r *rotten) has(t *testing.T, s *Store) (mib int, a, b bool) {
	t.Helper()
	for i, want := range r.want {
		if holdsAt(t, s, "v", int64(i)<<20, want) {
			mib++
		}
	}
	_, _, err := s.lookup(Ref{"v", "a"})
	_, _, berr := s.lookup(Ref{"v", "b"})
	return mib, err == nil, berr == nil
}

// What had been durable is never removed, whatever of it does not verify, or cannot be read: Open refuses until it is
// told to go on without it. If all is well again, everything is there.
func TestDamagedLog(t *testing.T) {
	path := func(r *rotten, chunk string) string { return filepath.Join(r.dir, chunksDir, chunk) }
	flipAt := func(chunk func(*rotten) string, at func(*rotten) int64) func(*testing.T, *rotten) func() {
		return func(t *testing.T, r *rotten) func() {
			change(t, path(r, chunk(r)), at(r), flip, 1)
			return func() { change(t, path(r, chunk(r)), at(r), flip, 1) }
		}
	}
	event := func(r *rotten) string { return r.chunk }
	later := func(r *rotten) string { return r.later }
	put := func(change func(path string) error) func(*testing.T, *rotten) func() {
		return func(t *testing.T, r *rotten) func() {
			p, err := os.ReadFile(path(r, r.later))
			must(t, errors.Join(err, change(path(r, r.later))))
			return func() { must(t, os.WriteFile(path(r, r.later), p, 0o600)) }
		}
	}
	for name, c := range map[string]struct {
		damage func(*testing.T, *rotten) (undo func())
		mib    int // that are there after a repair
		b      bool
	}{
		"payload of an event": {flipAt(event, func(r *rotten) int64 { return r.event + 40 }), 2, false},
		"header of an event":  {flipAt(event, func(r *rotten) int64 { return r.event + 9 }), 2, false},
		"bad sector at an event": {func(t *testing.T, r *rotten) func() {
			fs, err := storage.OpenDir(filepath.Join(r.dir, chunksDir))
			must(t, err)
			r.o.fs = badSector{fs, r.chunk, r.event + 40}
			return func() { r.o.fs = nil }
		}, 2, false},
		"chunk header": {flipAt(later, func(*rotten) int64 { return 20 }), 4, true},
		"header of zeros": {func(t *testing.T, r *rotten) func() {
			p, err := os.ReadFile(path(r, r.later))
			must(t, err)
			change(t, path(r, r.later), 0, func(p []byte) { clear(p) }, format.ChunkHeaderSize)
			return func() { must(t, os.WriteFile(path(r, r.later), p, 0o600)) }
		}, 4, true},
		"missing file": {put(os.Remove), 4, true},
		"empty file":   {put(func(p string) error { return os.Truncate(p, 0) }), 4, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRotten(t)
			undo := c.damage(t, r)
			was := folder(t, r.dir)
			for range 2 {
				_, err := Open(r.dir, r.o)
				var d *LogDamage
				if !errors.As(err, &d) || !errors.Is(err, ErrCorrupt) {
					t.Fatalf("Open: %v", err)
				}
				unchanged(t, r.dir, was)
			}
			undo()
			s := open(t, r.dir, r.o)
			if n, a, b := r.has(t, s); n != len(r.want) || !a || !b {
				t.Fatalf("without the damage %d of %d MiB are there, snapshots %v %v", n, len(r.want), a, b)
			}
			killStore(s)

			c.damage(t, r)
			no := errors.New("no")
			r.o.Repair = func(*LogDamage) error { return no }
			if _, err := Open(r.dir, r.o); !errors.Is(err, no) {
				t.Fatalf("Open: %v", err)
			}
			files := func() (total int) {
				for name := range folder(t, r.dir) {
					if strings.HasPrefix(name, chunksDir) {
						total++
					}
				}
				return total
			}
			before := files()
			r.o.Repair = func(*LogDamage) error { return nil }
			s = open(t, r.dir, r.o)
			if n, a, b := r.has(t, s); n < c.mib || n == len(r.want) || !a || b != c.b {
				t.Errorf("after the repair %d MiB are there, snapshots %v %v", n, a, b)
			}
			if aside, err := os.ReadDir(filepath.Join(r.dir, chunksDir+".aside")); err != nil || len(aside) == 0 {
				t.Errorf("set aside: %v, %v", aside, err)
			}
			if n := files(); n < before-1 { // but for one that was made in advance
				t.Errorf("of %d chunk files %d are left", before, n)
			}
			want := bytes.Repeat([]byte{7}, 4096)
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			_, err = d.WriteAt(want, 60<<20)
			must(t, errors.Join(err, d.Flush()))
			killStore(s)
			r.o.Repair = nil
			s = open(t, r.dir, r.o)
			if n, a, b := r.has(t, s); n < c.mib || !a || b != c.b || !holdsAt(t, s, "v", 60<<20, want) {
				t.Errorf("then %d MiB are there, snapshots %v %v", n, a, b)
			}
			mustEnd(t, s)
		})
	}
}
