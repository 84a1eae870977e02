package cow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// faultScript returns operations that cause every kind of I/O: rotation, checkpoints, reaping, removal of chunks.
func faultScript(seed uint64) []op {
	rng := rand.New(rand.NewPCG(seed, 7))
	ops := []op{{"create", 0, 0, 0}, {"create", 1, 100, 1}}
	for range 60 {
		ops = append(ops, randomOp(rng))
	}
	var script []op
	for _, o := range ops {
		switch o.kind {
		case "misuse": // it wants certain errors
		case "snapshot":
			// The writes between make the removal of a snapshot free a chunk.
			script = append(script, o, op{"write", o.a, o.b, 4}, op{"flush", o.a, 0, 0})
		default:
			script = append(script, o)
		}
	}
	return append(script, op{kind: "reap"}, op{kind: "check"}, op{kind: "scrub"})
}

// faulty runs the script until an operation fails. The model may then have records that the store does not have. The
// caller can go on after every error, except that of a flush.
func (w *modelStore) faulty(script []op) (failed error, err error) {
	for i, o := range script {
		if len(w.m.now()) == 0 && o.kind != "create" {
			continue
		}
		before := w.m.fork()
		if err := w.operate(o); err != nil {
			failed = fmt.Errorf("operation %d, %v: %w", i, o, err)
			w.settleModel(before)
			return failed, nil
		}
		if seq := w.seq(); seq != w.m.next() {
			return nil, fmt.Errorf("operation %d, %v: the log is at record %d, the model at %d", i, o, seq, w.m.next())
		}
	}
	return nil, nil
}

// settleModel removes from the model those records of a failed operation that the store has not logged.
func (w *modelStore) settleModel(before *model) {
	if seq := w.seq(); seq >= before.next() && seq <= w.m.next() {
		w.m.truncate(seq)
	}
}

// TestFaultAtEveryOperation makes each disk operation of a script fail, once or from then on, and each operation of the
// recovery that follows. The store may stop or go on, but what it says must be true: whatever else happens, what it
// acknowledged as durable is there after a crash.
//
// It takes a sample of them, another in each run, unless VDISK_FAULTS says otherwise.
func TestFaultAtEveryOperation(t *testing.T) {
	var total atomic.Int64
	t.Cleanup(func() {
		if !t.Failed() {
			t.Logf("proof: faults in the engine's file operations: %d", total.Load())
		}
	})
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			total.Add(faultEverywhere(t, faultScript(seed)))
		})
	}
}

func faultEverywhere(t *testing.T, script []op) (total int64) {
	l := newCrashHarness(t)
	fs := crashfs.New()
	rng := rand.New(rand.NewPCG(1, 1))
	w, err := l.open(crashImage{fs: fs, table: l.newTable(), m: newModel(1, state{}), floor: 1, what: "new"}, never, rng)
	if err != nil {
		t.Fatal(err)
	}
	if failed, err := w.faulty(script); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	if err := w.kill(); err != nil {
		t.Fatal(err)
	}
	const few = 4
	sample := faultSample(t, few) // of each kind that has very many
	for kind := crashfs.OpCreate; kind <= crashfs.OpRead; kind++ {
		n := fs.Count(kind)
		step, errnos := 1, []error{syscall.EIO, syscall.ENOSPC, syscall.EINTR}
		switch {
		case kind == crashfs.OpRead:
			step, errnos = max(1, n/sample), errnos[:1]
		case sample == few:
			step, errnos = max(1, n/10), []error{errnos[rand.IntN(2)]}
		}
		for nth := 1 + rand.IntN(step); nth <= n+1; nth += step {
			if raceEnabled && nth%8 != 0 {
				continue
			}
			for _, errno := range errnos {
				if err := l.fault(script, func(fs *crashfs.FS) { fs.FailAt(kind, nth, errno) }, kind, errno, rng); err != nil {
					t.Errorf("%v at %v %d of %d: %v", errno, kind, nth, n, err)
				}
				total++
			}
		}
	}
	n := fs.Total()
	for nth := 1 + rand.IntN(max(1, n/sample)); nth <= n+1; nth += max(1, n/sample) {
		if err := l.fault(script, func(fs *crashfs.FS) { fs.GoneAt(nth, syscall.EIO) }, crashfs.OpWrite, syscall.EIO, rng); err != nil {
			t.Errorf("the disk goes away at operation %d of %d: %v", nth, n, err)
		}
		total++
	}
	return total
}

// fault runs the script on a disk that breaks: an operation of a kind fails. It then looks at what the store has: while
// it runs, after SIGKILL, and after a power cut.
func (l *crashHarness) fault(script []op, breaks func(*crashfs.FS), kind crashfs.Op, errno error, rng *rand.Rand) error {
	fs := crashfs.New()
	breaks(fs)
	w, err := l.open(crashImage{fs: fs, table: l.newTable(), m: newModel(1, state{}), floor: 1, what: "new"}, never, rng)
	if err != nil {
		if errors.Is(err, errno) {
			return nil // the failure was in Open, which returned it
		}
		return err
	}
	failed, err := w.faulty(script)
	if err == nil && failed != nil && !isFault(failed, errno) {
		err = fmt.Errorf("failed with another error: %w", failed)
	}
	if err == nil {
		err = w.goOn(kind, failed)
		if isFault(err, errno) {
			err = nil // the failing operation was one of these
		}
	}
	if lerr := w.letGo(); lerr != nil && !isFault(lerr, errno) {
		err = errors.Join(err, lerr)
	}
	if err != nil {
		return errors.Join(err, w.kill())
	}
	choices := fs.Choices(rng.Uint64(), 2)
	choice := choices[rng.IntN(len(choices))]
	images := []crashImage{
		w.now(fmt.Sprintf("after %v, killed", failed), fs.Clone()),
		w.now(fmt.Sprintf("after %v, %v", failed, choice), fs.Crash(choice)),
	}
	if err := w.kill(); err != nil {
		return err
	}
	for _, img := range images {
		if err := l.verify(img, 1, rng); err != nil {
			return err
		}
	}
	return nil
}

// isFault reports whether an error is about the failure. It compares the text too, since Check's problems are text.
func isFault(err error, errno error) bool {
	return err != nil && (errors.Is(err, errno) || strings.Contains(err.Error(), errno.Error()))
}

// goOn checks that a store stops after a failure if the log's end is unknown, and goes on otherwise.
func (w *modelStore) goOn(kind crashfs.Op, failed error) error {
	stopped := w.s.wal.Err()
	if failed != nil && stopped == nil {
		// Nothing was lost: acknowledged data is readable, and work can go on.
		if err := w.same(true); err != nil {
			return fmt.Errorf("after %v: %w", failed, err)
		}
		return w.do(op{kind: "create"})
	}
	if stopped == nil {
		return w.same(true)
	}
	if kind != crashfs.OpWrite && kind != crashfs.OpSync {
		return fmt.Errorf("the store has stopped after a failed %v: %w", kind, stopped)
	}
	// From now on it must refuse every change, and acknowledge no flush.
	for name := range w.devs { // a failed rename may have changed their names
		w.closeDevice(name)
	}
	for _, name := range w.m.now().names() {
		d, err := w.device(name)
		if err != nil {
			return err
		}
		_, write := d.WriteAt(make([]byte, 512), 0)
		for what, err := range map[string]error{
			"write": write, "flush": d.Flush(), "discard": d.Discard(0, 4096),
			"snapshot": w.s.Snapshot(Ref{name, "late"}), "checkpoint": w.s.Checkpoint(), "rename": w.s.Rename(Ref{Volume: name}, Ref{Volume: "late"}),
		} {
			if !errors.Is(err, ErrFailed) {
				return fmt.Errorf("%s after the store stopped: %v", what, err)
			}
		}
	}
	return nil
}
