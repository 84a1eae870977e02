package cow

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"golang.org/x/sys/unix"
)

// roomStore is a store on a disk of its own, whose table is on it, too.
func roomStore(t *testing.T, o Options) (s *Store, fs *crashfs.FS, again func() *Store) {
	t.Helper()
	fs = crashfs.New()
	fs.SetCapacity(1 << 30)
	dir := t.TempDir()
	must(t, Create(dir))
	o.fs, o.growTable, o.checkpointInterval, o.Logger = fs, fs.Take, -1, slog.New(slog.DiscardHandler)
	again = func() *Store { return open(t, dir, o) }
	return again(), fs, again
}

// leaveFree has other files take all but n bytes of the disk.
func leaveFree(t *testing.T, fs *crashfs.FS, n int64) {
	t.Helper()
	free, err := fs.Free()
	must(t, err)
	must(t, fs.Take(free-n))
}

// mapLeaves maps all blocks of the first leaves of a device, in an order that makes them as large in the table as can
// be.
func mapLeaves(t *testing.T, d *Device, leaves int64) {
	t.Helper()
	r, p := rand.New(rand.NewPCG(1, 1)), make([]byte, format.BlockSize)
	for n, i := range r.Perm(int(leaves) * format.LeafBlocks) {
		binary.LittleEndian.PutUint64(p, uint64(n)+1)
		_, err := d.WriteAt(p, int64(i)*format.BlockSize)
		must(t, err)
	}
}

// TestTableCannotFillTheDisk writes a little to every leaf between snapshots: the table grows faster than the log. It
// has to end with ENOSPC while all can still be given back, and then the store is as good as new.
func TestTableCannotFillTheDisk(t *testing.T) {
	s, fs, again := roomStore(t, Options{chunkBytes: 1 << 20})
	leaves, room := int64(256), int64(8<<20)
	if testing.Short() {
		leaves, room = 64, 2<<20
	}
	_, err := s.CreateVolume("v", VolumeOptions{Size: leaves << 20, Codec: format.S2})
	must(t, err)
	d, err := s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	mapLeaves(t, d, leaves)
	must(t, s.Checkpoint())
	leaveFree(t, fs, wal.Spare+room)
	r, p := rand.New(rand.NewPCG(2, 2)), make([]byte, format.BlockSize)
	touched := 0
	for i := 0; err == nil && i < 1000; i++ {
		err = s.Snapshot(Ref{"v", fmt.Sprint("s", i)})
		for _, l := range r.Perm(int(leaves)) {
			if err != nil {
				break
			}
			touched++
			binary.LittleEndian.PutUint64(p, 1<<40+uint64(touched))
			_, err = d.WriteAt(p, (int64(l)*format.LeafBlocks+r.Int64N(format.LeafBlocks))*format.BlockSize)
		}
	}
	in := s.Info()
	t.Logf("full after %d snapshots and %d writes: table %d MiB, log %d MiB, %d KiB free: %v", in.Snapshots, touched, in.MetaBytes>>20, in.ChunkBytes>>20, in.FreeBytes>>10, err)
	if !errors.Is(err, ErrNoSpace) || in.Snapshots < 5 || s.wal.Err() != nil {
		t.Fatalf("after %d snapshots: %v", in.Snapshots, err)
	}
	if kept := in.FreeBytes + in.ReserveBytes; kept < wal.Spare/2 { // the cleaner may have taken half of it
		t.Errorf("of what is to stay free %d bytes are left", kept)
	}
	must(t, s.Checkpoint())
	must(t, d.Flush())

	leaveFree(t, fs, 0) // and then somebody takes the rest
	v, err := s.Volume("v")
	must(t, err)
	for _, sn := range v.Snapshots[1:] {
		must(t, s.Remove(Ref{"v", sn.Name}, false))
	}
	must(t, s.reclaimDeleted(context.Background()))
	must(t, d.Discard(0, d.Size()))
	must(t, s.Remove(Ref{"v", v.Snapshots[0].Name}, false))
	must(t, d.Close())
	must(t, s.Remove(Ref{Volume: "v"}, false))
	must(t, s.reclaimDeleted(context.Background()))
	if in := s.Info(); in.ChunkBytes > 1<<20 || in.LiveBytes != 0 {
		t.Errorf("after the deletion of all: %+v", in)
	}
	// From here on in the pages that the table has by now.
	fs.SetCapacity(2 << 30)
	for range 2 {
		must(t, s.Close())
		s = again()
		size := s.Info().MetaBytes
		_, err := s.CreateVolume("w", VolumeOptions{Size: leaves << 20, Codec: format.S2})
		must(t, err)
		d, err := s.OpenDevice(Ref{Volume: "w"}, false)
		must(t, err)
		mapLeaves(t, d, leaves/4)
		must(t, s.Checkpoint())
		if now := s.Info().MetaBytes; now > size {
			t.Errorf("the table has grown from %d to %d bytes, with all of it free", size, now)
		}
		must(t, errors.Join(d.Close(), s.Remove(Ref{Volume: "w"}, false), s.reclaimDeleted(context.Background())))
	}
	mustEnd(t, s)
}

// TestFullByOthers has other files take all of the disk. What gives room back goes on, from the reserve, also after the
// store is opened again; what takes room does not; and a name that is not there is not found.
func TestFullByOthers(t *testing.T) {
	s, fs, again := roomStore(t, Options{chunkBytes: 4 << 20})
	_, err := s.CreateVolume("v", VolumeOptions{Size: 64 << 20})
	must(t, err)
	fill := func(s *Store) *Device {
		t.Helper()
		d, err := s.OpenDevice(Ref{Volume: "v"}, false)
		must(t, err)
		for i := range int64(32) {
			_, err := d.WriteAt(randomBytes(1<<20, uint64(i)), i<<20)
			must(t, err)
		}
		must(t, d.Flush())
		return d
	}
	d := fill(s)
	must(t, s.Snapshot(Ref{"v", "a"}))
	for i := range int64(32) { // a part of each chunk
		_, err := d.WriteAt(randomBytes(256<<10, 100+uint64(i)), i<<20)
		must(t, err)
	}
	must(t, errors.Join(s.Snapshot(Ref{"v", "b"}), d.Flush()))
	if n := s.Info().ReserveBytes; n < wal.ReserveLeast {
		t.Fatalf("a reserve of %d bytes", n)
	}
	leaveFree(t, fs, 0)
	must(t, d.Close())
	killStore(s)
	s = again()
	if free, err := fs.Free(); err != nil || free < wal.ElbowRoom {
		t.Errorf("%d bytes are free for small files, %v", free, err)
	}
	leaveFree(t, fs, 0)

	before := s.wal.NextSeq()
	for what, err := range map[string]error{
		"remove": s.Remove(Ref{Volume: "nosuch"}, false), "rename": s.Rename(Ref{Volume: "nosuch"}, Ref{Volume: "w"}),
		"clone": s.Clone(Ref{"v", "nosuch"}, "w"), "snapshot": s.Snapshot(Ref{"nosuch", "a"}),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("%s of what is not there: %v", what, err)
		}
	}
	if s.wal.NextSeq() != before || s.wal.Current() != nil {
		t.Error("what was refused has changed the log")
	}
	for what, err := range map[string]error{"snapshot": s.Snapshot(Ref{"v", "c"}), "clone": s.Clone(Ref{"v", "a"}, "w")} {
		if !errors.Is(err, ErrNoSpace) {
			t.Errorf("%s: %v", what, err)
		}
	}
	used := s.used(true)
	must(t, s.Remove(Ref{"v", "a"}, false))
	must(t, s.reclaimDeleted(context.Background()))
	_, err = s.Clean(context.Background(), 0.05)
	must(t, err)
	if n := s.used(true); n >= used {
		t.Errorf("%d bytes of chunk files, %d before", n, used)
	}
	mustCheck(t, s)
	leaveFree(t, fs, 0)
	d, err = s.OpenDevice(Ref{Volume: "v"}, false)
	must(t, err)
	must(t, errors.Join(d.Discard(0, d.Size()), s.Remove(Ref{"v", "b"}, false), s.reclaimDeleted(context.Background())))
	if in := s.Info(); in.LiveBytes != 0 || in.FreeBytes == 0 {
		t.Errorf("after all was given back: %+v", in)
	}
	fs.SetCapacity(2 << 30)
	s.fillReserve()
	if n := s.Info().ReserveBytes; n < wal.ReserveLeast {
		t.Errorf("a reserve of %d bytes, with room again", n)
	}
	must(t, d.Close())
	d = fill(s)
	mustEnd(t, s, d)
}

// TestManyEventsOnAFullDisk makes more events than the reserve has room for at once: what they took comes back with
// checkpoints.
func TestManyEventsOnAFullDisk(t *testing.T) {
	s, fs, _ := roomStore(t, Options{})
	names := []Ref{{Volume: strings.Repeat("v", 63)}, {Volume: strings.Repeat("w", 63)}}
	_, err := s.CreateVolume(names[0].Volume, VolumeOptions{Size: 1 << 20})
	must(t, err)
	s.reserve.Give(wal.ReserveLeast - 2*wal.EventChunkSize)
	leaveFree(t, fs, 0)
	for i := range 3 * wal.EventChunkSize / 300 {
		if err := s.Rename(names[i%2], names[1-i%2]); err != nil {
			t.Fatalf("rename %d: %v", i, err)
		}
	}
	if n := s.used(true); n > 3*wal.EventChunkSize+s.wal.ChunkBytes {
		t.Errorf("%d bytes of chunk files", n)
	}
	mustEnd(t, s)
}

// TestReserveOfHoles opens a copy of a store: cp leaves out blocks to which nothing was written.
func TestReserveOfHoles(t *testing.T) {
	s, dir := newStore(t, Options{})
	size := s.Info().ReserveBytes
	must(t, s.Close())
	path := filepath.Join(dir, wal.ReserveName)
	if size == 0 {
		t.Skip("the file system has no room for a reserve, or no fallocate")
	}
	must(t, errors.Join(os.Truncate(path, 0), os.Truncate(path, size)))
	s = open(t, dir, Options{})
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	if got := st.Blocks * 512; got < size || s.Info().ReserveBytes < size {
		t.Errorf("the reserve has %d bytes in blocks of %d that it is said to have", got, size)
	}
	must(t, s.Close())
}

// TestReserveThatWasUsedUp opens a store whose last owner has given all of the reserve to a full disk.
func TestReserveThatWasUsedUp(t *testing.T) {
	s, dir := newStore(t, Options{})
	size := s.Info().ReserveBytes
	must(t, s.Close())
	if size == 0 {
		t.Skip("the file system has no room for a reserve, or no fallocate")
	}
	must(t, os.Truncate(filepath.Join(dir, wal.ReserveName), 0))
	s = open(t, dir, Options{})
	if got := s.Info().ReserveBytes; got < size {
		t.Errorf("with room again the reserve has %d bytes, and had %d", got, size)
	}
	must(t, s.Close())
}

// TestTableThatCannotGrow: a disk that fails where the table grows is an I/O error, and not a full disk.
func TestTableThatCannotGrow(t *testing.T) {
	var broken error
	o := Options{checkpointInterval: -1, Logger: slog.New(slog.DiscardHandler)}
	o.growTable = func(int64) error { return broken }
	s, _ := newStore(t, o)
	for _, broken = range []error{unix.EIO, unix.ENOSPC, unix.EDQUOT} {
		err := s.growTable(1<<20, wal.ForData)
		if !errors.Is(err, broken) || errors.Is(err, ErrNoSpace) != (broken != unix.EIO) {
			t.Errorf("with %v: %v", broken, err)
		}
	}
	broken = nil
	must(t, s.growTable(1<<20, wal.ForData))
	mustEnd(t, s)
}
