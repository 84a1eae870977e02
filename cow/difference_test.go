package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// family is a store with volumes that come from one another.
type family struct {
	t      *testing.T
	s      *Store
	dir    string
	writes uint64
}

func newFamily(t *testing.T) *family {
	s, dir := newStore(t, Options{checkpointInterval: -1})
	t.Cleanup(func() { _ = s.Close() }) // it writes down what is damaged, also after the test
	return &family{t: t, s: s, dir: dir}
}

func ref(t *testing.T, text string) Ref {
	r, err := ParseRef(text)
	must(t, err)
	return r
}

func (f *family) create(name string, size int64) {
	_, err := f.s.CreateVolume(name, VolumeOptions{Size: size})
	must(f.t, err)
}

// write writes a block at the beginning of each of some leaves.
func (f *family) write(name string, leaves ...int64) {
	d, err := f.s.OpenDevice(Ref{Volume: name}, false)
	must(f.t, err)
	defer d.Close()
	for _, leaf := range leaves {
		f.writes++
		_, err := d.WriteAt(randomBytes(format.BlockSize, f.writes), leaf*leafSize)
		must(f.t, err)
	}
}

func (f *family) discard(name string, leaf int64) {
	d, err := f.s.OpenDevice(Ref{Volume: name}, false)
	must(f.t, err)
	defer d.Close()
	must(f.t, d.Discard(leaf*leafSize, leafSize))
}

func (f *family) snapshot(text string)     { must(f.t, f.s.Snapshot(ref(f.t, text))) }
func (f *family) clone(text, name string)  { must(f.t, f.s.Clone(ref(f.t, text), name)) }
func (f *family) rollback(text string)     { must(f.t, f.s.Rollback(ref(f.t, text))) }
func (f *family) open(text string) *Device { return openRef(f.t, f.s, text) }

func openRef(t *testing.T, s *Store, text string) *Device {
	d, err := s.OpenDevice(ref(t, text), true)
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// extents are the extents of a difference as text, in leaves, each followed by z if it is a hole.
func extents(t *testing.T, x *Difference) string {
	var out []string
	must(t, x.Extents(context.Background(), 0, x.Size(), func(off, length int64, zero bool) bool {
		e := fmt.Sprint(float64(off)/leafSize, "+", length/format.BlockSize)
		if zero {
			e += "z"
		}
		out = append(out, e)
		return true
	}))
	return strings.Join(out, " ")
}

// TestDifference holds differences to be what changed, found by looking at nothing but the leaves that changed.
func TestDifference(t *testing.T) {
	f := newFamily(t)
	every := make([]int64, 2000)
	for i := range every {
		every[i] = int64(i)
	}
	f.create("v", 2000*leafSize)
	f.write("v", every...)
	f.snapshot("v@a")
	f.write("v", 7)
	f.snapshot("v@b")
	f.write("v", 7, 1999)
	f.discard("v", 30)
	f.clone("v@b", "sister")
	f.clone("v@a", "c0")
	for i := range int64(20) { // a clone of a clone of ...
		f.write(fmt.Sprint("c", i), 100+i)
		f.snapshot(fmt.Sprintf("c%d@s", i))
		f.clone(fmt.Sprintf("c%d@s", i), fmt.Sprint("c", i+1))
	}
	f.write("sister", 8)
	f.create("other", 10*leafSize)
	f.write("other", 3)
	f.create("back", 4*leafSize)
	f.write("back", 0)
	f.snapshot("back@a")
	f.write("back", 1)
	f.snapshot("back@b")
	f.rollback("back@a")
	f.write("back", 2)

	for _, c := range []struct {
		from, to string
		want     string
		leaves   int
	}{
		{"v@a", "v@a", "", 0},
		{"v@a", "v@b", "7+1", 1},
		{"v@b", "v@a", "7+1", 1},
		{"v@a", "v", "7+1 30+1z 1999+1", 3},
		{"v@b", "v", "7+1 30+1z 1999+1", 3},
		{"v", "v@b", "7+1 30+1 1999+1", 3},
		{"v@a", "sister", "7+1 8+1", 2},
		{"sister", "v", "7+1 8+1 30+1z 1999+1", 4},
		{"v@a", "c20", "100+1 101+1 102+1 103+1 104+1 105+1 106+1 107+1 108+1 109+1 110+1 111+1 112+1 113+1 114+1 115+1 116+1 117+1 118+1 119+1", 20},
		{"c18@s", "c20", "119+1", 1},
		{"c20", "c17@s", "118+1 119+1", 2},
		{"c1@s", "sister", "7+1 8+1 100+1 101+1", 4},
		{"back@b", "back", "1+1z 2+1", 2},
		{"back", "back@b", "1+1 2+1z", 2},
		{"back@a", "back", "2+1", 1},
		{"v", "v", "", 0},
		{"back", "other", "0+1z 2+1z 3+1", 4}, // without an ancestor, each leaf of either is looked at
		{"", "other", "3+1", 1},
		{"", "back@b", "0+1 1+1", 2},
	} {
		var from *Device
		if c.from != "" {
			from = f.open(c.from)
		}
		x, err := f.s.Difference(t.Context(), from, f.open(c.to))
		must(t, err)
		if got := extents(t, x); got != c.want {
			t.Errorf("from %s to %s: %q, not %q", c.from, c.to, got, c.want)
		}
		loads := 2 * c.leaves
		if from == nil {
			loads = c.leaves
		}
		if n := x.loaded.Load(); n != int64(loads) {
			t.Errorf("from %s to %s: %d leaves were loaded, not %d", c.from, c.to, n, loads)
		}
	}
}

// TestDifferenceOfSizes compares states of different sizes.
func TestDifferenceOfSizes(t *testing.T) {
	f := newFamily(t)
	f.create("v", 2*leafSize+512)
	f.write("v", 0, 1)
	f.snapshot("v@small")
	must(t, f.s.Resize("v", 5*leafSize+512, false))
	f.write("v", 1, 4)
	f.snapshot("v@large")
	d, err := f.s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	_, err = d.WriteAt(randomBytes(512, 9), 5*leafSize) // the end lies within a block
	must(t, errors.Join(err, d.Close()))
	f.snapshot("v@end")
	for _, c := range []struct {
		from, to, want string
		size           int64
	}{
		{"v@small", "v@large", "1+1 4+1", 5*leafSize + 512},
		{"v@large", "v@small", "1+1", 2*leafSize + 512},
		{"v@small", "v@end", "1+1 4+1 5+0", 5*leafSize + 512},
	} {
		x, err := f.s.Difference(t.Context(), f.open(c.from), f.open(c.to))
		must(t, err)
		if got := extents(t, x); got != c.want || x.Size() != c.size {
			t.Errorf("from %s to %s: %q of %d, not %q", c.from, c.to, got, x.Size(), c.want)
		}
	}
	x, err := f.s.Difference(t.Context(), f.open("v@small"), f.open("v@end"))
	must(t, err)
	var got []int64
	look := func(off, length int64, _ bool) bool {
		got = append(got, off, length)
		return len(got) < 4
	}
	must(t, x.Extents(t.Context(), leafSize+100, 4*leafSize, look)) // within blocks, and no more than two
	if !slices.Equal(got, []int64{leafSize + 100, format.BlockSize - 100, 4 * leafSize, format.BlockSize}) {
		t.Error(got)
	}
	if err := x.Extents(t.Context(), 1, x.Size(), look); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	other := newFamily(t)
	other.create("v", leafSize)
	if _, err := f.s.Difference(t.Context(), other.open("v"), f.open("v")); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.Extents(ctx, 0, x.Size(), look); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestDifferenceWithoutCheckpoint takes a difference where the table cannot be brought up to date: of a store that can
// only be read, and whose log has more than its table.
func TestDifferenceWithoutCheckpoint(t *testing.T) {
	f := newFamily(t)
	f.create("v", 100*leafSize)
	f.write("v", 1, 2)
	f.snapshot("v@a")
	must(t, f.s.Checkpoint())
	f.write("v", 2)
	f.snapshot("v@b")
	f.write("v", 3, 99)
	f.clone("v@b", "w")
	f.write("w", 4)
	must(t, f.s.wal.Sync())
	dir := filepath.Join(t.TempDir(), "copy")
	must(t, os.CopyFS(dir, os.DirFS(f.dir)))
	s := open(t, dir, Options{AllowReadOnly: true, unwritable: ErrReadOnly})
	for _, c := range [][3]string{{"v@a", "v", "2+1 3+1 99+1"}, {"v@a", "v@b", "2+1"}, {"w", "v@a", "2+1 4+1z"}, {"w", "v", "3+1 4+1z 99+1"}} {
		x, err := s.Difference(t.Context(), openRef(t, s, c[0]), openRef(t, s, c[1]))
		must(t, err)
		if got := extents(t, x); got != c[2] {
			t.Errorf("from %s to %s: %q, not %q", c[0], c[1], got, c[2])
		}
	}
}

// TestDifferenceMeetsDamage damages the only leaf that a difference has to look at, and one of the others.
func TestDifferenceMeetsDamage(t *testing.T) {
	f := newFamily(t)
	f.create("v", 100*leafSize)
	f.write("v", 1, 2, 3, 4)
	f.snapshot("v@a")
	f.write("v", 2, 3)
	f.snapshot("v@b")
	must(t, f.s.Checkpoint())
	damage := func(v metadata.Version) {
		must(t, f.s.meta.Update(func(tx *metadata.Tx) error { return tx.PutLeaf(v, bytes.Repeat([]byte{7}, 60)) }))
	}
	branch := f.open("v@a").b.ID
	look := func(from, to string) (got []int64, err error) {
		x, err := f.s.Difference(t.Context(), f.open(from), f.open(to))
		must(t, err)
		err = x.Extents(t.Context(), 0, x.Size(), func(off, length int64, _ bool) bool {
			got = append(got, off/leafSize, length)
			return true
		})
		return got, err
	}
	damage(metadata.Version{Branch: branch, Leaf: 4, Epoch: 1})
	if got, err := look("v@a", "v@b"); err != nil || !slices.Equal(got, []int64{2, format.BlockSize, 3, format.BlockSize}) {
		t.Error("a leaf that is not looked at is damaged:", got, err)
	}
	damage(metadata.Version{Branch: branch, Leaf: 3, Epoch: 2})
	got, err := look("v@a", "v@b")
	if !errors.Is(err, ErrCorrupt) || !slices.Equal(got, []int64{2, format.BlockSize}) || !strings.Contains(fmt.Sprint(err), "v@a to v@b, bytes 3145728 to 4194304") {
		t.Error(got, err)
	}
}

func TestLeafSet(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, limit := range []uint32{1, 63, 64, 65, 1000} {
		set, want := newLeafSet(limit), map[uint32]bool{}
		for range limit / 3 {
			i := rng.Uint32N(limit)
			set.add(i)
			want[i] = true
		}
		for from := range limit {
			i, ok := set.next(from)
			w := from
			for w < limit && !want[w] {
				w++
			}
			if ok != (w < limit) || ok && i != w {
				t.Fatal(limit, from, i, ok, w)
			}
		}
		if set.count() != len(want) {
			t.Error(set.count(), len(want))
		}
	}
}

// TestBehindAncestor finds the last common ancestor of points of a tree.
func TestBehindAncestor(t *testing.T) {
	root := &branch{Branch: format.Branch{ID: 1}}
	left := &branch{Branch: format.Branch{ID: 2, OriginEpoch: 3}, origin: root}
	right := &branch{Branch: format.Branch{ID: 3, OriginEpoch: 5}, origin: root}
	leaf := &branch{Branch: format.Branch{ID: 4, OriginEpoch: 1}, origin: left}
	other := &branch{Branch: format.Branch{ID: 5}}
	for _, c := range []struct {
		a, b   point
		want   string
		common bool
	}{
		{point{root, 2}, point{root, 2}, "", true},
		{point{root, 2}, point{root, 4}, "1:2-4 ", true},
		{point{root, 4}, point{root, 2}, "1:2-4 ", true},
		{point{root, 2}, point{root, leafcache.Head}, "1:2-4294967295 ", true},
		{point{leaf, 7}, point{root, 1}, "1:1-3 2:0-1 4:0-7 ", true},
		{point{leaf, 7}, point{right, 2}, "1:3-5 2:0-1 3:0-2 4:0-7 ", true},
		{point{left, 9}, point{leaf, 1}, "2:1-9 4:0-1 ", true},
		{point{leaf, 7}, point{other, 2}, "1:0-3 2:0-1 4:0-7 5:0-2 ", false},
	} {
		spans, common := behindAncestor(c.a, c.b)
		slices.SortFunc(spans, func(a, b span) int { return int(a.b.ID) - int(b.b.ID) })
		got := ""
		for _, sp := range spans {
			got += fmt.Sprintf("%d:%d-%d ", sp.b.ID, sp.after, sp.upTo)
		}
		if got != c.want || common != c.common {
			t.Errorf("%q %v, not %q %v", got, common, c.want, c.common)
		}
	}
}
