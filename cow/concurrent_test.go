package cow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// busyStore is a store with three volumes in which everything happens at once: leaves are evicted, checkpoints begin
// for every reason, and chunks come and go. Its power can be cut at any moment.
type busyStore struct {
	t       *testing.T
	harness *crashHarness
	s       *Store
	dir     string
	fs      *crashfs.FS
	devs    map[string]*Device
	stop    chan struct{}
	wg      sync.WaitGroup

	mu    sync.Mutex // guards the fields below
	armed bool       // the power may be cut
	table []byte     // as of the last commit, if armed
}

var busyVolumes = []string{"a", "b", "c"}

func newBusyStore(t *testing.T) *busyStore {
	b := &busyStore{t: t, harness: newCrashHarness(t)}
	b.create()
	return b
}

// create makes the store.
func (b *busyStore) create() {
	b.open(crashImage{fs: crashfs.New(), table: b.harness.newTable()})
	for _, name := range busyVolumes {
		if _, err := b.s.CreateVolume(name, VolumeOptions{Size: 4 << 20, Codec: format.S2}); err != nil {
			b.t.Fatal(err)
		}
	}
	b.openDevices()
}

// open opens what a power cut has left.
func (b *busyStore) open(img crashImage) {
	b.t.Helper()
	dir, err := b.harness.dir()
	if err != nil {
		b.t.Fatal(err)
	}
	b.dir, b.fs, b.armed = dir, img.fs, false
	if err := img.table.restore(dir); err != nil {
		b.t.Fatal(err)
	}
	b.reopen()
}

// reopen opens the store where it is.
func (b *busyStore) reopen() {
	b.t.Helper()
	s, err := Open(b.dir, Options{
		fs: b.fs, chunkBytes: 512 << 10, reapBatch: 3, checkpointBytes: 256 << 10, checkpointLeaves: 2,
		checkpointInterval: time.Second, noTableSync: true, Logger: slog.New(slog.DiscardHandler), onCommit: b.committed,
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.s, b.devs, b.stop = s, map[string]*Device{}, make(chan struct{})
	s.cold.codec = quickCodec
	s.cache.Restrict(3)
}

// committed keeps the table that a power cut leaves from now on. The store does nothing that rests on the commit
// before this returns.
func (b *busyStore) committed(done bool) (err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if done && b.armed {
		b.table, err = os.ReadFile(filepath.Join(b.dir, tableFile))
	}
	return err
}

// arm lets cutPower be called.
func (b *busyStore) arm() {
	b.s.checkpoints.mu.Lock() // nothing is committed meanwhile
	defer b.s.checkpoints.mu.Unlock()
	b.mu.Lock()
	b.armed = true
	b.mu.Unlock()
	if err := b.committed(true); err != nil {
		b.t.Fatal(err)
	}
}

// cutPower returns what would be left if power was lost at a moment between before and after, by the clock now. The
// store was armed.
func (b *busyStore) cutPower(r *rand.Rand, now func() int64) (img crashImage, before, after int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	choices := b.fs.Choices(r.Uint64(), 8)
	choice := choices[r.IntN(len(choices))]
	if r.IntN(2) == 0 {
		choice = choices[0] // only what was synced
	}
	before = now()
	img = crashImage{fs: b.fs.Crash(choice), table: tableOf(b.table), what: choice.String()}
	return img, before, now()
}

func (b *busyStore) openDevices() {
	for _, name := range busyVolumes[:2] {
		d, err := b.s.OpenDevice(Ref{Volume: name}, false)
		if err != nil {
			b.t.Fatal(err)
		}
		b.devs[name] = d
	}
}

// again runs fn over and over until the test ends.
func (b *busyStore) again(fn func(r *rand.Rand) error) {
	b.wg.Go(func() {
		r := rand.New(rand.NewPCG(rand.Uint64(), 0))
		for {
			select {
			case <-b.stop:
				return
			default:
			}
			if err := fn(r); err != nil {
				b.t.Error(err)
				return
			}
		}
	})
}

// noise writes, discards and flushes in the part of the volumes behind the registers. It also makes checkpoints and
// cold passes, takes and deletes snapshots, cleans, makes volumes larger, and rolls another volume back.
func (b *busyStore) noise() {
	b.again(b.rollBack)
	b.again(func(r *rand.Rand) error {
		d := b.devs[[]string{"a", "b"}[r.IntN(2)]]
		off := 2<<20 + r.Int64N(4000)*512
		p := make([]byte, min(1+r.IntN(64<<10), int(4<<20-off)))
		switch r.IntN(8) {
		case 0:
			return d.Discard(off, int64(len(p)))
		case 1:
			return d.Flush()
		case 2:
			time.Sleep(time.Millisecond) // or clients would wait for their turn on a processor more than for the store
		}
		fill(p, r.IntN(4), r)
		_, err := d.WriteAt(p, off)
		return err
	})
	b.again(func(r *rand.Rand) error {
		time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
		switch {
		case r.IntN(4) == 0:
			_, err := b.s.Usage(context.Background())
			return err
		case r.IntN(8) > 0:
			return b.s.Checkpoint()
		}
		var problems []error
		_, err := b.s.Check(context.Background(), CheckOptions{ReadData: true}, func(p Problem) {
			problems = append(problems, fmt.Errorf("check: %+v", p))
		})
		return errors.Join(append(problems, err)...)
	})
	b.again(func(r *rand.Rand) error {
		time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
		_, err := b.s.Cold(context.Background())
		return err
	})
	b.again(func(r *rand.Rand) error {
		time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
		_, err := b.s.Clean(context.Background(), worthwhile)
		return err
	})
	b.again(b.difference)
	n := 0
	b.again(func(r *rand.Rand) error {
		n++
		time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
		sn, clone := Ref{"a", fmt.Sprint("noise", n)}, Ref{Volume: fmt.Sprint("clone", n)}
		if err := errors.Join(b.s.Snapshot(sn, Ref{"b", sn.Snapshot}), b.s.Clone(sn, clone.Volume)); err != nil {
			return err
		}
		if err := b.renameOpen(sn); err != nil {
			return err
		}
		sn.Snapshot += "-renamed"
		return errors.Join(b.s.Remove(sn, false), b.s.Remove(Ref{"b", fmt.Sprint("noise", n)}, false), b.s.Remove(clone, false))
	})
}

// rollBack changes the volume c, which nothing else uses, and rolls it back. It makes c and the volume a larger, too,
// and c smaller again.
func (b *busyStore) rollBack(r *rand.Rand) error {
	time.Sleep(time.Duration(r.IntN(5000)) * time.Microsecond)
	c, was := Ref{Volume: "c"}, Ref{"c", "was"}
	var p, q, got [3 * format.BlockSize]byte
	fill(p[:], 3, r)
	fill(q[:], 3, r)
	off := r.Int64N(4<<20 - int64(len(p)))
	a, err := b.s.Volume("a")
	if err != nil {
		return err
	}
	write := func(p []byte) error {
		d, err := b.s.OpenDevice(c, false)
		if err != nil {
			return err
		}
		_, err = d.WriteAt(p, off)
		return errors.Join(err, d.Close())
	}
	if err := errors.Join(
		write(p[:]), b.s.Snapshot(was), write(q[:]), b.s.Resize("c", 5<<20, false),
		b.s.Resize("a", min(a.Size+format.BlockSize, 8<<20), false), b.s.Resize("c", 4<<20, true), b.s.Rollback(was), b.s.Remove(was, false),
	); err != nil {
		return err
	}
	d, err := b.s.OpenDevice(c, true)
	if err != nil {
		return err
	}
	if _, err = d.ReadAt(got[:], off); err == nil && got != p {
		err = errors.New("a volume that was rolled back holds something else than before")
	}
	return errors.Join(err, d.Close())
}

// difference takes the difference of two snapshots of a volume that is in use, and reads both.
func (b *busyStore) difference(r *rand.Rand) (err error) {
	time.Sleep(time.Duration(r.IntN(20_000)) * time.Microsecond)
	from, to := Ref{"b", "from"}, Ref{"b", "to"}
	if err := b.s.Snapshot(from); err != nil {
		return err
	}
	time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
	if err := b.s.Snapshot(to); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.s.Remove(from, false), b.s.Remove(to, false)) }()
	x, err := b.s.OpenDevice(from, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, x.Close()) }()
	y, err := b.s.OpenDevice(to, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, y.Close()) }()
	d, err := b.s.Difference(context.Background(), x, y)
	if err != nil {
		return err
	}
	was, is := make([]byte, y.Size()), make([]byte, y.Size())
	_, err1 := x.ReadAt(was, 0)
	_, err2 := y.ReadAt(is, 0)
	err = d.Extents(context.Background(), 0, d.Size(), func(off, length int64, zero bool) bool {
		if zero && !format.IsZero(is[off:off+length]) {
			err1 = fmt.Errorf("difference %s: %d bytes at %d are called a hole", d, length, off)
		}
		copy(was[off:off+length], is[off:])
		return true
	})
	if err = errors.Join(err, err1, err2); err == nil && string(was) != string(is) {
		err = fmt.Errorf("difference %s: something is missing", d)
	}
	return err
}

// renameOpen renames a snapshot while it is being read.
func (b *busyStore) renameOpen(sn Ref) error {
	d, err := b.s.OpenDevice(sn, true)
	if err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		_, err := d.ReadAt(make([]byte, 64<<10), 3<<20)
		done <- err
	}()
	err = b.s.Rename(sn, Ref{sn.Volume, sn.Snapshot + "-renamed"})
	return errors.Join(err, <-done, d.Close())
}

// finish ends the noise, checks the store, and opens it again.
func (b *busyStore) finish() {
	b.quiet()
	mustCheck(b.t, b.s)
	b.close()
	b.reopen()
	b.openDevices()
}

// quiet ends the noise.
func (b *busyStore) quiet() {
	close(b.stop)
	b.wg.Wait()
}

func (b *busyStore) close() {
	for _, d := range b.devs {
		if err := d.Close(); err != nil {
			b.t.Error(err)
		}
	}
	if err := b.s.Close(); err != nil {
		b.t.Fatal(err)
	}
}

// TestSectorsOfOneBlock lets eight writers write one sector each of the same block. Each write reads and replaces the
// block, but no write of another sector may be lost.
func TestSectorsOfOneBlock(t *testing.T) {
	b := newBusyStore(t)
	b.noise()
	d := b.devs["a"]
	const sectors = 8
	writes := 10_000
	if raceEnabled {
		writes = 500
	}
	const at = 17 * format.BlockSize
	var wg sync.WaitGroup
	for sector := range sectors {
		wg.Go(func() {
			off := int64(at + sector*512)
			want, got := make([]byte, 512), make([]byte, 512)
			for i := range writes {
				if _, err := d.ReadAt(got, off); err != nil || string(got) != string(want) {
					t.Errorf("sector %d lost write %d: %v", sector, i-1, err)
					return
				}
				for j := range want {
					want[j] = byte(i*sectors + sector)
				}
				if _, err := d.WriteAt(want, off); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.finish()
	var p [format.BlockSize]byte
	if _, err := b.devs["a"].ReadAt(p[:], at); err != nil {
		t.Fatal(err)
	}
	for i := range p {
		if want := byte((writes-1)*sectors + i/512); p[i] != want {
			t.Fatalf("byte %d is %d, not %d", i, p[i], want)
		}
	}
	b.close()
}
