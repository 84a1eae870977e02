package cow

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
)

// limitedStore returns a store of at most 64 MiB, with a volume of four times that size.
func limitedStore(t *testing.T) (*Store, *Device) {
	t.Helper()
	s, _ := newStore(t, Options{MaxBytes: 64 << 20, chunkBytes: 2 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 256 << 20})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	return s, d
}

// fullStore returns a limitedStore whose volume was written in order, in requests of the given number of bytes, until
// there was no room, and how many blocks are mapped.
func fullStore(t *testing.T, request int64) (s *Store, d *Device, blocks int64) {
	t.Helper()
	s, d = limitedStore(t)
	return s, d, fillStore(t, d, request)
}

func fillStore(t *testing.T, d *Device, request int64) (blocks int64) {
	t.Helper()
	p := make([]byte, request)
	r := rand.New(rand.NewPCG(1, 1))
	for at := int64(0); ; at += request {
		noise(p, r)
		n, err := d.WriteAt(p, at)
		if errors.Is(err, ErrNoSpace) {
			return (at + int64(n)) / format.BlockSize
		}
		must(t, err)
	}
}

// TestFullStoreTakesWhatZerosKept: a range that was zeroed, with noHole set, can still be written when the store is
// full.
func TestFullStoreTakesWhatZerosKept(t *testing.T) {
	const at, size = 128 << 20, 8 << 20
	s, d := limitedStore(t)
	must(t, d.WriteZeroes(at, size, true))
	fillStore(t, d, 1<<20)
	p := make([]byte, format.BlockSize)
	r := rand.New(rand.NewPCG(2, 2))
	for range 2 {
		for off := int64(0); off < size; off += format.BlockSize {
			noise(p, r)
			if _, err := d.WriteAt(p, at+off); err != nil {
				t.Fatalf("at %d of what was kept: %v", off, err)
			}
		}
	}
	if _, err := d.WriteAt(make([]byte, 1), at+size); err != nil { // zeros where nothing is mapped take no space
		t.Error(err)
	}
	mustEnd(t, s, d)
}

// TestFullStoreTakesOverwrites: in a store that refuses new mappings, blocks that only the head has can be overwritten
// many times, and flushed, without an error.
func TestFullStoreTakesOverwrites(t *testing.T) {
	quarters := int64(8) // how many quarters of the store are overwritten
	if testing.Short() {
		quarters = 1
	}
	for name, request := range map[string]int64{"large": 1 << 20, "small": format.BlockSize} {
		t.Run(name, func(t *testing.T) {
			s, d, blocks := fullStore(t, request)
			if least := int64(50 << 8); blocks < least {
				t.Errorf("%d blocks fill a store of 64 MiB", blocks)
			}
			if err := s.Snapshot(Ref{"v", "s"}); name == "large" && !errors.Is(err, ErrNoSpace) {
				t.Errorf("a snapshot, with which all that is written over would be new: %v", err)
			}
			r := rand.New(rand.NewPCG(2, 2))
			p, model := make([]byte, format.BlockSize), map[int64]uint64{}
			var longest time.Duration
			for i := range uint64(quarters * blocks / 4) {
				b := r.Int64N(blocks)
				model[b] = i
				noise(p, rand.New(rand.NewPCG(i, 3)))
				start := time.Now()
				_, err := d.WriteAt(p, b*format.BlockSize)
				if i%1000 == 0 {
					err = errors.Join(err, d.Flush())
				}
				if err != nil {
					t.Fatalf("overwrite %d of %d mapped blocks: %v; %+v", i, blocks, err, s.Info())
				}
				longest = max(longest, time.Since(start))
			}
			t.Logf("the longest of %d overwrites took %v", quarters*blocks/4, longest.Round(time.Millisecond))
			if longest > 20*time.Second {
				t.Error("a write stood still")
			}
			got := make([]byte, format.BlockSize)
			for b, seed := range model {
				noise(p, rand.New(rand.NewPCG(seed, 3)))
				if _, err := d.ReadAt(got, b*format.BlockSize); err != nil || !bytes.Equal(got, p) {
					t.Fatalf("block %d: %v", b, err)
				}
			}
			if name == "large" { // small requests, such as a file system's journal sends, have some more room
				for i := range int64(128) {
					noise(p, r)
					_, err := d.WriteAt(p, 200<<20+i*format.BlockSize)
					must(t, err)
				}
			}
			must(t, d.Discard(0, 16<<20))
			large := make([]byte, 1<<20)
			noise(large, r)
			for at := int64(0); at < 12<<20; at += 1 << 20 {
				_, err := d.WriteAt(large, at)
				must(t, err)
			}
			mustEnd(t, s, d)
		})
	}
}

// TestFullStoreKeepsWhatSnapshotsHave: overwriting a block that a snapshot has too frees no space, so it counts as a
// new mapping and is refused. When the snapshot is removed, there is room.
func TestFullStoreKeepsWhatSnapshotsHave(t *testing.T) {
	s, d, blocks := fullStore(t, 1<<20)
	must(t, d.Discard(0, 8<<20))
	must(t, s.Snapshot(Ref{"v", "s"}))
	p := make([]byte, 1<<20)
	r := rand.New(rand.NewPCG(2, 2))
	write := func() (err error) {
		for at := int64(16 << 20); at < blocks*format.BlockSize-1<<20 && err == nil; at += 1 << 20 {
			noise(p, r)
			_, err = d.WriteAt(p, at)
		}
		return err
	}
	if err := write(); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("all of what a snapshot has was written over: %v", err)
	}
	must(t, s.Remove(Ref{"v", "s"}, false))
	must(t, write())
	mustEnd(t, s, d)
}

// TestReserve checks that new data leaves the reserve of the options, and that names and overwrites may take it.
func TestReserve(t *testing.T) {
	const reserve = 8 << 20
	_, _, all := fullStore(t, 1<<20)
	s, _ := newStore(t, Options{MaxBytes: 64 << 20, chunkBytes: 2 << 20, Reserve: reserve})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 256 << 20})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	left := fillStore(t, d, 1<<20)
	if saved := (all - left) * format.BlockSize; saved < reserve*9/10 || saved > reserve*11/10 {
		t.Errorf("new data leaves %d bytes more, with a reserve of %d", saved, reserve)
	}
	if f, err := s.Fill(); err != nil || f.Percent() < 97 {
		t.Errorf("a store that takes no new data is filled to %d %%, %v", f.Percent(), err)
	}
	for at := int64(0); at < 16<<20; at += 1 << 20 {
		_, err := d.WriteAt(randomBytes(1<<20, uint64(at)), at)
		must(t, err)
	}
	must(t, s.Snapshot(Ref{"v", "s"}))
	must(t, s.Clone(Ref{"v", "s"}, "c"))
	if _, err := d.WriteAt(randomBytes(1<<20, 1), 0); !errors.Is(err, ErrNoSpace) {
		t.Errorf("data that a snapshot has is written over: %v", err)
	}
	must(t, s.Remove(Ref{Volume: "c"}, false))
	must(t, s.Remove(Ref{"v", "s"}, false))
	must(t, s.reclaimDeleted(t.Context()))
	_, err = d.WriteAt(randomBytes(1<<20, 1), 0)
	must(t, err)
}
