package cow

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// shared is a store with a volume v, its snapshot v@a and the clone c, and what each has.
type shared struct {
	damaging
	refs []Ref
	want map[Ref][]byte
}

// newShared makes units of four blocks that all three have, and unit 0, of whose blocks v has written the second since.
func newShared(t *testing.T, o VolumeOptions) *shared {
	t.Helper()
	x := &shared{refs: []Ref{{Volume: "v"}, {"v", "a"}, {Volume: "c"}}, want: map[Ref][]byte{}}
	o.Size = 1 << 20
	x.s, x.dir = newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	_, err := x.s.CreateVolume("v", o)
	must(t, err)
	x.d, err = x.s.OpenDevice(x.refs[0], false)
	must(t, err)
	for off := int64(0); off < o.Size; off += 16 << 10 {
		_, err := x.d.WriteAt(halfRandom(uint64(off)), off)
		must(t, err)
	}
	must(t, errors.Join(x.s.Snapshot(x.refs[1]), x.s.Clone(x.refs[1], "c")))
	_, err = x.d.WriteAt(randomBytes(4096, 5), 4096)
	must(t, errors.Join(err, x.s.Checkpoint()))
	for _, r := range x.refs {
		x.want[r], err = contentOfRef(t, x.s, r)
		must(t, err)
	}
	return x
}

// repairs repairs v from its own content, and returns what was mended and what is still damaged of others.
func (x *shared) repairs(t *testing.T) (mended, others []string) {
	t.Helper()
	rep, err := x.s.Repair(t.Context(), "v", &imageSource{p: x.want[x.refs[0]]})
	must(t, err)
	for _, l := range rep.Mended {
		mended = append(mended, l.String())
	}
	for _, l := range rep.Others {
		others = append(others, l.String())
	}
	return mended, others
}

// holds checks that all have what they had, in this owner and in the next one.
func (x *shared) holds(t *testing.T, refs ...Ref) {
	t.Helper()
	for range 2 {
		x.s.units = unitCache{}
		for _, r := range refs {
			if got, err := contentOfRef(t, x.s, r); err != nil || !bytes.Equal(got, x.want[r]) {
				t.Errorf("%v has other content: %v", r, err)
			}
		}
		x.again(t, Options{})
	}
}

// TestHeal: if the image is proved to have what was lost, all that share the record have it again, however it was
// compressed.
func TestHeal(t *testing.T) {
	t.Parallel()
	for _, o := range []VolumeOptions{{Codec: format.Raw}, {Codec: format.S2}, {Codec: format.Zstd}, {Codec: format.Zstd, Level: 1}, {Codec: format.Zstd, Level: 8}, {Codec: format.Zstd, Level: 19}} {
		t.Run(fmt.Sprint(o.Codec, o.Level), func(t *testing.T) {
			x := newShared(t, o)
			x.rot(t, 8)
			x.rot(t, 200)
			mended, others := x.repairs(t)
			size := x.entry(t, 8).Blocks() * format.BlockSize // a raw volume has blocks
			all := []string{}
			for _, r := range []string{"c", "v@a"} {
				for _, off := range []int{8 * format.BlockSize, 200 * format.BlockSize} {
					all = append(all, fmt.Sprintf("%s %d+%d", r, off, size))
				}
			}
			if !slices.Equal(mended, all) || len(others) > 0 {
				t.Errorf("mended are %q, and still damaged %q", mended, others)
			}
			if r := checkData(t, x.s); r.Corrupt+r.Leaks > 0 {
				t.Errorf("%+v", r)
			}
			x.wants(t, x.known(t))
			x.holds(t, x.refs...)
			must(t, x.s.Close())
		})
	}
}

// TestHealsNothingUnproved: what the image is not proved to have is given to the volume only. Here the volume has changed
// since, and the image has a wrong block.
func TestHealsNothingUnproved(t *testing.T) {
	t.Parallel()
	x := newShared(t, VolumeOptions{Codec: format.S2})
	x.rot(t, 0)
	x.rot(t, 8)
	x.want[x.refs[0]][9*4096]++
	mended, others := x.repairs(t)
	if want := []string{"c 0+16384", "c 32768+16384", "v@a 0+16384", "v@a 32768+16384"}; len(mended) > 0 || !slices.Equal(others, want) {
		t.Errorf("mended are %q, and still damaged %q", mended, others)
	}
	for _, r := range x.refs[1:] {
		if _, err := contentOfRef(t, x.s, r); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%v reads: %v", r, err)
		}
	}
	x.holds(t, x.refs[0])
	must(t, x.s.Close())
}

// TestHealMoved: a record is healed where the cleaner has moved it, also if dead blocks were left out there.
func TestHealMoved(t *testing.T) {
	t.Parallel()
	x := newShared(t, VolumeOptions{Codec: format.S2})
	must(t, errors.Join(x.s.Remove(x.refs[2], false), x.s.reclaimDeleted(t.Context())))
	_, err := x.d.WriteAt(halfRandom(7)[:4096], 17*4096)
	must(t, errors.Join(err, x.s.Snapshot(Ref{"v", "b"}), x.s.Remove(x.refs[1], false), x.s.reclaimDeleted(t.Context())))
	x.refs = []Ref{{Volume: "v"}, {"v", "b"}}
	x.want[x.refs[1]], err = contentOfRef(t, x.s, x.refs[0])
	must(t, err)
	x.want[x.refs[0]] = x.want[x.refs[1]]
	x.again(t, Options{}) // the log goes on in another chunk
	x.d, err = x.s.OpenDevice(x.refs[0], false)
	must(t, err)
	x.clean(t, x.entry(t, 8)) // and 16
	for _, block := range []int{8, 16} {
		to, ok, err := x.s.forwards.lookup(x.entry(t, block))
		if err != nil || !ok {
			t.Fatalf("block %d was not moved: %v", block, err)
		}
		must(t, x.s.wal.Sync())
		c := x.s.slots.get(to.To.Slot())
		flipByte(t, x.dir+"/"+chunksDir+"/"+c.Name(), int64(to.To.Offset())+format.RecordHeaderSize+200)
	}
	x.s.units = unitCache{}
	mended, others := x.repairs(t)
	if want := []string{"v@b 32768+16384", "v@b 65536+4096", "v@b 73728+8192"}; !slices.Equal(mended, want) || len(others) > 0 {
		t.Errorf("mended are %q, and still damaged %q", mended, others)
	}
	if r := checkData(t, x.s); r.Corrupt+r.Leaks > 0 {
		t.Errorf("%+v", r)
	}
	x.holds(t, x.refs...)
	must(t, x.s.Close())
}

// TestHealUnreadable: a record that the disk cannot read is healed if its header can be read.
func TestHealUnreadable(t *testing.T) {
	t.Parallel()
	s, h, _ := scrubbed(t, Options{})
	v, a := Ref{Volume: "v"}, Ref{"v", "a"}
	want, err := contentOfRef(t, s, a)
	must(t, err)
	now, err := contentOfRef(t, s, v)
	must(t, err)
	d, err := s.OpenDevice(a, true)
	must(t, err)
	e := entryAt(t, s, d, 2)
	must(t, d.Close())
	name := s.slots.get(e.Slot()).Name()
	h.badAt = func(file string, off int64, n int) error {
		at := int64(e.Offset()) + 1000
		if file == name && off <= at && at < off+int64(n) {
			return syscall.EIO
		}
		return nil
	}
	if _, err := contentOfRef(t, s, a); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	rep, err := s.Repair(t.Context(), "v", &imageSource{p: now})
	if err != nil || !isBlocksOf(a, rep.Mended, []int64{2}) || len(rep.Others) > 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if got, err := contentOfRef(t, s, a); err != nil || !bytes.Equal(got, want) {
		t.Error("the snapshot reads otherwise:", err)
	}
	must(t, s.Close())
}
