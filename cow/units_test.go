package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/internal/workload"
)

const unitBytes = hotUnit // of what one large write makes

// partStore is a store with a volume, and nothing that happens by itself.
func partStore(t *testing.T, codec format.Codec) (s *Store, d *Device, fs *crashfs.FS) {
	t.Helper()
	dir := t.TempDir()
	must(t, Create(dir))
	fs = crashfs.New()
	s = open(t, dir, Options{fs: fs, checkpointInterval: -1, noTableSync: true, chunkBytes: 512 << 10})
	t.Cleanup(func() { must(t, s.Close()) })
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: codec})
	must(t, err)
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return s, d, fs
}

// entryOf is where a block is. It reads nothing.
func entryOf(t *testing.T, d *Device, block int) (e format.Entry, c *chunk) {
	t.Helper()
	var pl ReadPlan
	must(t, d.PlanRead(&pl, make([]byte, format.BlockSize), int64(block)*format.BlockSize))
	if r := pl.records; len(r) > 0 {
		e, c = r[0].e, r[0].c
	}
	pl.release()
	return e, c
}

// wantParts reads p, which is at off, in parts of n bytes, and says which of them failed.
func wantParts(t *testing.T, d *Device, p []byte, off int64, n int) (failed []int, err error) {
	t.Helper()
	got := make([]byte, n)
	for at := 0; at < len(p); at += n {
		part := p[at:min(len(p), at+n)]
		if _, e := d.ReadAt(got[:len(part)], off+int64(at)); e != nil {
			failed, err = append(failed, at), e
		} else if !bytes.Equal(got[:len(part)], part) {
			t.Fatalf("reads of %d bytes: wrong at %d", n, off+int64(at))
		}
	}
	return failed, err
}

// TestPartsOfUnits reads units in parts of all kinds, and again after blocks were overwritten and moved.
func TestPartsOfUnits(t *testing.T) {
	for _, codec := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		s, d, _ := partStore(t, codec)
		r := rand.New(rand.NewPCG(1, uint64(codec)))
		want := make([]byte, 512<<10)
		workload.HalfCompressible(r, want)
		noise(want[128<<10:256<<10], r)
		_, err := d.WriteAt(want, 0)
		must(t, err)
		must(t, d.Flush())
		for round := range 4 {
			for _, n := range []int{1024, 4096, 7000, 100_000} {
				if _, err := wantParts(t, d, want, 0, n); err != nil {
					t.Fatal(codec, round, n, err)
				}
			}
			for range 100 {
				off := r.IntN(len(want) - 9000)
				p := want[off:][:1+r.IntN(9000)]
				workload.HalfCompressible(r, p)
				if _, err := d.ReadAt(make([]byte, 4096), int64(off)); err != nil { // now a unit of it is in memory
					t.Fatal(err)
				}
				_, err := d.WriteAt(p, int64(off))
				must(t, err)
				if _, err := wantParts(t, d, want[off:][:len(p)], int64(off), 1000); err != nil {
					t.Fatal(err)
				}
			}
			if round == 1 {
				must(t, s.Snapshot(Ref{"v", "s"}))
			}
			must(t, s.Checkpoint())
			for range 3 {
				_, err := s.cleanOne(t.Context(), worthwhile, all, nil)
				must(t, err)
			}
			must(t, s.Checkpoint())
		}
		mustCheck(t, s)
	}
}

// TestUnitOfAReusedSlot overwrites a unit until it comes to the same place in the same slot, in another chunk.
func TestUnitOfAReusedSlot(t *testing.T) {
	s, d, _ := partStore(t, format.S2)
	r := rand.New(rand.NewPCG(1, 1))
	want := make([]byte, unitBytes)
	write := func() (format.Entry, *chunk) {
		workload.HalfCompressible(r, want)
		_, err := d.WriteAt(want, 0)
		must(t, err)
		return entryOf(t, d, 0)
	}
	for range 100 { // into a chunk that has nothing else
		write()
	}
	was, in := write()
	if was.Blocks() == 1 {
		t.Fatal("it is no unit")
	}
	_, err := wantParts(t, d, want, 0, 4096) // now it is in memory
	must(t, err)
	for i := range 10_000 {
		if i%20 == 0 {
			must(t, s.Checkpoint())
		}
		if e, c := write(); e == was {
			_, err := wantParts(t, d, want, 0, 4096)
			must(t, err)
			if c.Seq <= in.Seq {
				t.Fatal("in the same chunk")
			}
			return
		}
	}
	t.Fatal("it never came to the same place")
}

// TestDamageBesideACachedUnit: what is in memory says nothing of what is not, and what does not verify does not get in.
func TestDamageBesideACachedUnit(t *testing.T) {
	for _, codec := range []format.Codec{format.Raw, format.S2, format.Zstd} {
		_, d, fs := partStore(t, codec)
		r := rand.New(rand.NewPCG(1, 1))
		want := make([]byte, 4*unitBytes)
		workload.HalfCompressible(r, want)
		_, err := d.WriteAt(want, 0)
		must(t, err)
		must(t, d.Flush())
		_, err = wantParts(t, d, want[unitBytes:][:4096], unitBytes, 4096) // now the second unit is in memory
		must(t, err)
		e, c := entryOf(t, d, unitBytes/format.BlockSize)
		content := contentOf(t, fs, c.Name())
		bad := bytes.Clone(content)
		for unit := range 4 {
			e, _ := entryOf(t, d, unit*unitBytes/format.BlockSize+3*(unit&1))
			bad[int(e.Offset())+e.Size()/2] ^= 1 << r.IntN(8)
		}
		replace(t, fs, c.Name(), bad)
		for range 2 {
			failed, err := wantParts(t, d, want, 0, unitBytes/2)
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(codec, err)
			}
			const half = unitBytes / 2
			wantFailed := []int{0, half, 4 * half, 5 * half, 6 * half, 7 * half}
			if e.Blocks() > 1 && !slices.Equal(failed, wantFailed) {
				t.Errorf("%v: parts at %v fail, want %v", codec, failed, wantFailed)
			}
		}
		replace(t, fs, c.Name(), content)
		if _, err := wantParts(t, d, want, 0, 4096); err != nil {
			t.Error(codec, err)
		}
	}
}

func TestUnitCache(t *testing.T) {
	var c unitCache
	key := func(i int) unitKey {
		return unitKey{1 + uint64(i)%7, format.MakeEntry(3, uint32(4096+i*1024), 1024, 4, 0), uint64(i) * 4}
	}
	got := make([]byte, 100)
	pieces := []piece{{dst: got[:60], from: 20, next: 1}, {dst: got[60:], from: 200, next: -1}}
	const n = 10 * unitShards * unitsPerShard
	var unit []byte
	for i := range n {
		if c.get(key(i), pieces, 0) {
			t.Fatal("unit", i, "is there already")
		}
		if unit == nil {
			unit = make([]byte, 16<<10)
		}
		for j := range unit {
			unit[j] = byte(i)
		}
		unit = c.put(key(i), unit)
		other := key(i)
		other.first++
		if !c.get(key(i), pieces, 0) || got[0] != byte(i) || got[99] != byte(i) || c.get(other, pieces, 0) {
			t.Fatal("unit", i)
		}
	}
	left, made := 0, 0
	for i := range n {
		if c.get(key(i), pieces, 0) {
			left++
			if got[0] != byte(i) {
				t.Fatal("unit", i, "is another's")
			}
		}
	}
	for i := range c.shards {
		for _, u := range c.shards[i].units {
			if u != nil {
				made++
			}
		}
	}
	if left != made || left < unitShards*unitsPerShard/2 {
		t.Errorf("%d units are there, of %d", left, made)
	}
}

// TestReadsDoNotAllocate is for reads of parts and wholes, once the cache of units is full.
func TestReadsDoNotAllocate(t *testing.T) {
	s, _ := newStore(t, Options{checkpointInterval: -1})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 8 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	p := make([]byte, 8<<20)
	r := rand.New(rand.NewPCG(1, 1))
	workload.HalfCompressible(r, p)
	_, err = d.WriteAt(p, 0)
	must(t, err)
	must(t, d.Flush())
	var pl ReadPlan
	read := func() {
		n := 4096 << r.IntN(6)
		if err := pl.read(d, p[:n], r.Int64N(int64(len(p)-n))/512*512); err != nil {
			t.Fatal(err)
		}
	}
	for range 20_000 {
		read()
	}
	if n := testing.AllocsPerRun(1000, read); n > 0 && !raceEnabled {
		t.Errorf("%v allocations", n)
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// TestPartsAmongWriters reads parts of units while those are overwritten, cleaned, and their chunks come and go: each
// block that is read is that block, whole, and not older than what was there before.
func TestPartsAmongWriters(t *testing.T) {
	b := newBusyStore(t)
	b.noise()
	d := b.devs["a"]
	const blocks = 256
	var written [blocks]atomic.Uint64 // versions that are there for certain
	set := func(p []byte, block int, version uint64) {
		r := rand.New(rand.NewPCG(version, uint64(block)))
		noise(p[:format.BlockSize/2*(1+block%2)], r) // every other one compresses
		binary.LittleEndian.PutUint64(p, uint64(block)<<40|version)
	}
	b.again(func(r *rand.Rand) error {
		if r.IntN(50) == 0 {
			_, err := b.s.cleanOne(t.Context(), worthwhile, all, nil)
			return err
		}
		first := r.IntN(blocks)
		n := 1 + r.IntN(min(12, blocks-first))
		p := make([]byte, n*format.BlockSize)
		version := written[first].Load() + 1
		for i := range n {
			version = max(version, written[first+i].Load()+1)
		}
		for i := range n {
			set(p[i*format.BlockSize:][:format.BlockSize], first+i, version)
		}
		_, err := d.WriteAt(p, int64(first)*format.BlockSize)
		for i := range n {
			written[first+i].Store(version)
		}
		return err
	})
	reads := 20_000
	if raceEnabled {
		reads = 2000
	}
	var wg sync.WaitGroup
	for reader := range uint64(3) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(reader, 5))
			got, want := make([]byte, 3*format.BlockSize), make([]byte, format.BlockSize)
			for range reads {
				first := r.IntN(blocks - 3)
				p := got[:(1+r.IntN(3))*format.BlockSize]
				var least [3]uint64
				for i := range least {
					least[i] = written[first+i].Load()
				}
				if _, err := d.ReadAt(p, int64(first)*format.BlockSize); err != nil {
					t.Error(err)
					return
				}
				for i := 0; i < len(p)/format.BlockSize; i++ {
					block := p[i*format.BlockSize:][:format.BlockSize]
					version := binary.LittleEndian.Uint64(block) & (1<<40 - 1)
					clear(want)
					if version > 0 {
						set(want, first+i, version)
					}
					if version < least[i] || !bytes.Equal(block, want) {
						t.Errorf("block %d: version %d, at least %d was there", first+i, version, least[i])
						return
					}
				}
			}
		})
	}
	wg.Wait()
	b.finish()
	b.close()
}
