package cow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

func fillLeaves(t *testing.T, d *Device, n int64) {
	p := randomBytes(4096, 9)
	for i := range n {
		for j := range int64(8) {
			p[0]++
			_, err := d.WriteAt(p, i<<20+j<<15)
			must(t, err)
		}
	}
}

// A page of the table rots while the store is open; then somebody checks.
func TestCheckOfDamagedPage(t *testing.T) {
	dir := setup(t, 8<<30, format.Raw)
	s := open(t, dir, Options{checkpointInterval: -1})
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	fillLeaves(t, d, 1000)
	must(t, s.Checkpoint())
	path := filepath.Join(dir, tableFile)
	b, err := os.ReadFile(path)
	must(t, err)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	n := 0
	for at := 2 * 4096; at+4096 <= len(b); at += 4096 {
		if binary.LittleEndian.Uint16(b[at+8:]) == 1 && int(binary.LittleEndian.Uint64(b[at:])) == at/4096 {
			_, err = f.WriteAt([]byte{0, 0, 0, 0, 0x02, 0, 0, 0}, int64(at+16+8)) // child page number
			must(t, err)
			n++
		}
	}
	rep, err := s.Check(context.Background(), CheckOptions{}, func(Problem) {})
	if n == 0 || err != nil || rep.Corrupt == 0 {
		t.Errorf("%d branch pages damaged: check says %+v, %v", n, rep, err)
	}
}

// A record whose payload has rotted is not made to look sound by the cleaner, whether a snapshot holds it or only the
// head has it: its blocks stay unreadable, and its neighbours are whole.
func TestCleanKeepsRot(t *testing.T) {
	for _, held := range []bool{true, false} {
		s, dir := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
		_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		want := randomBytes(2<<20, 1)
		_, err = d.WriteAt(want, 0)
		must(t, err)
		if held {
			must(t, s.Snapshot(Ref{"v", "a"}))
		}
		must(t, s.Checkpoint())
		const block = 10
		var e format.Entry
		must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { e = lf.Entry(block) }))
		cleanRotten(t, s, dir, e, 100)
		got := make([]byte, 4096)
		for i := range 512 {
			_, err := d.ReadAt(got, int64(i)*4096)
			if i == block && !errors.Is(err, ErrCorrupt) {
				t.Errorf("held: %t: the damaged block reads as %x…, %v", held, got[:4], err)
			} else if i != block && (err != nil || !bytes.Equal(got, want[i*4096:][:4096])) {
				t.Errorf("held: %t: block %d: %v", held, i, err)
			}
		}
		must(t, errors.Join(d.Close(), s.Close()))
	}
}

// A unit of a head that is overwritten in part is compressed anew when it is copied, with a checksum of its own. Rot in
// it must be noticed before that.
func TestCleanKeepsRotOfPartOfAUnit(t *testing.T) {
	s, dir := newStore(t, Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	unit := make([]byte, format.UnitBlocks/4*format.BlockSize)
	for i := 0; i < len(unit); i += format.BlockSize {
		copy(unit[i:], randomBytes(format.BlockSize/2, uint64(i+1))) // S2 stores it as it is
	}
	_, err = d.WriteAt(unit, 0)
	must(t, err)
	_, err = d.WriteAt(randomBytes(2<<20, 9), 1<<20) // fills the chunk
	must(t, err)
	var e format.Entry
	must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { e = lf.Entry(0) }))
	_, err = d.WriteAt(randomBytes(format.BlockSize, 77), int64(len(unit)-format.BlockSize))
	must(t, errors.Join(err, s.Checkpoint()))
	if e.Blocks() != len(unit)/format.BlockSize {
		t.Fatalf("the unit has %d blocks", e.Blocks())
	}
	cleanRotten(t, s, dir, e, 200)
	got := make([]byte, format.BlockSize)
	if _, err := d.ReadAt(got, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the damaged unit reads, with the right content: %t; %v", bytes.Equal(got, unit[:len(got)]), err)
	}
	must(t, errors.Join(d.Close(), s.Close()))
}

// cleanRotten damages the payload of the record that e names, at an offset, and cleans its chunk.
func cleanRotten(t *testing.T, s *Store, dir string, e format.Entry, at int64) {
	t.Helper()
	c := s.slots.get(e.Slot())
	change(t, filepath.Join(dir, chunksDir, c.Name()), int64(e.Offset())+format.RecordHeaderSize+at, flip, 1)
	c.Acquire()
	defer c.Release()
	s.cleaner.mu.Lock()
	_, err := s.cleanChunk(context.Background(), c, nil)
	s.cleaner.mu.Unlock()
	must(t, errors.Join(err, s.Checkpoint(), s.Checkpoint()))
}

// A chunk that could not be cleaned to its end stays, and the records before the damage have been moved. They can be
// read as long as one of both copies is whole, whatever becomes of the chunk's file.
func TestRotOfWhatWasMoved(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path string, at int64){
		"header":  func(t *testing.T, path string, at int64) { change(t, path, at, flip, 1) },
		"payload": func(t *testing.T, path string, at int64) { change(t, path, at+format.RecordHeaderSize+99, flip, 1) },
		"cut":     func(t *testing.T, path string, at int64) { must(t, os.Truncate(path, at+100)) },
		"missing": func(t *testing.T, path string, at int64) { must(t, os.Remove(path)) },
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)}
			s, dir := newStore(t, o)
			_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20, Codec: format.Raw})
			must(t, err)
			d, err := s.OpenDevice(Ref{Volume: "v"}, false)
			must(t, err)
			want := randomBytes(2<<20, 1)
			_, err = d.WriteAt(want, 0)
			must(t, errors.Join(err, s.Snapshot(Ref{"v", "a"}), s.Checkpoint()))
			var moved, rotten format.Entry
			must(t, s.cache.View(d.b.leaf(0, head), func(lf *leafcache.Leaf) { moved, rotten = lf.Entry(5), lf.Entry(10) }))
			cleanRotten(t, s, dir, rotten, 100)
			must(t, errors.Join(d.Close(), s.Close()))
			damage(t, filepath.Join(dir, chunksDir, s.slots.get(moved.Slot()).Name()), int64(moved.Offset()))

			s = open(t, dir, o)
			d, err = s.OpenDevice(Ref{"v", "a"}, true)
			must(t, err)
			got := make([]byte, 10*4096)
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:len(got)]) {
				t.Errorf("what was moved cannot be read: %v", err)
			}
			if _, err := d.ReadAt(got[:4096], 10*4096); !errors.Is(err, ErrCorrupt) {
				t.Errorf("the first damage is gone: %v", err)
			}
			must(t, errors.Join(d.Close(), s.Close()))
		})
	}
}

// A chunk file that is missing is no obstacle once nothing in it is live: checkpoints go on.
func TestMissingChunkDies(t *testing.T) {
	o := Options{checkpointInterval: -1, chunkBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler)}
	s, dir := newStore(t, o)
	filledVolume(t, s, "a", 3, 1)
	filledVolume(t, s, "b", 1, 2)
	first := s.slots.all()[0].Name()
	must(t, s.Close())
	must(t, os.Remove(filepath.Join(dir, chunksDir, first)))
	s = open(t, dir, o)
	must(t, s.Remove(Ref{Volume: "a"}, false))
	_, err := s.Clean(t.Context(), 0)
	must(t, err)
	if !holdsAt(t, s, "b", 0, randomBytes(1<<20, 2)) {
		t.Error("the other volume is not what it was")
	}
	mustEnd(t, s)
}
