package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// safeBuffer is a buffer that several goroutines write to.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// damaging is a store whose files are damaged while it is open.
type damaging struct {
	s   *Store
	dir string
	log safeBuffer
	d   *Device // of the volume v
}

// newDamaging makes a volume v of units of four blocks, v@a, and a clone c of that. v has written the second block of
// the first unit since.
func newDamaging(t *testing.T) *damaging {
	t.Helper()
	x := &damaging{}
	x.s, x.dir = newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.NewTextHandler(&x.log, nil))})
	_, err := x.s.CreateVolume("v", VolumeOptions{Size: 4<<20 - 512, Codec: format.S2})
	must(t, err)
	x.d, err = x.s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	for off := int64(0); off < 4<<20; off += 16 << 10 {
		_, err := x.d.WriteAt(halfRandom(uint64(off))[:min(16<<10, x.d.Size()-off)], off)
		must(t, err)
	}
	must(t, x.s.Snapshot(Ref{"v", "a"}))
	must(t, x.s.Clone(Ref{"v", "a"}, "c"))
	_, err = x.d.WriteAt(randomBytes(4096, 5), 4096)
	must(t, errors.Join(err, x.s.Checkpoint()))
	return x
}

// halfRandom returns a unit of four blocks that are compressed together.
func halfRandom(seed uint64) []byte {
	p := make([]byte, 16<<10)
	for i := range 4 {
		copy(p[i*4096:], randomBytes(2048, seed+uint64(i)+1))
	}
	return p
}

// entry returns the entry of a block of v.
func (x *damaging) entry(t *testing.T, block int) (e format.Entry) {
	t.Helper()
	must(t, x.s.cache.View(x.d.b.leaf(uint32(block/format.LeafBlocks), head), func(lf *leafcache.Leaf) { e = lf.Entry(block % format.LeafBlocks) }))
	return e
}

// rot damages the payload of the record that has a block of v.
func (x *damaging) rot(t *testing.T, block int) {
	t.Helper()
	e := x.entry(t, block)
	change(t, filepath.Join(x.dir, chunksDir, x.s.slots.get(e.Slot()).Name()), int64(e.Offset())+format.RecordHeaderSize+100, flip, 1)
	x.s.units = unitCache{}
}

// known returns the ranges of all damage that is known of refs.
func (x *damaging) known(t *testing.T, refs ...Ref) (lost []string) {
	t.Helper()
	list, complete, err := x.s.KnownDamage(t.Context(), refs...)
	must(t, err)
	if !complete {
		t.Error("the damage is not complete")
	}
	for _, d := range list {
		for _, l := range d.Lost {
			lost = append(lost, l.String())
		}
	}
	slices.Sort(lost)
	return lost
}

func (x *damaging) wants(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("lost are %q, not %q", got, want)
	}
}

// TestKnownDamage: damage that a read meets is known and logged with all that it takes, once, and goes with what it takes.
func TestKnownDamage(t *testing.T) {
	x := newDamaging(t)
	x.rot(t, 0)
	x.rot(t, 1020) // the last unit, which goes beyond the end of the volume
	x.wants(t, x.known(t))
	got := make([]byte, 16<<10)
	snap, err := x.s.OpenDevice(Ref{"v", "a"}, true)
	must(t, err)
	for range 3 {
		for _, off := range []int64{0, 1020 * 4096} {
			if _, err := snap.ReadAt(got, off); !errors.Is(err, ErrCorrupt) && err != io.EOF {
				t.Errorf("damage at %d reads: %v", off, err)
			}
		}
		x.wants(t, x.known(t), "c 0+16384", "c 4177920+15872", "v 0+4096", "v 4177920+15872", "v 8192+8192", "v@a 0+16384", "v@a 4177920+15872")
	}
	x.wants(t, x.known(t, Ref{"v", "a"}, Ref{Volume: "v"}), "v 0+4096", "v 4177920+15872", "v 8192+8192", "v@a 0+16384", "v@a 4177920+15872")
	if n := strings.Count(x.log.String(), "data is damaged"); n != 2 || !strings.Contains(x.log.String(), `lost="c 0+16384, v 0+4096, v 8192+8192, v@a 0+16384"`) {
		t.Errorf("%d lines of the log: %s", n, x.log.String())
	}

	_, err = x.d.WriteAt(got, 0)
	must(t, errors.Join(err, x.d.Discard(1020*4096, 15872), snap.Close(), x.s.Remove(Ref{Volume: "c"}, false)))
	x.wants(t, x.known(t), "v@a 0+16384", "v@a 4177920+15872")
	must(t, x.s.Remove(Ref{"v", "a"}, false))
	x.wants(t, x.known(t))
	if x.s.damage.some.Load() {
		t.Error("damage that nobody refers to is still known")
	}
	must(t, x.s.reclaimDeleted(t.Context()))
	mustEnd(t, x.s, x.d)
}

// TestDamageThatGoes: what reads is no damage, whether it is looked at by itself or by a check.
func TestDamageThatGoes(t *testing.T) {
	x := newDamaging(t)
	got := make([]byte, 4096)
	e := x.entry(t, 0)
	x.s.damage.note(badPlace{record: unitKey{x.s.slots.get(e.Slot()).Seq, e.WithIndex(0), 0}}, ErrCorrupt)
	x.wants(t, x.known(t))
	x.rot(t, 0)
	if _, err := x.d.ReadAt(got, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("damage reads: %v", err)
	}
	x.wants(t, x.known(t, Ref{Volume: "v"}), "v 0+4096", "v 8192+8192")
	x.rot(t, 0) // flips the same bit
	if _, err := x.s.Check(t.Context(), CheckOptions{ReadData: true}, func(Problem) {}); err != nil {
		t.Error(err)
	}
	x.wants(t, x.known(t))
	mustEnd(t, x.s, x.d)
}

// TestDamageIsNamed: a check, the cleaner, and a stream name what damage takes, wherever the record is by then.
func TestDamageIsNamed(t *testing.T) {
	all := []string{"c 0+16384", "v 0+4096", "v 8192+8192", "v@a 0+16384"}
	for name, meet := range map[string]func(t *testing.T, x *damaging){
		"check": func(t *testing.T, x *damaging) {
			x.wants(t, x.checked(t, 1), all...)
		},
		"cleaner": func(t *testing.T, x *damaging) { x.clean(t, x.entry(t, 0)) },
		"cleaner, header": func(t *testing.T, x *damaging) {
			e := x.entry(t, 0)
			change(t, filepath.Join(x.dir, chunksDir, x.s.slots.get(e.Slot()).Name()), int64(e.Offset())+9, flip, 1)
			x.clean(t, e)
		},
		"send": func(t *testing.T, x *damaging) {
			if _, err := x.s.Send(t.Context(), SendOptions{Snapshot: Ref{"v", "a"}}, io.Discard); !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := newDamaging(t)
			x.rot(t, 0)
			meet(t, x)
			x.wants(t, x.known(t), all...)
			must(t, errors.Join(x.d.Close(), x.s.Close()))
		})
	}
	t.Run("moved", func(t *testing.T) {
		x := newDamaging(t)
		e := x.entry(t, 0)
		x.clean(t, e)
		to, ok, err := x.s.forwards.lookup(e)
		if err != nil || !ok {
			t.Fatalf("it was not moved: %v", err)
		}
		must(t, x.s.wal.Sync())
		change(t, filepath.Join(x.dir, chunksDir, x.s.slots.get(to.To.Slot()).Name()), int64(to.To.Offset())+format.RecordHeaderSize+100, flip, 1)
		if _, err := x.d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, ErrCorrupt) {
			t.Errorf("damage reads: %v", err)
		}
		x.wants(t, x.known(t), all...)
		must(t, errors.Join(x.d.Close(), x.s.Close()))
	})
}

// TestDamagedCopyOfAWhole: damage to a copy takes nothing while the original can be read.
func TestDamagedCopyOfAWhole(t *testing.T) {
	x := newDamaging(t)
	e := x.entry(t, 0)
	x.rot(t, 40) // the cleaner comes no further, so the chunk stays
	x.clean(t, e)
	to, ok, err := x.s.forwards.lookup(e)
	if err != nil || !ok || x.s.slots.get(e.Slot()).gone {
		t.Fatalf("it was not moved, or its chunk is gone: %v", err)
	}
	must(t, x.s.wal.Sync())
	change(t, filepath.Join(x.dir, chunksDir, x.s.slots.get(to.To.Slot()).Name()), int64(to.To.Offset())+format.RecordHeaderSize+100, flip, 1)
	other := []string{"c 163840+16384", "v 163840+16384", "v@a 163840+16384"}
	x.wants(t, x.checked(t, 2), other...)
	if _, err := x.d.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("the original is not read: %v", err)
	}
	x.rot(t, 0)
	x.wants(t, x.checked(t, 2), append([]string{"c 0+16384", "c 163840+16384", "v 0+4096", "v 163840+16384", "v 8192+8192", "v@a 0+16384"}, other[2])...)
	must(t, errors.Join(x.d.Close(), x.s.Close()))
}

// checked returns what a check names, of so many problems.
func (x *damaging) checked(t *testing.T, corrupt int) (lost []string) {
	t.Helper()
	rep, err := x.s.Check(t.Context(), CheckOptions{ReadData: true}, func(p Problem) {
		for _, l := range p.Lost {
			lost = append(lost, l.String())
		}
	})
	must(t, err)
	if rep.Corrupt != corrupt {
		t.Errorf("%+v, not %d corrupt", rep, corrupt)
	}
	slices.Sort(lost)
	return lost
}

// clean cleans the chunk of an entry.
func (x *damaging) clean(t *testing.T, e format.Entry) {
	t.Helper()
	c := x.s.slots.get(e.Slot())
	c.Acquire()
	x.s.cleaner.mu.Lock()
	_, err := x.s.cleanChunk(t.Context(), c, nil)
	x.s.cleaner.mu.Unlock()
	c.Release()
	must(t, errors.Join(err, x.s.Checkpoint(), x.s.Checkpoint()))
}

// TestDamagedLeafIsNamed: a version of a leaf that does not decode takes 1 MiB from those that see it, and nothing from
// others.
func TestDamagedLeafIsNamed(t *testing.T) {
	x := newDamaging(t)
	v := metadata.Version{Branch: x.d.b.ID, Leaf: 0, Epoch: 1}
	must(t, x.s.meta.Update(func(tx *metadata.Tx) error { return tx.PutLeaf(v, []byte("rotten")) }))
	var lost []string
	_, err := x.s.Check(t.Context(), CheckOptions{}, func(p Problem) {
		for _, l := range p.Lost {
			lost = append(lost, l.String())
		}
	})
	must(t, err)
	x.wants(t, lost, "c 0+1048576", "v@a 0+1048576")
	x.wants(t, x.known(t), "c 0+1048576", "v@a 0+1048576")
	if want := fmt.Sprintf("where=%q", fmt.Sprintf("branch %d leaf 0 epoch 1", v.Branch)); !strings.Contains(x.log.String(), want) {
		t.Errorf("no %s in the log: %s", want, x.log.String())
	}
	must(t, errors.Join(x.d.Close(), x.s.Close()))
}

// TestDamageIsBounded: a whole chunk that is missing floods neither the log nor the memory.
func TestDamageIsBounded(t *testing.T) {
	x := newDamaging(t)
	must(t, errors.Join(x.d.Close(), x.s.Close()))
	files := mustReadDir(t, filepath.Join(x.dir, chunksDir))
	for _, e := range files[:len(files)-1] {
		must(t, os.Truncate(filepath.Join(x.dir, chunksDir, e.Name()), 4096))
	}
	x.s = open(t, x.dir, Options{checkpointInterval: -1, Logger: slog.New(slog.NewTextHandler(&x.log, nil))})
	problems := 0
	_, err := x.s.Check(t.Context(), CheckOptions{ReadData: true}, func(p Problem) {
		if len(p.Lost) > 0 {
			problems++
		}
	})
	must(t, err)
	list, _, err := x.s.KnownDamage(t.Context())
	must(t, err)
	lines := strings.Count(x.log.String(), "data is damaged")
	if problems < 100 || len(list) != problems || lines == 0 || lines > problems/2 || !strings.Contains(x.log.String(), "more is damaged") {
		t.Errorf("%d problems, %d known, %d lines", problems, len(list), lines)
	}
	for i := range uint64(mostDamage + 10) {
		x.s.damage.note(badPlace{record: unitKey{chunk: 1, first: i}}, ErrCorrupt)
	}
	x.s.damage.mu.Lock()
	n := len(x.s.damage.met) + len(x.s.damage.known)
	x.s.damage.mu.Unlock()
	if n > mostDamage {
		t.Errorf("%d places are remembered", n)
	}
	must(t, x.s.Close())
}

func mustReadDir(t *testing.T, path string) []os.DirEntry {
	t.Helper()
	list, err := os.ReadDir(path)
	must(t, err)
	return list
}
