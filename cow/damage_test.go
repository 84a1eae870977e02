package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/storage/crashtable"
)

// sound is an intact store, to be damaged: its files, and what it holds.
type sound struct {
	fs            *crashfs.FS
	table, format []byte
	m             *model
	root          string
}

// newSound makes a store that has everything: volumes, snapshots, clones, several chunks, and records behind the last
// checkpoint.
func newSound(t testing.TB) *sound {
	t.Helper()
	w := newModelStore(t)
	rng := rand.New(rand.NewPCG(11, 1))
	w.must(t, op{"create", 0, 0, 0}, op{"create", 0, 99, 2})
	for i := range 150 {
		o := randomOp(rng)
		switch {
		case o.kind == "misuse", o.kind == "remove", o.kind == "rollback":
			continue
		case i > 120 && (o.kind == "checkpoint" || o.kind == "check" || o.kind == "scrub" || o.kind == "reap"):
			continue
		}
		w.must(t, o)
	}
	for range 10 { // behind the last checkpoint, and in more than one chunk
		w.must(t, op{"write", rng.Uint32(), rng.Uint32(), 5*rng.Uint32N(1000) + 4})
	}
	w.must(t, op{kind: "flush"})
	img := w.now("sound", w.injector.fs.Clone())
	// Without these two, the damage below would miss much.
	if names := chunkFiles(t, img.fs); len(names) < 2 || w.seq() == img.m.base {
		t.Fatal("the store is too simple")
	}
	if err := w.kill(); err != nil {
		t.Fatal(err)
	}
	table, err := crashtable.Content(img.table.disk)
	if err != nil {
		t.Fatal(err)
	}
	return &sound{img.fs, table, w.harness.format, img.m, w.harness.root}
}

// holds opens a store with these files and reads everything in it. It accepts an error, and also the state after some
// record, if Open has said that it dropped something. It does not accept wrong data.
func (s *sound) holds(fs *crashfs.FS, table, formatText []byte, cut bool) (opened bool, problem error) {
	dir, err := os.MkdirTemp(s.root, "damaged")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	if err := errors.Join(os.WriteFile(filepath.Join(dir, formatFile), formatText, 0o600),
		os.WriteFile(filepath.Join(dir, tableFile), table, 0o600)); err != nil {
		return false, err
	}
	st, err := Open(dir, Options{fs: fs, checkpointInterval: -1, noTableSync: true, CacheBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return false, nil
	}
	defer func() {
		close(st.quit)
		st.wg.Wait()
		st.wal.Stop()
		problem = errors.Join(problem, st.release())
	}()
	st.mu.Lock()
	seq := st.wal.NextSeq()
	st.mu.Unlock()
	want, ok := s.m.at(seq)
	if !ok {
		return true, fmt.Errorf("it goes on with record %d", seq)
	}
	if seq < s.m.next() && st.Recovery().DroppedBytes == 0 && !cut { // a cut leaves no trace
		return true, fmt.Errorf("records from %d on are gone and Open does not say so: %+v", seq, st.Recovery())
	}
	wrong := s.compare(st, want)
	if wrong == nil {
		return true, nil
	}
	found := 0
	_, err = st.Check(context.Background(), CheckOptions{ReadData: true}, func(Problem) { found++ })
	return true, fmt.Errorf("%w (Check: %d problems, %v)", wrong, found, err)
}

// compare reads block by block, since all blocks but the damaged ones must be right.
func (s *sound) compare(st *Store, want state) error {
	var p [format.BlockSize]byte
	disk := func(r Ref, d disk) error {
		dev, err := st.OpenDevice(r, true)
		if err != nil {
			return err // a name that does not exist
		}
		defer dev.Close()
		if dev.Size() != d.size {
			return fmt.Errorf("%s has the size %d, not %d", r, dev.Size(), d.size)
		}
		for i, b := range d.blocks {
			part := p[:min(format.BlockSize, d.size-int64(i)*format.BlockSize)]
			if _, err := dev.ReadAt(part, int64(i)*format.BlockSize); err != nil {
				continue
			}
			if differ(part, []block{b}) >= 0 {
				return fmt.Errorf("%s: block %d is wrong", r, i)
			}
		}
		return nil
	}
	for name, v := range want {
		if err := disk(Ref{Volume: name}, v.disk); err != nil {
			return err
		}
		for sn, d := range v.snaps {
			if err := disk(Ref{name, sn}, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// damages returns ways to damage n bytes: bit flips, cuts, and stretches of zeros or of other content.
func damages(rng *rand.Rand, n, count int) (ds []func([]byte) []byte) {
	for i := range count {
		at, bit := rng.IntN(n), byte(1)<<rng.IntN(8)
		long := min(n-at, 1+rng.IntN(8192))
		switch {
		case i%8 < 6:
			ds = append(ds, func(b []byte) []byte { b[at] ^= bit; return b })
		case i%8 == 6:
			ds = append(ds, func(b []byte) []byte { return b[:at] })
		case i%16 == 7:
			ds = append(ds, func(b []byte) []byte { clear(b[at:][:long]); return b })
		default:
			ds = append(ds, func(b []byte) []byte { copy(b[at:][:long], b[n/2:]); return b })
		}
	}
	return ds
}

// damageCount returns n, or much less under the race detector, for which the place of the damage does not matter.
func damageCount(n int) int {
	if raceEnabled {
		return max(1, n/40)
	}
	return n
}

func TestDamagedChunks(t *testing.T) {
	t.Parallel()
	s := newSound(t)
	names := chunkFiles(t, s.fs)
	rng := rand.New(rand.NewPCG(1, 9))
	opened, total := 0, 0
	for _, name := range names {
		content := contentOf(t, s.fs, name)
		used := bytes.TrimRight(content, "\x00")
		ds := damages(rng, len(used), damageCount(100))
		for at := 0; at < 44; at += 44 / damageCount(44) { // each byte of the header
			ds = append(ds, func(b []byte) []byte { b[at] ^= 0x10; return b })
		}
		for i, damage := range ds {
			fs := s.fs.Clone()
			bad := damage(bytes.Clone(content))
			replace(t, fs, name, bad)
			ok, err := s.holds(fs, s.table, s.format, len(bad) < len(content))
			if err != nil {
				t.Errorf("%s, damage %d: %v", name, i, err)
			}
			if ok {
				opened++
			}
			total++
		}
		fs := s.fs.Clone()
		if err := fs.Remove(name); err != nil {
			t.Fatal(err)
		}
		if _, err := s.holds(fs, s.table, s.format, true); err != nil {
			t.Errorf("%s is missing: %v", name, err)
		}
	}
	t.Logf("%d damages, %d stores still opened", total, opened)
}

func contentOf(t testing.TB, fs storage.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, _ := f.Size()
	p := make([]byte, size)
	if _, err := wal.ReadFull(f, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func replace(t testing.TB, fs storage.FS, name string, p []byte) {
	t.Helper()
	f, err := fs.Open(name)
	if err == nil {
		_, err = f.WriteAt(p, 0)
		err = errors.Join(err, f.Truncate(int64(len(p))), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestDamagedFormatFile(t *testing.T) {
	t.Parallel()
	s := newSound(t)
	for at := range s.format {
		for bit := range damageCount(8) {
			text := bytes.Clone(s.format)
			text[at] ^= 1 << bit
			if _, err := s.holds(s.fs.Clone(), s.table, text, false); err != nil {
				t.Errorf("byte %d, bit %d: %v", at, bit, err)
			}
		}
		if _, err := s.holds(s.fs.Clone(), s.table, s.format[:at], false); err != nil {
			t.Errorf("cut at %d: %v", at, err)
		}
	}
}

func TestDamagedTable(t *testing.T) {
	t.Parallel()
	s := newSound(t)
	rng := rand.New(rand.NewPCG(1, 10))
	opened := 0
	ds := damages(rng, len(s.table), damageCount(1000))
	for i, damage := range ds {
		ok, err := s.holds(s.fs.Clone(), damage(bytes.Clone(s.table)), s.format, false)
		if err != nil {
			t.Errorf("damage %d: %v", i, err)
		}
		if ok {
			opened++
		}
	}
	t.Logf("%d damages, %d stores still opened", len(ds), opened)
}
