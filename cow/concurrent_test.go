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
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// registers are blocks of two volumes, in different leaves and units, and at different places in a unit.
var registers = []struct {
	volume string
	block  int64
}{{"a", 0}, {"a", 1}, {"a", 300}, {"b", 15}, {"b", 257}}

// registerInput is a read or write of one register. If register is negative, it is a snapshot of both volumes, whose
// output is all registers.
type registerInput struct {
	register int
	write    uint64 // the value; 0: a read
}

type registerState [5]uint64

var registerModel = porcupine.Model{
	Init: func() any { return registerState{} },
	Step: func(st, in, out any) (bool, any) {
		s, i := st.(registerState), in.(registerInput)
		switch {
		case i.register < 0:
			return out.(registerState) == s, s
		case i.write == 0:
			return out.(registerState)[i.register] == s[i.register], s
		}
		s[i.register] = i.write
		return true, s
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v: %v", in, out) },
}

// busyStore is a store with two volumes in which everything happens at once: leaves are evicted, checkpoints begin for
// every reason, and chunks come and go.
type busyStore struct {
	t    *testing.T
	s    *Store
	dir  string
	fs   *crashfs.FS
	devs map[string]*Device
	stop chan struct{}
	wg   sync.WaitGroup
}

func newBusyStore(t *testing.T) *busyStore {
	b := &busyStore{t: t, dir: filepath.Join(memoryDir(t), "store"), fs: crashfs.New(), devs: map[string]*Device{}, stop: make(chan struct{})}
	if err := errors.Join(os.Mkdir(b.dir, 0o700), Create(b.dir)); err != nil {
		t.Fatal(err)
	}
	b.open()
	for _, name := range []string{"a", "b"} {
		if _, err := b.s.CreateVolume(name, VolumeOptions{Size: 4 << 20, Codec: format.S2}); err != nil {
			t.Fatal(err)
		}
	}
	b.openDevices()
	return b
}

func (b *busyStore) open() {
	s, err := Open(b.dir, Options{
		fs: b.fs, chunkBytes: 512 << 10, reapBatch: 3, checkpointBytes: 256 << 10, checkpointLeaves: 2,
		checkpointInterval: time.Second, noTableSync: true, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.t.Fatal(err)
	}
	b.s = s
	s.cold.codec = quickCodec
	s.cache.Restrict(3)
}

func (b *busyStore) openDevices() {
	for _, name := range []string{"a", "b"} {
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
// cold passes, takes and deletes snapshots, and cleans.
func (b *busyStore) noise() {
	b.again(func(r *rand.Rand) error {
		d := b.devs[[]string{"a", "b"}[r.IntN(2)]]
		off := 2<<20 + r.Int64N(4000)*512
		p := make([]byte, min(1+r.IntN(64<<10), int(4<<20-off)))
		switch r.IntN(8) {
		case 0:
			return d.Discard(off, int64(len(p)))
		case 1:
			return d.Flush()
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
	close(b.stop)
	b.wg.Wait()
	mustCheck(b.t, b.s)
	b.close()
	b.open()
	b.openDevices()
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

// TestLinearizable lets clients write, read and snapshot registers. Then it asks whether some order of all these
// operations explains what each client has seen.
func TestLinearizable(t *testing.T) {
	t.Parallel()
	b := newBusyStore(t)
	b.noise()
	rounds, each := 300, 40
	if raceEnabled {
		rounds = 40
	}
	var last registerState
	for round := range rounds {
		last = b.linearizable(round, last, each)
	}
	b.finish()
	if got, err := b.all("", ""); err != nil || got != last {
		t.Errorf("after a restart the registers are %v, and were %v: %v", got, last, err)
	}
	b.close()
}

// linearizable runs one history. It is short, since finding an order takes exponential time.
func (b *busyStore) linearizable(round int, from registerState, each int) registerState {
	const clients = 4
	start := time.Now()
	var mu sync.Mutex
	var history []porcupine.Operation
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(round), uint64(client)))
			for i := range each {
				in := registerInput{register: r.IntN(len(registers))}
				if r.IntN(2) == 0 {
					in.write = uint64(round+1)<<32 | uint64(client+1)<<16 | uint64(i)
				}
				if r.IntN(10) == 0 {
					in = registerInput{register: -1}
				}
				call := int64(time.Since(start))
				out, ret, err := b.operate(in, fmt.Sprintf("s%d-%d-%d", round, client, i), start)
				if err != nil {
					b.t.Error(err)
					return
				}
				mu.Lock()
				history = append(history, porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: ret})
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	model := registerModel
	model.Init = func() any { return from }
	if res, _ := porcupine.CheckOperationsVerbose(model, history, time.Minute); res != porcupine.Ok {
		b.t.Fatalf("round %d: the history is %v: %v", round, res, history)
	}
	now, err := b.all("", "")
	if err != nil {
		b.t.Fatal(err)
	}
	return now
}

// operate does one operation. It reads what a snapshot holds after the snapshot was taken, since that cannot change.
func (b *busyStore) operate(in registerInput, name string, start time.Time) (out registerState, ret int64, err error) {
	switch {
	case in.register < 0:
		err = b.s.Snapshot(Ref{"a", name}, Ref{"b", name})
		ret = int64(time.Since(start))
		if err == nil {
			out, err = b.all(name, name)
		}
		return out, ret, errors.Join(err, b.s.Remove(Ref{"a", name}, false), b.s.Remove(Ref{"b", name}, false))
	case in.write == 0:
		reg := registers[in.register]
		out[in.register], err = readRegister(b.devs[reg.volume], reg.block)
	default:
		reg := registers[in.register]
		p := make([]byte, format.BlockSize)
		for i := 0; i < len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], in.write)
		}
		_, err = b.devs[reg.volume].WriteAt(p, reg.block*format.BlockSize)
	}
	return out, int64(time.Since(start)), err
}

// all reads all registers, of the volumes or of a snapshot of each.
func (b *busyStore) all(snapA, snapB string) (st registerState, err error) {
	for i, reg := range registers {
		ref := Ref{reg.volume, map[string]string{"a": snapA, "b": snapB}[reg.volume]}
		d, err := b.s.OpenDevice(ref, true)
		if err != nil {
			return st, err
		}
		st[i], err = readRegister(d, reg.block)
		if err := errors.Join(err, d.Close()); err != nil {
			return st, err
		}
	}
	return st, nil
}

func readRegister(d *Device, block int64) (uint64, error) {
	var p [format.BlockSize]byte
	if _, err := d.ReadAt(p[:], block*format.BlockSize); err != nil {
		return 0, err
	}
	v := binary.LittleEndian.Uint64(p[:])
	for i := 0; i < len(p); i += 8 {
		if x := binary.LittleEndian.Uint64(p[i:]); x != v {
			return 0, fmt.Errorf("block %d holds %x at 0 and %x at %d: the write was not atomic", block, v, x, i)
		}
	}
	return v, nil
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
		writes = 2000
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
