package cow

import (
	"errors"
	"math/rand/v2"
	"os/signal"
	"syscall"
	"testing"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
)

// newModelStore returns a new open store with a model. Only the test cuts its power.
func newModelStore(t testing.TB) *modelStore {
	t.Helper()
	l := newCrashHarness(t)
	w, err := l.open(crashImage{fs: crashfs.New(), table: l.newTable(), m: newModel(1, state{}), floor: 1, what: "new"}, never, rand.New(rand.NewPCG(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// must does operations that must succeed.
func (w *modelStore) must(t testing.TB, ops ...op) {
	t.Helper()
	for _, o := range ops {
		if err := w.do(o); err != nil {
			t.Fatalf("%v: %v", o, err)
		}
	}
}

// mustBe checks everything that the store holds.
func (w *modelStore) mustBe(t *testing.T) {
	t.Helper()
	if err := w.same(true); err != nil {
		t.Fatal(err)
	}
}

// again ends the store by SIGKILL and opens it again.
func (w *modelStore) again(t *testing.T) *modelStore {
	t.Helper()
	next, err := w.restart(op{kind: "kill"}, rand.New(rand.NewPCG(w.writes, 2)))
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// put writes incompressible content to a volume, in the model and the store.
func (w *modelStore) put(name string, off, n int64) error {
	d, err := w.device(name)
	if err != nil {
		return err
	}
	w.writes++
	p := make([]byte, n)
	fill(p, 1, rand.New(rand.NewPCG(w.writes, 1)))
	before := w.m.fork()
	w.m.write(name, p, off)
	if _, err = d.WriteAt(p, off); err != nil {
		w.settleModel(before)
	}
	return err
}

// TestFullDisk fills the disk until the store takes no more data. Nothing may be half done. Everything in the store can
// still be read, renamed, deleted and discarded, and that brings the space back.
func TestFullDisk(t *testing.T) {
	for _, end := range []string{"unsnap", "remove", "discard"} {
		t.Run(end, func(t *testing.T) {
			w := newModelStore(t)
			w.injector.fs.SetCapacity(wal.Spare + 6<<20)
			var first int64
			for round := range 3 {
				written := w.fillDisk(t)
				t.Logf("full after %d writes", written)
				least := first / 2
				if end == "unsnap" {
					least = 1 // the volume keeps its content, and with it parts of chunks
				}
				if first = max(first, written); written < least {
					t.Errorf("%d writes of 64 KiB filled the disk at first, now %d", first, written)
				}
				w.mustBe(t)
				w.whileFull(t)
				if round != 1 {
					w = w.again(t)
				}
				w.makeRoom(t, end)
			}
			if err := w.close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// fillDisk writes to the volume until the store takes no more, and takes a snapshot on the way, which keeps the data
// that is overwritten.
func (w *modelStore) fillDisk(t *testing.T) (writes int64) {
	if _, ok := w.m.now()["v"]; !ok {
		w.m.create("v", 4<<20, format.Raw)
		if _, err := w.s.CreateVolume("v", VolumeOptions{Size: 4 << 20}); w.event(err) != nil {
			t.Fatal(err)
		}
	}
	for ; ; writes++ {
		err := w.put("v", writes%60<<16, 64<<10)
		if errors.Is(err, ErrNoSpace) && errors.Is(err, syscall.ENOSPC) {
			break
		}
		if err != nil || writes > 1000 {
			t.Fatalf("write %d: %v", writes, err)
		}
		if writes == 20 { // from here on, overwriting what the snapshot holds frees nothing
			w.must(t, op{kind: "snapshot", b: 1})
		}
	}
	if seq := w.seq(); seq != w.m.next() {
		t.Fatalf("the log is at %d, the model at %d", seq, w.m.next())
	}
	return writes
}

// whileFull does operations that need almost no room.
func (w *modelStore) whileFull(t *testing.T) {
	for range 10 {
		for _, r := range [][2]string{{"v", "full"}, {"full", "v"}} {
			from, to := Ref{Volume: r[0]}, Ref{Volume: r[1]}
			w.m.rename(from, to)
			if err := w.event(w.s.Rename(from, to)); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.must(t, op{kind: "flush"}, op{kind: "read"}, op{kind: "checkpoint"})
}

// makeRoom gives back everything that filled the disk.
func (w *modelStore) makeRoom(t *testing.T, how string) {
	switch how {
	case "discard":
		d, err := w.device("v")
		if err != nil {
			t.Fatal(err)
		}
		w.m.discard("v", 0, d.Size())
		if err := d.Discard(0, d.Size()); err != nil {
			t.Fatal(err)
		}
	case "remove":
		w.must(t, op{kind: "remove"})
	}
	for len(w.m.now()["v"].snaps) > 0 {
		w.must(t, op{kind: "unsnap"})
	}
	w.must(t, op{kind: "reap"}, op{kind: "reap"})
	w.mustBe(t)
}

// TestTableThatDoesNotCommit makes commits of the table fail for lack of room. The store goes on, since the log has
// everything, and the next successful commit has it all.
func TestTableThatDoesNotCommit(t *testing.T) {
	w := newModelStore(t)
	script := faultScript(5)
	w.must(t, script[:len(script)/2]...)
	w.must(t, op{kind: "checkpoint"})
	w.s.cache.Restrict(0) // otherwise writers would wait for the failing commit, and get its error

	failed := 0
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		o := randomOp(rng)
		switch o.kind {
		case "check", "scrub", "reap", "checkpoint", "space", "churn", "cold":
			w.noRoom = true
			err := w.s.Checkpoint()
			w.noRoom = false
			if !errors.Is(err, ErrNoSpace) {
				t.Fatal(err)
			}
			failed++
		default:
			w.must(t, o)
		}
		if failed > 5 {
			break
		}
	}
	if failed == 0 {
		t.Error("every commit worked")
	}
	if err := same(w.s, w.m.now(), w.buf); err != nil {
		t.Fatal(err)
	}
	t.Run("killed", func(t *testing.T) { // with the table of the last good commit
		img := w.now("killed", w.injector.fs.Clone())
		if err := w.harness.verify(img, 0, rng); err != nil {
			t.Fatal(err)
		}
	})
	w.mustBe(t)
	w.must(t, script[len(script)/2:]...)
	w.mustBe(t)
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
}

// limitFileSize limits the size to which this process can write a file, until undo is called.
func limitFileSize(t *testing.T, size uint64) (undo func()) {
	t.Helper()
	signal.Ignore(syscall.SIGXFSZ) // so that a write fails with EFBIG instead: setrlimit(2)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	lower := syscall.Rlimit{Cur: size, Max: old.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &lower); err != nil {
		t.Fatal(err)
	}
	undo = func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(undo)
	return undo
}
