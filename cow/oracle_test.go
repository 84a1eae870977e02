package cow

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vdisk/vdisk/internal/storage"
)

// lie is a disk, or an engine, that does not do what it says. A nil function tells the truth.
type lie struct {
	write   func(f storage.File, p []byte, off int64) (int, error)
	sync    func() bool // reports whether this sync is left out
	syncDir func() bool
}

type lyingFS struct {
	storage.FS
	lie *lie
}

type lyingFile struct {
	storage.File
	lie *lie
}

func (l *lie) wrap(fs storage.FS) storage.FS { return &lyingFS{fs, l} }

func (fs *lyingFS) Create(name string, size int64) (storage.File, error) {
	f, err := fs.FS.Create(name, size)
	return &lyingFile{f, fs.lie}, err
}

func (fs *lyingFS) Open(name string) (storage.File, error) {
	f, err := fs.FS.Open(name)
	return &lyingFile{f, fs.lie}, err
}

func (fs *lyingFS) SyncDir() error {
	if fs.lie.syncDir != nil && fs.lie.syncDir() {
		return nil
	}
	return fs.FS.SyncDir()
}

func (f *lyingFile) WriteAt(p []byte, off int64) (int, error) {
	if f.lie.write != nil {
		return f.lie.write(f.File, p, off)
	}
	return f.File.WriteAt(p, off)
}

func (f *lyingFile) Sync() error {
	if f.lie.sync != nil && f.lie.sync() {
		return nil
	}
	return f.File.Sync()
}

// calledBy reports whether a method of the engine is among the callers.
func calledBy(method string) bool {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for {
		fr, more := frames.Next()
		if strings.HasSuffix(fr.Function, method) {
			return true
		}
		if !more {
			return false
		}
	}
}

func from(method string) func() bool { return func() bool { return calledBy(method) } }

// rarely makes a lie of one write in n, but for chunk headers.
func rarely(n int64, fn func(f storage.File, p []byte, off int64) (int, error)) func(storage.File, []byte, int64) (int, error) {
	var count atomic.Int64
	return func(f storage.File, p []byte, off int64) (int, error) {
		if off > 0 && len(p) > 0 && count.Add(1)%n == 0 {
			return fn(f, p, off)
		}
		return f.WriteAt(p, off)
	}
}

// TestOracle has the model test look at disks and engines that are known to be wrong. One that it does not tell from a
// right one would be a hole in it. (A new chunk's own sync is not among them: the first flush of its records makes its
// header durable as well.)
func TestOracle(t *testing.T) {
	cases := []struct {
		name string
		lie  lie
	}{
		{"no sync before a checkpoint's commit", lie{sync: from(".(*Store).checkpointLocked")}},
		{"no sync at a flush", lie{sync: from(".(*Device).Flush")}},
		{"no sync at an event", lie{sync: from(".(*Store).transact")}},
		{"no sync of the directory", lie{syncDir: func() bool { return true }}},
		{"lost write", lie{write: rarely(10, func(_ storage.File, p []byte, _ int64) (int, error) { return len(p), nil })}},
		{"torn write", lie{write: rarely(10, func(f storage.File, p []byte, off int64) (int, error) {
			_, err := f.WriteAt(p[:len(p)/2], off)
			return len(p), err
		})}},
		{"misplaced write", lie{write: rarely(10, func(f storage.File, p []byte, off int64) (int, error) {
			return f.WriteAt(p, off-16)
		})}},
		{"flipped bit", lie{write: rarely(10, func(f storage.File, p []byte, off int64) (int, error) {
			bad := append([]byte(nil), p...)
			bad[len(bad)/2] ^= 1
			return f.WriteAt(bad, off)
		})}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			at, err := lookFor(t, &c.lie, 300)
			if err == nil {
				t.Fatal("nothing noticed")
			}
			t.Logf("at operation %d: %v", at, err)
		})
	}
}

// TestOracleTrusts shows the same operations the truth, five times as many runs as any of the lies above takes to be
// noticed. TestCrashStates has thousands.
func TestOracleTrusts(t *testing.T) {
	t.Parallel()
	runs := uint64(10)
	if raceEnabled {
		runs = 2
	}
	if at, err := lookFor(t, &lie{}, runs); err != nil {
		t.Errorf("at operation %d: %v", at, err)
	}
}

// lookFor goes through runs of operations until something is wrong.
func lookFor(t *testing.T, l *lie, runs uint64) (at int, err error) {
	harness := newCrashHarness(t)
	harness.wrap = l.wrap
	for seed := range runs {
		rng := rand.New(rand.NewPCG(seed, 3))
		if at, err := harness.run(randomRun(rng), rng, func() bool { return false }); err != nil {
			return at, fmt.Errorf("run %d, after %d crash states: %w", seed, harness.states.Load(), err)
		}
	}
	return 0, nil
}

// randomRun is operations that always make something to lose.
func randomRun(rng *rand.Rand) []op {
	ops := make([]op, 40)
	for i := range ops {
		ops[i] = randomOp(rng)
	}
	return ops
}
