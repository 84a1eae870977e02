package cow

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/faulty"
	"github.com/vdisk/vdisk/internal/storage/crashfs"
	"github.com/vdisk/vdisk/metadata"
)

// late is a call that only takes its time.
var late = faulty.Kind{Name: "late", Fine: true}

// TestFaultAtEveryCall makes the engine's system calls fail, on real files and a real table, in a process that works by
// a script (TestFaultProgram). Each call in turn meets each kind of fault.
//
// It takes a sample, the same in each run. VDISK_FAULTS=n takes n faults, and VDISK_FAULTS=all takes all of them, which takes hours.
func TestFaultAtEveryCall(t *testing.T) {
	t.Parallel()
	root := memoryDir(t)
	least, scripts := 16, uint64(1)
	if testing.Short() {
		least = 8
	}
	sample := faultSample(t, least)
	if sample > least {
		scripts = 4
	}
	var jobs []func()
	var met atomic.Int64
	for seed := range scripts {
		var calls []faulty.Call
		out, err := faultProgram(filepath.Join(root, fmt.Sprint("clean", seed)), seed, func(c faulty.Call) faulty.Fault {
			calls = append(calls, c)
			return faulty.Fault{}
		})
		if err != nil || len(calls) < 100 {
			t.Fatalf("without a fault: %v, after %d calls: %s", err, len(calls), out)
		}
		for _, f := range append(slices.Clone(faulty.Kinds), late) {
			for n := 1; n <= len(calls); n++ {
				if f.Meets(calls[n-1].Name) {
					jobs = append(jobs, func() {
						dir := filepath.Join(root, fmt.Sprintf("%d-%d-%s", seed, n, f.Name))
						hit, err := meetCall(dir, seed, f, n)
						if err != nil {
							t.Errorf("script %d, %s at call %d of %d: %v", seed, f.Name, n, len(calls), err)
						}
						if hit {
							met.Add(1)
						}
						os.RemoveAll(dir)
					})
				}
			}
		}
	}
	all := len(jobs)
	sampling := rand.New(rand.NewPCG(1, 1)) // a sample that is the same in each run
	sampling.Shuffle(len(jobs), func(i, j int) { jobs[i], jobs[j] = jobs[j], jobs[i] })
	jobs = jobs[:min(len(jobs), sample)]
	var wg sync.WaitGroup
	var next atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(jobs)); i = next.Add(1) - 1 {
				jobs[i]()
			}
		})
	}
	wg.Wait()
	if !t.Failed() {
		t.Logf("proof: faults in the engine: %d, of %d that there are", met.Load(), all)
	}
}

// faultSample returns the number of faults to take, least by default.
func faultSample(t *testing.T, least int) int {
	switch v := os.Getenv("VDISK_FAULTS"); v {
	case "":
		return least
	case "all":
		return 1 << 30
	default:
		n, err := strconv.Atoi(v)
		must(t, err)
		return n
	}
}

// faultProgram runs TestFaultProgram, whose calls on the store in a folder meet the judge's faults while it wants that.
func faultProgram(dir string, seed uint64, judge faulty.Judge) (out string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	var b bytes.Buffer
	cmd := exec.Command(os.Args[0], "-test.run=^TestFaultProgram$", "-test.v", "-test.timeout=3m")
	cmd.Env = append(os.Environ(), faultDir+"="+dir, fmt.Sprintf("%s=%d", faultSeed, seed))
	cmd.Stdout, cmd.Stderr = &b, &b
	storm, store := false, filepath.Join(dir, "store")
	wait, err := faulty.Start(cmd, func(c faulty.Call) faulty.Fault {
		switch {
		case c.Path == filepath.Join(dir, "storm"):
			storm = true
		case c.Path == filepath.Join(dir, "calm"):
			storm = false
		case storm && (c.Path == store || strings.HasPrefix(c.Path, store+"/")):
			return judge(c)
		}
		return faulty.Fault{}
	})
	if err != nil {
		return "", err
	}
	err = wait()
	return b.String(), err
}

// meetCall runs the program with a fault, and looks at what it says.
func meetCall(dir string, seed uint64, f faulty.Kind, n int) (hit bool, err error) {
	var at faulty.Call
	seen := 0
	out, err := faultProgram(dir, seed, func(c faulty.Call) faulty.Fault {
		seen++
		if seen < n || at.Name != "" && !f.Ever || !f.Meets(c.Name) {
			return faulty.Fault{}
		}
		if at.Name == "" {
			at = c
		}
		if f.Name == late.Name {
			wait := make(chan struct{})
			time.AfterFunc(100*time.Millisecond, func() { close(wait) })
			return faulty.Fault{Wait: wait}
		}
		return f.Fault
	})
	where := fmt.Sprintf("%s %s", at.Name, strings.TrimPrefix(at.Path, dir))
	_, said, failed := strings.Cut(out, "failed: ")
	said, _, _ = strings.Cut(said, "\n")
	table := filepath.Base(at.Path) == tableFile
	switch {
	case err != nil:
		return true, fmt.Errorf("%s: %w\n%s", where, err, out)
	case !strings.Contains(out, "all is well"):
		return true, fmt.Errorf("%s: it has not done all: %s", where, out)
	case failed && at.Name == "":
		return false, fmt.Errorf("without a fault: %s", out)
	case failed && f.Fine && !(table && (at.Name == "sync" || at.Name == "lock")): // bbolt does not try again
		return true, fmt.Errorf("%s: it failed: %s", where, said)
	case failed && f.Fault.Err != 0 && !strings.Contains(said, f.Fault.Err.Error()):
		return true, fmt.Errorf("%s: it failed with another error: %s", where, said)
	case strings.Contains(out, ": stopped\n") && !f.Ever && !mayStop(at.Name):
		return true, fmt.Errorf("%s: the store has stopped: %s", where, said)
	}
	return at.Name != "", nil
}

// mayStop reports whether the store may stop after a call that failed: what the disk has is then not known.
func mayStop(call string) bool { return slices.Contains([]string{"write", "sync"}, call) }

const (
	faultDir  = "VDISK_FAULT_DIR"
	faultSeed = "VDISK_FAULT_SEED"
)

// TestFaultProgram is the program of TestFaultAtEveryCall. After an operation that failed, the store may stop or go on.
// It must then hold what it has acknowledged: while it is open, after a kill, and after Close. Close leaves no
// descriptor and no goroutine.
func TestFaultProgram(t *testing.T) {
	dir := os.Getenv(faultDir)
	if dir == "" {
		return // there is nothing to do by itself
	}
	seed, err := strconv.ParseUint(os.Getenv(faultSeed), 10, 64)
	must(t, err)
	p := &program{dir: dir, rng: rand.New(rand.NewPCG(seed, 9))}
	p.h = &crashHarness{root: dir}
	p.mood(t, "storm")
	p.mood(t, "calm")
	p.goroutines, p.descriptors = runtime.NumGoroutine(), descriptors(t)
	p.m, p.floor = newModel(1, state{}), 1
	p.mood(t, "storm")
	err = Create(p.store())
	p.failed(t, err)
	for part := 0; part < 3 && p.fault == nil; part++ {
		p.work(t, part)
	}
	p.mood(t, "calm")
	if p.fault != nil && p.m.next() == 1 {
		must(t, Create(p.store()))
	}
	p.verify(t, p.store(), true)
	p.verify(t, p.store(), false)
	t.Log("all is well")
}

// program is the state of TestFaultProgram.
type program struct {
	dir                     string
	h                       *crashHarness
	rng                     *rand.Rand
	m                       *model
	floor                   uint64 // number of the first record that may be lost
	names                   int
	writes                  uint64
	goroutines, descriptors int
	fault                   error
}

func (p *program) store() string { return filepath.Join(p.dir, "store") }

// mood tells the parent whether it may make calls fail.
func (p *program) mood(t *testing.T, which string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(p.dir, which), nil, 0o600))
}

// failed notes the first error.
func (p *program) failed(t *testing.T, err error) {
	if err != nil && p.fault == nil {
		t.Logf("failed: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		p.fault = err
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(fds)
}

// nothingLeft checks that a closed store has left no goroutine and no descriptor.
func (p *program) nothingLeft(t *testing.T, when string) {
	t.Helper()
	for tries := 0; runtime.NumGoroutine() > p.goroutines && tries < 100; tries++ {
		unix.Nanosleep(&unix.Timespec{Nsec: 2e6}, nil) // those that Close waited for may have some instructions left
	}
	if n := runtime.NumGoroutine(); n > p.goroutines {
		all := make([]byte, 1<<20)
		t.Fatalf("%s: %d goroutines, and there were %d: %s", when, n, p.goroutines, all[:runtime.Stack(all, true)])
	}
	if n := descriptors(t); n > p.descriptors {
		t.Fatalf("%s: %d descriptors, and there were %d", when, n, p.descriptors)
	}
}

// open opens a store with the program's model.
func (p *program) open(dir string) (*modelStore, error) {
	w := &modelStore{harness: p.h, dir: dir, m: p.m.fork(), devs: map[string]*Device{}, buf: make([]byte, 256<<10), names: p.names, writes: p.writes}
	w.injector = &crashInjector{every: never, floor: p.floor, rng: p.rng}
	o := p.h.options(nil)
	o.noTableSync = false
	o.onCommit = func(done bool) error {
		if w.meanwhile != nil {
			if err := w.meanwhile(); err != nil {
				return err
			}
		}
		if !done && w.noRoom {
			return ErrNoSpace
		}
		return nil
	}
	var err error
	if w.s, err = Open(dir, o); err != nil {
		return nil, err
	}
	w.s.cold.codec = quickCodec
	return w, nil
}

// work does a part of the script. The second part begins with a store that was killed, the third with one of an older
// version.
func (p *program) work(t *testing.T, part int) {
	w, err := p.open(p.store())
	if err != nil {
		p.failed(t, err)
		p.mood(t, "calm")
		p.nothingLeft(t, "after a failed Open")
		return
	}
	if part > 0 {
		p.match(t, w)
	}
	err = p.script(t, w, part)
	p.failed(t, err)
	stopped := w.s.wal.Err() != nil
	if err != nil || stopped {
		p.mood(t, "calm")
		if stopped {
			t.Log("stopped")
		} else {
			must(t, w.renewCopy())
		}
		if err := w.goOn(crashfs.OpSync, err); err != nil {
			t.Fatal("going on: ", err)
		}
	}
	p.end(t, w, part, stopped)
}

// renewCopy lets a check put a new copy of the table in the place of one that a fault has made unreadable. It is the only
// damage that a fault may leave in an open store.
func (w *modelStore) renewCopy() (err error) {
	_, cerr := w.s.Check(context.Background(), CheckOptions{}, func(p Problem) {
		if !strings.Contains(p.What, metadata.ErrBadCopy.Error()) || !strings.HasSuffix(p.What, "a new one has been made") {
			err = errors.Join(err, fmt.Errorf("check: %s: %s: %s", p.Kind, p.Where, p.What))
		}
	})
	return errors.Join(err, cerr)
}

// script does a part of the script until an operation fails.
func (p *program) script(t *testing.T, w *modelStore, part int) error {
	rng := rand.New(rand.NewPCG(p.rng.Uint64(), uint64(part)))
	kinds := []string{
		"create", "write", "snapshot", "write", "checkpoint", "churn", "churn", "clean", "clone", "write", "flush",
		"rollback", "resize", "cold", "unsnap", "discard", "reap", "zero", "check", "scrub", "rename", "churn", "beside", "clone", "flatten", "tag", "property", "tag", "remove", "hold", "cold", "drain",
	}
	if part > 0 {
		rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	}
	for _, kind := range kinds {
		o := op{kind, rng.Uint32(), rng.Uint32(), rng.Uint32()}
		before := w.m.fork()
		if err := w.operate(o); err != nil {
			w.settleModel(before)
			return fmt.Errorf("%v: %w", o, err)
		}
		if seq := w.seq(); seq != w.m.next() {
			t.Fatalf("%v: the log is at record %d, the model at %d", o, seq, w.m.next())
		}
	}
	return nil
}

// end lets the store be killed, or closes it, and keeps what it must hold.
func (p *program) end(t *testing.T, w *modelStore, part int, stopped bool) {
	err := w.letGo()
	for name := range w.devs {
		w.closeDevice(name)
	}
	p.failed(t, err)
	p.m, p.floor, p.names, p.writes = w.m, w.injector.floor, w.names, w.writes
	killed := filepath.Join(p.dir, "killed")
	p.mood(t, "calm")
	for { // a scrub in the background may be giving its file another name
		must(t, os.RemoveAll(killed))
		if err = os.CopyFS(killed, os.DirFS(p.store())); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	must(t, err)
	must(t, errors.Join(os.Chmod(killed, 0o700), os.Chmod(filepath.Join(killed, chunksDir), 0o700)))
	if p.fault == nil {
		p.mood(t, "storm")
	}
	err = w.s.Close()
	if stopped != errors.Is(err, ErrFailed) && p.fault != nil {
		t.Fatalf("close: %v; the store had stopped: %t", err, stopped)
	}
	p.failed(t, err)
	p.nothingLeft(t, "after Close")
	if p.fault != nil {
		p.mood(t, "calm")
		p.verify(t, killed, false)
		return
	}
	p.mood(t, "calm")
	defer p.mood(t, "storm")
	switch part {
	case 0: // go on with the killed one
		must(t, errors.Join(os.Rename(p.store(), p.store()+".closed"), os.Rename(killed, p.store())))
	case 1:
		makeOlder(t, p.store(), format.StoreVersion-1)
	}
}

// match checks that the store is after some record that a crash may have left, and gives the model that state.
func (p *program) match(t *testing.T, w *modelStore) {
	t.Helper()
	seq := w.seq()
	if seq < p.floor || seq > w.m.next() {
		t.Fatalf("the log goes on with record %d; %d to %d are possible", seq, p.floor, w.m.next())
	}
	w.m.truncate(seq)
	p.m, p.floor, w.injector.floor = w.m, seq, seq
}

// verify opens the store without faults, looks at everything, and goes on with it.
func (p *program) verify(t *testing.T, dir string, keep bool) {
	t.Helper()
	was, floor := p.m, p.floor
	p.names, p.writes = p.names+1000, p.writes+1<<30 // names and contents that nobody else has made
	w, err := p.open(dir)
	if err != nil {
		t.Fatalf("open %s: %v", filepath.Base(dir), err)
	}
	p.match(t, w)
	if err := errors.Join(w.same(true), w.do(op{kind: "create"}), w.do(op{kind: "write"}), w.same(true)); err != nil {
		t.Fatalf("%s: %v", filepath.Base(dir), err)
	}
	for name := range w.devs {
		w.closeDevice(name)
	}
	must(t, w.s.Close())
	p.nothingLeft(t, "after "+filepath.Base(dir))
	if p.m, p.floor = w.m, w.m.next(); !keep {
		p.m, p.floor = was, floor
	}
}
