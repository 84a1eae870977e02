package owner

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// lostRanges are what volumes and snapshots have lost.
type lostRanges map[cow.Ref]*sparse.Ranges

func (l lostRanges) add(list []cow.Lost) {
	for _, x := range list {
		if l[x.Ref] == nil {
			l[x.Ref] = new(sparse.Ranges)
		}
		l[x.Ref].Add(x.Offset, x.Length)
	}
}

func (l lostRanges) equal(m lostRanges) bool {
	return maps.EqualFunc(l, m, func(a, b *sparse.Ranges) bool { return slices.Equal(*a, *b) })
}

// damageSpecimen is a store to be damaged, and what it holds.
type damageSpecimen struct {
	dir  string
	refs []cow.Ref
	want map[cow.Ref][]byte
}

// newDamageSpecimen makes a store whose records are shared, partly overwritten, moved, and compressed in all ways.
func newDamageSpecimen(t *testing.T) *damageSpecimen {
	t.Helper()
	x := &damageSpecimen{dir: filepath.Join(t.TempDir(), "store"), want: map[cow.Ref][]byte{}}
	s, err := OpenOrCreate(t.Context(), x.dir, Options{Command: "test"})
	must(t, err)
	o := s.(*Owner)
	ctx, rng := t.Context(), rand.New(rand.NewPCG(7, 7))
	ref := func(text string) cow.Ref { r, err := cow.ParseRef(text); must(t, err); return r }
	put := func(name string, size int64, n int) {
		d, err := o.store.OpenDevice(ref(name), false)
		must(t, err)
		for range n {
			// Data that compresses to half, in pieces from a sector to several units, and sometimes none.
			p := make([]byte, 512*(1+rng.IntN(200)))
			for i := range p {
				if p[i] = byte(rng.Uint32()); i%4096 > 2048 && rng.IntN(400) > 0 {
					p[i] = 0
				}
			}
			off := 512 * rng.Int64N((size-int64(len(p)))/512+1)
			if _, err = d.WriteAt(p, off); rng.IntN(20) == 0 {
				err = errors.Join(err, d.Discard(off, int64(len(p))))
			}
			must(t, err)
		}
		must(t, errors.Join(d.Flush(), d.Close()))
	}
	const size = 3<<20 - 512
	for name, codec := range map[string]format.Codec{"v": format.S2, "w": format.Raw} {
		_, err := s.CreateVolume(ctx, name, cow.VolumeOptions{Size: size, Codec: codec})
		must(t, err)
		put(name, size, 40)
		must(t, s.Snapshot(ctx, ref(name+"@a")))
		put(name, size, 20)
		must(t, s.Snapshot(ctx, ref(name+"@gone")))
		must(t, s.Clone(ctx, ref(name+"@gone"), name+"-clone"))
		put(name+"-clone", size, 10)
		put(name, size, 20)
		must(t, s.Snapshot(ctx, ref(name+"@b")))
		must(t, s.Remove(ctx, ref(name+"@gone"), false))
		put(name, size, 10)
	}
	_, err = s.Cold(ctx)
	must(t, err)
	_, err = s.Clean(ctx, 0)
	must(t, err)
	put("v", size, 5)
	x.refs = []cow.Ref{ref("v"), ref("v@a"), ref("v@b"), ref("v-clone"), ref("w"), ref("w@a"), ref("w@b"), ref("w-clone")}
	for _, r := range x.refs {
		d, err := o.store.OpenDevice(r, true)
		must(t, err)
		x.want[r] = make([]byte, d.Size())
		_, err = d.ReadAt(x.want[r], 0)
		must(t, errors.Join(err, d.Close()))
	}
	must(t, s.Close())
	return x
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// damaged returns a copy of the store in which one place of a chunk file is damaged: a bit, or now and then a sector.
func (x *damageSpecimen) damaged(t *testing.T, rng *rand.Rand) (dir, what string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "store")
	must(t, os.CopyFS(dir, os.DirFS(x.dir)))
	must(t, os.Chmod(dir, 0o700))
	files, err := os.ReadDir(filepath.Join(dir, "chunks"))
	must(t, err)
	total := int64(0)
	for _, f := range files {
		fi, err := f.Info()
		must(t, err)
		total += fi.Size()
	}
	at := rng.Int64N(total)
	for _, f := range files {
		path := filepath.Join(dir, "chunks", f.Name())
		p, err := os.ReadFile(path)
		must(t, err)
		if at >= int64(len(p)) {
			at -= int64(len(p))
			continue
		}
		if rng.IntN(8) == 0 {
			clear(p[at/512*512 : min(at/512*512+512, int64(len(p)))])
		} else {
			p[at] ^= 1 << rng.IntN(8)
		}
		must(t, os.WriteFile(path, p, 0o600))
		return dir, f.Name() + " at " + strconv.FormatInt(at, 10)
	}
	return dir, "nothing"
}

// found compares all content byte by byte, block after block, and returns what cannot be read.
func (x *damageSpecimen) found(t *testing.T, o *Owner) lostRanges {
	t.Helper()
	lost := lostRanges{}
	got := make([]byte, 4096)
	for _, r := range x.refs {
		d, err := o.store.OpenDevice(r, true)
		must(t, err)
		for off := int64(0); off < d.Size(); off += 4096 {
			p := got[:min(4096, d.Size()-off)]
			if _, err := d.ReadAt(p, off); errors.Is(err, cow.ErrCorrupt) {
				lost.add([]cow.Lost{{Ref: r, Offset: off, Length: int64(len(p))}})
			} else if err != nil || !bytes.Equal(p, x.want[r][off:][:len(p)]) {
				t.Errorf("%v has wrong data at %d: %v", r, off, err)
			}
		}
		must(t, d.Close())
	}
	return lost
}

// checked returns what a check names, and what is known after it, which must be the same.
func (x *damageSpecimen) checked(t *testing.T, o *Owner) lostRanges {
	t.Helper()
	lost := lostRanges{}
	_, err := o.Check(t.Context(), cow.CheckOptions{ReadData: true}, func(p cow.Problem) { lost.add(p.Lost) })
	must(t, err)
	if known := x.known(t, o); !known.equal(lost) {
		t.Errorf("after a check that named %v, known is %v", lost, known)
	}
	return lost
}

func (x *damageSpecimen) known(t *testing.T, o *Owner) lostRanges {
	t.Helper()
	lost := lostRanges{}
	k, err := o.Damage(t.Context())
	must(t, err)
	for _, d := range k.List {
		lost.add(d.Lost)
	}
	for _, r := range x.refs { // each by itself is the same
		one := lostRanges{}
		k, err := o.Damage(t.Context(), r)
		must(t, err)
		for _, d := range k.List {
			one.add(d.Lost)
		}
		if l := lost[r]; l == nil && len(one) > 0 || l != nil && !one.equal(lostRanges{r: l}) {
			t.Errorf("known of %v is %v, of all %v", r, one, lost)
		}
	}
	return lost
}

// salvaged returns what the salvage of each volume and snapshot lists. Where it lists nothing, the content must be right,
// and otherwise zeros.
func (x *damageSpecimen) salvaged(t *testing.T, s Store) lostRanges {
	t.Helper()
	lost := lostRanges{}
	for _, r := range x.refs {
		var out bytes.Buffer
		var list []cow.Lost
		err := s.Salvage(t.Context(), r, func(off, length int64) { list = append(list, cow.Lost{Ref: r, Offset: off, Length: length}) },
			func(src sparse.Source) error { return sparse.WriteTo(t.Context(), &out, src, nil) })
		must(t, err)
		lost.add(list)
		want := bytes.Clone(x.want[r])
		for _, l := range list {
			clear(want[l.Offset:][:l.Length])
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("the salvage of %v is wrong", r)
		}
	}
	return lost
}

// TestLostRanges: wherever chunk files are damaged, a check, a salvage and what is known name exactly the ranges that a
// comparison byte by byte finds. VDISK_DAMAGES is the number of places.
func TestLostRanges(t *testing.T) {
	x := newDamageSpecimen(t)
	n := 20
	if text := os.Getenv("VDISK_DAMAGES"); text != "" {
		var err error
		n, err = strconv.Atoi(text)
		must(t, err)
	}
	rng := rand.New(rand.NewPCG(uint64(n), 8))
	hit, refused := 0, 0
	for i := range n {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			dir, what := x.damaged(t, rng)
			open := func() *Owner {
				s, err := Open(t.Context(), dir, Options{Command: "test", Offer: true, Temporary: true, Look: true, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
				if errors.Is(err, cow.ErrCorrupt) {
					return nil
				}
				must(t, err)
				return s.(*Owner)
			}
			o := open()
			if o == nil {
				refused++
				return
			}
			want := x.found(t, o)
			if known := x.known(t, o); !known.equal(want) {
				t.Errorf("%s: a comparison finds %v, known is %v", what, want, known)
			}
			must(t, o.Close())
			o = open()
			if got := x.checked(t, o); !got.equal(want) {
				t.Errorf("%s: a comparison finds %v, a check %v", what, want, got)
			}
			must(t, o.Close())
			o = open()
			s, end := Store(o), func() error { return nil }
			if i%2 == 1 { // by another process
				c, err := Open(t.Context(), dir, Options{Command: "test"})
				must(t, err)
				s, end = c, c.Close
			}
			got := x.salvaged(t, s)
			must(t, end())
			if !got.equal(want) {
				t.Errorf("%s: a comparison finds %v, a salvage %v", what, want, got)
			}
			if known := x.known(t, o); !known.equal(want) {
				t.Errorf("%s: a comparison finds %v, known after a salvage is %v", what, want, known)
			}
			must(t, o.Close())
			if len(want) > 0 {
				hit++
			}
		})
	}
	t.Logf("%d places: %d took data, %d stores were refused", n, hit, refused)
	if hit < n/10 {
		t.Errorf("%d of %d places took data", hit, n)
	}
}
