package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/testwatch"
)

func open(t testing.TB, path string) *DB {
	t.Helper()
	db, err := Open(path, Options{NoSync: true, Create: true})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// memoryDir returns a directory in memory, if there is one.
func memoryDir(t testing.TB) string {
	dir, err := os.MkdirTemp(testwatch.Memory(), "vdisk-metadata-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// leafOf makes a leaf that differs from those of other versions.
func leafOf(n uint32) *format.Leaf {
	var l format.Leaf
	for i := range int(n%format.LeafBlocks) + 1 {
		l.Entries[i] = format.MakeEntry(n%1000, uint32(4096+64*i), 64, 1, 0)
		l.SetChanged(i)
	}
	return &l
}

// TestVersionsAsAMap compares the leaves with a plain map, over commits, aborts and reopening: which version is the
// newest, which leaves there are, and which changed when.
func TestVersionsAsAMap(t *testing.T) {
	dir := memoryDir(t)
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		path := filepath.Join(dir, fmt.Sprint(n))
		db, err := Open(path, Options{NoSync: true, Create: true})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { db.Close(); os.Remove(path) }()
		model := map[Version]uint32{}
		small := rapid.Uint32Range(1, 5)
		draw := func() Version {
			return Version{small.Draw(t, "branch"), small.Draw(t, "leaf"), small.Draw(t, "epoch")}
		}
		for range rapid.IntRange(1, 12).Draw(t, "commits") {
			next := maps.Clone(model)
			abort := rapid.IntRange(0, 5).Draw(t, "abort") == 0
			errAbort := errors.New("abort")
			err := db.Update(func(tx *Tx) error {
				for range rapid.IntRange(0, 12).Draw(t, "changes") {
					v := draw()
					if rapid.Bool().Draw(t, "drop") {
						delete(next, v)
						if err := tx.DropLeaf(v); err != nil {
							return err
						}
						continue
					}
					next[v] = rapid.Uint32().Draw(t, "content")
					if err := tx.PutLeaf(v, format.AppendLeaf(nil, leafOf(next[v]))); err != nil {
						return err
					}
				}
				if abort {
					return errAbort
				}
				return nil
			})
			if abort != errors.Is(err, errAbort) || !abort && err != nil {
				t.Fatal(err)
			}
			if !abort {
				model = next
			}
			if rapid.IntRange(0, 3).Draw(t, "reopen") == 0 {
				if err := db.Close(); err != nil {
					t.Fatal(err)
				}
				if db, err = Open(path, Options{NoSync: true}); err != nil {
					t.Fatal(err)
				}
			}
			if err := db.View(func(tx *Tx) error { return sameVersions(tx, model) }); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func sameVersions(tx *Tx, model map[Version]uint32) error {
	var l format.Leaf
	for branch := uint32(0); branch <= 6; branch++ {
		for leaf := uint32(0); leaf <= 6; leaf++ {
			for epoch := uint32(0); epoch <= 6; epoch++ {
				got, err := tx.Leaf(Version{branch, leaf, epoch}, &l)
				want := epoch
				for ; want > 0; want-- {
					if _, ok := model[Version{branch, leaf, want}]; ok {
						break
					}
				}
				if err != nil || got != want || want > 0 && l != *leafOf(model[Version{branch, leaf, want}]) {
					return fmt.Errorf("branch %d leaf %d as of %d: epoch %d, want %d, %v", branch, leaf, epoch, got, want, err)
				}
			}
			next, ok, err := tx.NextLeaf(branch, leaf)
			want := uint32(99)
			for v := range model {
				if v.Branch == branch && v.Leaf >= leaf {
					want = min(want, v.Leaf)
				}
			}
			if err != nil || ok != (want != 99) || ok && next != want {
				return fmt.Errorf("branch %d: the next leaf after %d is %d, %t, want %d, %v", branch, leaf, next, ok, want, err)
			}
		}
		var changes []Version
		if err := tx.Changes(Version{Branch: branch, Epoch: 2, Leaf: 2}, 4, func(v Version) bool { changes = append(changes, v); return true }); err != nil {
			return err
		}
		var want []Version
		for v := range model {
			if v.Branch == branch && v.Epoch <= 4 && (v.Epoch > 2 || v.Epoch == 2 && v.Leaf >= 2) {
				want = append(want, v)
			}
		}
		slices.SortFunc(want, func(a, b Version) int { return int(a.Epoch*10+a.Leaf) - int(b.Epoch*10+b.Leaf) })
		if !slices.Equal(changes, want) {
			return fmt.Errorf("branch %d: changes %v, want %v", branch, changes, want)
		}
		if err := sameHistory(tx, model, branch); err != nil {
			return err
		}
	}
	versions, changes, err := tx.Counts()
	if err != nil || versions != len(model) || changes != len(model) {
		return fmt.Errorf("%d versions, %d changes, want %d, %v", versions, changes, len(model), err)
	}
	return nil
}

func sameHistory(tx *Tx, model map[Version]uint32, branch uint32) error {
	var want, got []Version
	for v := range model {
		if v.Branch == branch {
			want = append(want, v)
		}
	}
	slices.SortFunc(want, func(a, b Version) int { return int(a.Leaf*10) - int(a.Epoch) - int(b.Leaf*10) + int(b.Epoch) })
	err := tx.History(branch, func(v Version, l *format.Leaf) error {
		if got = append(got, v); *l != *leafOf(model[v]) {
			return fmt.Errorf("%v has another content", v)
		}
		return nil
	})
	if err != nil || !slices.Equal(got, want) {
		return fmt.Errorf("branch %d: history %v, want %v, %w", branch, got, want, err)
	}
	return nil
}

// filled makes a table with rows of every kind and more leaves than a page holds, in a few commits.
func filled(t testing.TB, path string) *Tables {
	t.Helper()
	db := open(t, path)
	now := time.Unix(1e9, 0).UTC()
	tb := &Tables{
		Checkpoint: format.Checkpoint{Seq: 10, ChunkSeq: 3, Offset: 8192, NextID: 50, NextChunkSeq: 9},
		Cold:       format.ColdMark{ChunkSeq: 2, Offset: 4096},
	}
	for i := uint32(1); i <= 12; i++ {
		tb.Branches = append(tb.Branches, format.Branch{ID: i, Epoch: i + 1})
		tb.Volumes = append(tb.Volumes, format.Volume{ID: 20 + i, Name: fmt.Sprint("v", i), Size: 1 << 20, Codec: format.S2, LogicalBlock: 512, Branch: i, Created: now})
		tb.Snapshots = append(tb.Snapshots, format.Snapshot{ID: 40 + i, Volume: 20 + i, Name: "s", Branch: i, Epoch: i, Size: 1 << 20, Created: now})
		tb.Chunks = append(tb.Chunks, format.Chunk{Slot: i, Seq: uint64(i), End: 1 << 20, Live: i * 16})
	}
	for round := range uint32(4) {
		must(t, db.Update(func(tx *Tx) error {
			for i := range tb.Branches {
				must(t, errors.Join(tx.PutBranch(&tb.Branches[i]), tx.PutVolume(&tb.Volumes[i]), tx.PutSnapshot(&tb.Snapshots[i]), tx.PutChunk(&tb.Chunks[i])))
				for leaf := range uint32(10) {
					must(t, tx.PutLeaf(Version{uint32(i + 1), leaf, 1 + round%2}, format.AppendLeaf(nil, leafOf(leaf*7+round))))
				}
			}
			return errors.Join(tx.PutCold(&tb.Cold), tx.PutCheckpoint(&tb.Checkpoint))
		}))
	}
	must(t, db.Close())
	return tb
}

func TestTablesRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	want := filled(t, path)
	db := open(t, path)
	defer db.Close()
	var got *Tables
	must(t, db.View(func(tx *Tx) (err error) { got, err = tx.Load(); return err }))
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	must(t, db.Update(func(tx *Tx) error {
		return errors.Join(tx.DropVolume(21), tx.DropSnapshot(41), tx.DropBranch(1), tx.DropChunk(1), tx.DropChunk(999))
	}))
	must(t, db.View(func(tx *Tx) (err error) { got, err = tx.Load(); return err }))
	if len(got.Volumes) != 11 || len(got.Snapshots) != 11 || len(got.Branches) != 11 || len(got.Chunks) != 11 {
		t.Errorf("after dropping one of each: %d, %d, %d, %d", len(got.Volumes), len(got.Snapshots), len(got.Branches), len(got.Chunks))
	}
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t")
	db := open(t, path)
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Error(err)
	}
	must(t, db.Close())
	db, err := Open(path, Options{})
	must(t, err)
	must(t, db.Close())
}

// TestDamage flips bits, cuts the file, and copies pages over others. A table that still opens must hold exactly what
// it held. The rest is an error, and never a panic.
func TestDamage(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "t")
	filled(t, path)
	whole, err := os.ReadFile(path)
	must(t, err)
	want, err := dump(path)
	must(t, err)
	rng := rand.New(rand.NewPCG(1, 1))
	opened := 0
	for i := range damages {
		bad := bytes.Clone(whole)
		switch at := rng.IntN(len(bad)); {
		case i%8 == 0:
			bad = bad[:at]
		case i%8 == 1: // one page in the place of another
			n := len(bad) / 4096
			copy(bad[rng.IntN(n)*4096:][:4096], bad[rng.IntN(n)*4096:][:4096])
		case i%8 == 2:
			at = at / 4096 * 4096 // page headers and elements
			bad[at+rng.IntN(96)] ^= 1 << rng.IntN(8)
		default:
			bad[at] ^= 1 << rng.IntN(8)
		}
		p := filepath.Join(dir, "bad")
		must(t, os.WriteFile(p, bad, 0o600))
		got, err := dump(p)
		switch {
		case err == nil && got != want && !bytes.Equal(bad[:8192], whole[:8192]):
			// One of the meta pages is gone. The other names the state before.
		case err == nil && got != want:
			t.Errorf("damage %d: it opens and holds something else", i)
		case err == nil:
			opened++
		case !errors.Is(err, format.ErrCorrupt):
			t.Errorf("damage %d: %v", i, err)
		}
	}
	t.Logf("%d damages, %d tables as they were", damages, opened)
}

// dump returns everything that a table holds.
func dump(path string) (text string, err error) {
	db, err := Open(path, Options{NoSync: true})
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.View(func(tx *Tx) error {
		tb, err := tx.Load()
		if err != nil {
			return err
		}
		text = fmt.Sprintf("%+v", *tb)
		return tx.Versions(func(v Version, l *format.Leaf, bad error) error {
			text += fmt.Sprintf("%+v %x", v, l.Entries[:8])
			return bad
		})
	})
	return text, err
}

// FuzzCheckPages hands arbitrary files to the verification that comes before bbolt.
func FuzzCheckPages(f *testing.F) {
	path := filepath.Join(f.TempDir(), "t")
	filled(f, path)
	whole, err := os.ReadFile(path)
	must(f, err)
	f.Add(whole[:8192])
	f.Add(whole[:5*4096])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "t")
		must(t, os.WriteFile(path, p, 0o600))
		if db, err := Open(path, Options{NoSync: true}); err == nil {
			must(t, db.Close())
		}
	})
}

// TestMappingIsLargeEnough holds the mapping to be large enough for the table of 64 TiB of blocks written at random,
// with as much again for snapshots. A commit that has to make the mapping larger would wait for all readers. On systems
// with less address space the mapping is smaller.
func TestMappingIsLargeEnough(t *testing.T) {
	mapped := func() (size uint64) {
		path := filepath.Join(t.TempDir(), "t")
		db := open(t, path)
		defer db.Close()
		maps, err := os.ReadFile("/proc/self/maps")
		must(t, err)
		for line := range strings.Lines(string(maps)) {
			var from, to uint64
			if strings.HasSuffix(strings.TrimSpace(line), path) {
				_, err := fmt.Sscanf(line, "%x-%x", &from, &to)
				must(t, err)
				size += to - from
			}
		}
		return size
	}
	const leaves = 64 << 20
	if n := mapped(); n < 2*leaves*4096/2 {
		t.Errorf("%d bytes are mapped", n)
	}
	if raceEnabled { // the race detector takes address space itself
		return
	}
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_AS, &old))
	must(t, unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: 500 << 30, Max: old.Max}))
	n := mapped()
	must(t, unix.Setrlimit(unix.RLIMIT_AS, &old))
	if n != 64<<30 {
		t.Errorf("%d bytes are mapped where there is no room for more", n)
	}
}
