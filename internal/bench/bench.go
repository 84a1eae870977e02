// Package bench measures a store's engine with a short load on a scratch volume.
package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker/go-units"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
	"github.com/vdisk/vdisk/ublk"
)

// Volume is the name of the scratch volume. Run removes it. A process that is killed leaves it behind, with its
// snapshots.
const Volume = "vdisk-bench.scratch"

// MinSize is the smallest volume that gives meaningful figures.
const MinSize = 16 << 20

// Options are the parameters of a measurement.
type Options struct {
	Size   int64             // of the scratch volume; rounded up to 1 MiB
	Time   time.Duration     // after which a step ends, if it has no other end
	Volume cow.VolumeOptions // codec and level
}

// Result is the outcome of one step.
type Result struct {
	Name       string
	Operations int64
	Bytes      int64         // read or written
	Elapsed    time.Duration // with the flush at the end of a step of writes
	P50, P99   time.Duration // of an operation
	CPU        time.Duration // of the whole process, user and system
}

const (
	block = format.BlockSize
	large = 1 << 20 // bytes of a sequential operation
	// rounds bounds the bytes that a step writes, in sizes of the volume, and so the room that is needed.
	rounds = 2
	// snapshots is the most snapshots that are taken; between is how many writes come before each.
	snapshots = 100
	between   = 100
)

// run is one run of the steps.
type run struct {
	ctx  context.Context
	s    *cow.Store
	o    Options
	d    *cow.Device
	r    *rand.Rand
	data []byte // half-compressible
	buf  []byte
}

// Run makes a scratch volume, performs the steps, and calls each with the result of every step. It removes the volume in
// any case.
func Run(ctx context.Context, s *cow.Store, o Options, each func(Result)) (err error) {
	if o.Size > cow.MaxVolume {
		return fmt.Errorf("a scratch volume of %d bytes: the largest volume has 64 TiB: %w", o.Size, cow.ErrInvalid)
	}
	o.Size = (o.Size + large - 1) / large * large
	if o.Size < MinSize || o.Time <= 0 {
		return fmt.Errorf("a scratch volume of %d bytes for %v: at least 16 MiB and some time are needed: %w", o.Size, o.Time, cow.ErrInvalid)
	}
	if err := enough(s, o); err != nil {
		return err
	}
	o.Volume.Size = o.Size
	if _, err := s.CreateVolume(Volume, o.Volume); err != nil {
		return leftover(s, err)
	}
	defer func() { err = errors.Join(err, s.Remove(cow.Ref{Volume: Volume}, true)) }()
	d, err := s.OpenDevice(cow.Ref{Volume: Volume}, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	x := &run{ctx: ctx, s: s, o: o, d: d, r: rand.New(rand.NewPCG(1, 2)), data: make([]byte, large), buf: make([]byte, large)}
	workload.HalfCompressible(x.r, x.data)
	steps := []func() (Result, error){x.fill, x.randomWrites, x.flushedWrites, x.randomReads, x.sequentialReads, x.snapshots, x.writesAfter}
	for _, step := range steps {
		r, err := step()
		if err != nil {
			return err
		}
		each(r)
	}
	return nil
}

// enough returns an error if the writes to the volume might not fit. It does not count on space that the cleaner could
// give back.
func enough(s *cow.Store, o Options) error {
	room, err := s.Room()
	if err != nil {
		return err
	}
	const writing = 1 + 3*rounds // the fill, and three steps of writes; snapshots need next to nothing
	need := o.Size * writing
	if o.Volume.Codec == format.Raw {
		need += need / 32 // headers and summaries
	} else {
		need = need/2 + need/16
	}
	if need > room {
		return fmt.Errorf("it may write up to %s, and there is room for %s: give a smaller --size: %w",
			units.BytesSize(float64(need)), units.BytesSize(float64(max(0, room))), cow.ErrNoSpace)
	}
	return nil
}

// leftover explains why the scratch volume exists already, if that is what err means. It returns any other error as it
// is.
func leftover(s *cow.Store, err error) error {
	v, verr := s.Volume(Volume)
	switch {
	case !errors.Is(err, cow.ErrExists) || verr != nil:
		return err
	case v.Open > 0:
		return fmt.Errorf("a measurement is running: volume %s is open: %w", Volume, cow.ErrBusy)
	}
	return fmt.Errorf("volume %s is there, and no measurement runs; if nobody needs it, remove it with 'vdisk rm -r %[1]s': %w", Volume, cow.ErrExists)
}

// timer counts the operations of a step.
type timer struct {
	Result
	latency ublk.Histogram
	began   time.Time
	last    time.Time // the end of the last operation
	cpu     time.Duration
}

func begin(name string) *timer {
	t := &timer{Result: Result{Name: name}, cpu: cpuTime(), began: time.Now()}
	t.last = t.began
	return t
}

// done counts an operation of n bytes that began when the last one ended.
func (t *timer) done(n int) {
	now := time.Now()
	t.latency.Add(now.Sub(t.last))
	t.last = now
	t.Operations++
	t.Bytes += int64(n)
}

func (t *timer) end() Result {
	t.Elapsed, t.CPU = time.Since(t.began), cpuTime()-t.cpu
	t.P50, t.P99 = t.latency.Quantile(0.5), t.latency.Quantile(0.99)
	return t.Result
}

// cpuTime returns the processor time that this process has used so far.
func cpuTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// more reports whether a step goes on. A step ends when it has moved most bytes, or when its time is over.
func (x *run) more(t *timer, most int64) (bool, error) {
	if t.Operations%16 == 0 {
		if x.ctx.Err() != nil {
			return false, context.Cause(x.ctx)
		}
	}
	return t.Bytes < most && t.last.Sub(t.began) < x.o.Time, nil
}

// repeat repeats an operation until the end of the step. op returns the operation's size.
func (x *run) repeat(t *timer, most int64, op func() (int, error)) error {
	for {
		more, err := x.more(t, most)
		if err != nil || !more {
			return err
		}
		n, err := op()
		if err != nil {
			return err
		}
		t.done(n)
	}
}

// writeRandom writes one block at a random place.
func (x *run) writeRandom() (int, error) {
	from := x.r.IntN(large/block) * block
	return x.d.WriteAt(x.data[from:from+block], x.r.Int64N(x.o.Size/block)*block)
}

func (x *run) fill() (Result, error) {
	t := begin("sequential fill, 1M")
	for off := int64(0); off < x.o.Size; off += large {
		if x.ctx.Err() != nil {
			return Result{}, context.Cause(x.ctx)
		}
		if _, err := x.d.WriteAt(x.data, off); err != nil {
			return Result{}, err
		}
		t.done(large)
	}
	err := x.d.Flush()
	return t.end(), err
}

func (x *run) randomWrites() (Result, error) { return x.writes("random write, 4K") }

func (x *run) writes(name string) (Result, error) {
	t := begin(name)
	err := errors.Join(x.repeat(t, rounds*x.o.Size, x.writeRandom), x.d.Flush())
	return t.end(), err
}

func (x *run) flushedWrites() (Result, error) {
	t := begin("random write, 4K, flush each")
	err := x.repeat(t, rounds*x.o.Size, func() (int, error) {
		n, err := x.writeRandom()
		if err == nil {
			err = x.d.Flush()
		}
		return n, err
	})
	return t.end(), err
}

// unbounded is for steps that end only when their time is over.
const unbounded = 1 << 62

func (x *run) randomReads() (Result, error) {
	t := begin("random read, 4K, warm")
	err := x.repeat(t, unbounded, func() (int, error) {
		return x.d.ReadAt(x.buf[:block], x.r.Int64N(x.o.Size/block)*block)
	})
	return t.end(), err
}

func (x *run) sequentialReads() (Result, error) {
	t := begin("sequential read, 1M")
	off := int64(0)
	err := x.repeat(t, unbounded, func() (int, error) {
		n, err := x.d.ReadAt(x.buf, off)
		off = (off + large) % x.o.Size
		return n, err
	})
	return t.end(), err
}

// snapshots takes snapshots, with writes between them. Only the snapshots are measured.
func (x *run) snapshots() (Result, error) {
	var total timer
	total.Name = "snapshot, between writes"
	for i := range snapshots {
		for range between {
			if _, err := x.writeRandom(); err != nil {
				return Result{}, err
			}
		}
		if x.ctx.Err() != nil {
			return Result{}, context.Cause(x.ctx)
		}
		t := begin("")
		if err := x.s.Snapshot(cow.Ref{Volume: Volume, Snapshot: fmt.Sprint("s", i)}); err != nil {
			return Result{}, err
		}
		r := t.end()
		total.latency.Add(r.Elapsed)
		total.Operations++
		total.Elapsed += r.Elapsed
		total.CPU += r.CPU
		if total.Elapsed > x.o.Time {
			break
		}
	}
	total.P50, total.P99 = total.latency.Quantile(0.5), total.latency.Quantile(0.99)
	return total.Result, nil
}

func (x *run) writesAfter() (Result, error) { return x.writes("random write, 4K, after snapshot") }
