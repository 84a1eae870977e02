package cow

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
)

// loseTable damages the table that a crash left, and makes it anew from the copy. The store must then be what the crash
// left. The table is left as it was if there is no copy: before the first opening, and after a full disk.
func (w *modelStore) loseTable(o Options, rng *rand.Rand) error {
	path := filepath.Join(w.dir, tableFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	bad, what := damagedTable(whole, rng)
	if bad == nil {
		err = os.Remove(path)
	} else {
		err = os.WriteFile(path, bad, 0o600)
	}
	if err != nil {
		return err
	}
	w.harness.damaged.Add(1)
	r, err := RebuildTable(w.dir, false, o)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		w.harness.copyless.Add(1)
		return os.WriteFile(path, whole, 0o600)
	case errors.Is(err, ErrSound): // what was damaged is not in use
		return os.WriteFile(path, whole, 0o600)
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	}
	w.harness.rebuilt.Add(1)
	if r.Aside != "" {
		err = os.Remove(filepath.Join(w.dir, r.Aside))
	}
	content, rerr := os.ReadFile(path)
	if err = errors.Join(err, rerr); err != nil {
		return err
	}
	image := tableOf(content)
	w.injector.mu.Lock()
	defer w.injector.mu.Unlock()
	w.injector.table, w.injector.failed = image.disk, false
	return nil
}

// damagedTable returns a table with damage, or nil for none at all.
func damagedTable(whole []byte, rng *rand.Rand) (bad []byte, what string) {
	at := rng.IntN(len(whole))
	switch rng.IntN(5) {
	case 0:
		return nil, "the table is gone"
	case 1:
		return []byte{}, "the table is empty"
	case 2:
		return append(bad, whole[:at]...), fmt.Sprintf("the table is cut at %d", at)
	case 3:
		bad = append(bad, whole...)
		clear(bad[at/4096*4096:][:4096])
		return bad, fmt.Sprintf("the table has zeros for page %d", at/4096)
	default:
		bad = append(bad, whole...)
		bad[at] ^= 1 << rng.IntN(8)
		return bad, fmt.Sprintf("byte %d of the table is damaged", at)
	}
}

var rebuildPlaces = flag.Int("rebuild.places", 5, "places at which TestLostTable cuts the table, and ten times as many bytes that it changes")

// TestLostTable cuts the table of a store, and changes bytes of it, at -rebuild.places places. The store was cleaned,
// and its chunks recycled, so the log alone says little. Each time the store is refused, or serves what it served
// before; then the table is made anew, and the store serves the same.
func TestLostTable(t *testing.T) {
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	hardLife(t, dir)
	want := servedBy(t, dir)
	path := filepath.Join(dir, tableFile)
	whole, err := os.ReadFile(path)
	must(t, err)
	rng := rand.New(rand.NewPCG(7, 7))
	refused, n := 0, *rebuildPlaces
	for i := range 11 * n {
		bad := append([]byte{}, whole...)
		what := fmt.Sprintf("cut at %d", len(whole)*i/n)
		if i < n {
			bad = bad[:len(whole)*i/n]
		} else {
			at := rng.IntN(len(bad))
			bad[at] ^= byte(1 + rng.IntN(255))
			what = fmt.Sprintf("byte %d", at)
		}
		must(t, os.WriteFile(path, bad, 0o600))
		r, err := RebuildTable(dir, false, Options{})
		if errors.Is(err, ErrSound) {
			if i >= n && i%5 == 0 && servedBy(t, dir) != want {
				t.Fatalf("%s: the table is said to be sound, and the store serves something else", what)
			}
			continue
		}
		must(t, err)
		refused++
		if i%4 == 0 {
			must(t, os.WriteFile(path, bad, 0o600))
			if got, err := serves(t, dir); err == nil && got != want || err != nil && !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%s: the store serves something else: %v", what, err)
			}
			r, err = RebuildTable(dir, false, Options{})
			must(t, err)
		}
		if got := servedBy(t, dir); got != want || r.Why == "" {
			t.Fatalf("%s: the store serves something else with a new table", what)
		}
		whole, err = os.ReadFile(path)
		must(t, err)
		asides, err := filepath.Glob(filepath.Join(dir, asideTable+"*"))
		must(t, err)
		for _, a := range asides {
			must(t, os.Remove(a))
		}
	}
	if refused < n {
		t.Errorf("%d tables were found damaged", refused)
	}
	t.Logf("%d of %d tables were found damaged and made anew", refused, 11*n)
}

// TestTableThatLacksAPart damages the names of the table's parts. If the part is empty, the table is one that an older
// program could have made, but not for this store. It can be made anew.
func TestTableThatLacksAPart(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 1 << 20})
	must(t, errors.Join(err, s.Close()))
	want := servedBy(t, dir)
	path := filepath.Join(dir, tableFile)
	for _, part := range []string{"volumes", "snapshots", "branches", "leaves", "changes", "chunks", "forwarded", "forwards"} {
		whole, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, bytes.ReplaceAll(whole, []byte(part), append([]byte(part[:len(part)-1]), '~')), 0o600))
		if _, err := RebuildTable(dir, false, Options{}); err != nil && !errors.Is(err, ErrSound) {
			t.Errorf("%s: %v", part, err)
		}
		if got := servedBy(t, dir); got != want {
			t.Errorf("%s: the store serves something else with a new table", part)
		}
	}
}

// TestOldTableStays: the new name of the old table is durable before the new table takes its place.
func TestOldTableStays(t *testing.T) {
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	var seen []string // the files of tables at each sync of the folder
	own := syncFolder
	defer func() { syncFolder = own }()
	syncFolder = func(in *storage.Folder) error {
		var there []string
		for _, name := range []string{tableFile, asideTable + "1", newTableFile} {
			if _, err := in.Lstat(name); err == nil {
				there = append(there, name)
			}
		}
		seen = append(seen, strings.Join(there, " "))
		return own(in)
	}
	_, err := RebuildTable(dir, true, Options{})
	must(t, err)
	want := []string{"meta.db meta.db.aside-1 meta.db.new", "meta.db meta.db.aside-1"}
	if !slices.Equal(seen, want) {
		t.Errorf("at the syncs there are %q, not %q", seen, want)
	}
}

// TestTwoNamesOfATable: a process that was killed when the old table had two names is followed by one that goes on with them.
func TestTwoNamesOfATable(t *testing.T) {
	dir := filepath.Join(memoryDir(t), "store")
	must(t, Create(dir))
	must(t, os.Link(filepath.Join(dir, tableFile), filepath.Join(dir, asideTable+"1")))
	r, err := RebuildTable(dir, true, Options{})
	must(t, err)
	asides, err := filepath.Glob(filepath.Join(dir, asideTable+"*"))
	must(t, err)
	if r.Aside != asideTable+"1" || len(asides) != 1 {
		t.Errorf("the old table is %s, and there are %q", r.Aside, asides)
	}
	must(t, open(t, dir, Options{}).Close())
}

// hardLife makes a store that was written to, cleaned, passed over by the cold pass, and rid of volumes and snapshots.
func hardLife(t *testing.T, dir string) {
	s := open(t, dir, Options{chunkBytes: 1 << 20, checkpointInterval: -1, ColdAfter: -1})
	rng := rand.New(rand.NewPCG(3, 3))
	for round := range 6 {
		name := fmt.Sprint("v", round%4)
		if _, err := s.CreateVolume(name, VolumeOptions{Size: 8 << 20}); errors.Is(err, ErrExists) {
			must(t, s.Remove(Ref{Volume: name}, true))
			_, err = s.CreateVolume(name, VolumeOptions{Size: 8 << 20})
			must(t, err)
		}
		d, err := s.OpenDevice(Ref{Volume: name}, false)
		must(t, err)
		for i := range 600 {
			_, err := d.WriteAt(randomBytes(4096, rng.Uint64()), rng.Int64N(1024)*4096)
			must(t, err)
			if i == 300 {
				must(t, s.Snapshot(Ref{name, "s"}))
			}
		}
		must(t, d.Discard(rng.Int64N(4)<<20, 1<<20))
		must(t, d.Close())
		if round%3 == 1 {
			must(t, s.Remove(Ref{name, "s"}, false))
		}
		must(t, s.Checkpoint())
		_, err = s.Clean(t.Context(), 0.1)
		must(t, err)
		_, err = s.Cold(t.Context())
		must(t, err)
	}
	must(t, s.Close())
}

// servedBy returns a hash of all that a store serves.
func servedBy(t *testing.T, dir string) (sum [32]byte) {
	t.Helper()
	sum, err := serves(t, dir)
	must(t, err)
	return sum
}

// serves is servedBy for a store that may be damaged.
func serves(t *testing.T, dir string) (sum [32]byte, err error) {
	t.Helper()
	s, err := Open(dir, Options{checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return sum, err
	}
	h := sha256.New()
	p := make([]byte, 1<<20)
	for _, v := range s.Volumes() {
		refs := []Ref{{Volume: v.Name}}
		for _, sn := range v.Snapshots {
			refs = append(refs, Ref{v.Name, sn.Name})
		}
		for _, r := range refs {
			d, err := s.OpenDevice(r, true)
			must(t, err)
			fmt.Fprintln(h, r, d.Size())
			for off := int64(0); off < d.Size() && err == nil; off += int64(len(p)) {
				n := min(int64(len(p)), d.Size()-off)
				_, err = d.ReadAt(p[:n], off)
				h.Write(p[:n])
			}
			if must(t, d.Close()); err != nil {
				return sum, errors.Join(err, s.Close())
			}
		}
	}
	h.Sum(sum[:0])
	return sum, s.Close()
}

// writerFunc is a writer that is a function.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestDumpEnds: a dump of the table that is under way ends with its context, and with the store.
func TestDumpEnds(t *testing.T) {
	dir := setup(t, 1<<30, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for leaf := range int64(1024) { // so that the dump is written in more than one piece
		_, err := d.WriteAt(randomBytes(4096, 1), leaf<<20)
		must(t, err)
	}
	must(t, d.Close())
	pieces := 0
	must(t, s.DumpTable(t.Context(), writerFunc(func(p []byte) (int, error) { pieces++; return len(p), nil })))
	if pieces < 2 {
		t.Fatalf("the dump has %d pieces", pieces)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err = s.DumpTable(ctx, writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil }))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the context has ended, and the dump with %v", err)
	}
	closed := make(chan error, 1)
	err = s.DumpTable(t.Context(), writerFunc(func(p []byte) (int, error) {
		if s.live() == nil {
			go func() { closed <- s.Close() }()
			<-s.quit
		}
		return len(p), nil
	}))
	if !errors.Is(err, ErrClosed) {
		t.Errorf("the store is being closed, and the dump ends with %v", err)
	}
	must(t, <-closed)
}
