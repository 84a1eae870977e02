package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
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

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/faulty"
	"github.com/vdisk/vdisk/internal/testwatch"
)

// commandCase is a command, and the commands that prepare its folder.
type commandCase struct {
	before []string
	args   string
	crash  bool // the store's last owner was killed
	old    bool // the store is of the version before
}

var commandCases = []commandCase{
	{nil, "create v --size 1M", false, false},
	{basic, "create w --size 1M", false, false},
	{basic, "create w --size 1M", true, false},
	{basic, "create w --size 1M", false, true},
	{basic, "import image j", false, false},
	{basic, "snapshot i@b", false, false},
	{basic, "clone i@a d", false, false},
	{basic, "rollback i@a", true, false},
	{basic, "rename i k", false, false},
	{basic, "resize i 3M", false, false},
	{basic, "resize i 512K --shrink", false, false},
	{basic, "rm i@a", false, false},
	{basic, "rm -r i", false, false},
	{basic, "gc", true, false},
	{basic, "check --read-data", false, false},
	{basic, "check", true, false},
	{basic, "export i@a out", false, false},
	{basic, "ls", true, false},
	{basic, "info", false, false},
}

var basic = []string{"create v --size 1M", "import image i", "snapshot i@a", "clone i@a c"}

// TestFaultInCommands makes whole commands meet faults: each call on a file in turn, by each kind of fault. A command
// must fail with the error, or do all that it is asked for. What was there before must be there, the store must be sound,
// and the command must do its work when it is given again.
//
// It takes a sample of the faults, of a few commands, the same in each run. VDISK_FAULTS=n takes n faults of all
// commands, and VDISK_FAULTS=all takes all of them.
func TestFaultInCommands(t *testing.T) {
	h := newCommandHarness(t)
	var jobs []func()
	sampling := rand.New(rand.NewPCG(1, 1)) // a sample that is the same in each run
	cases, sample := sampleFaults(sampling)
	for _, c := range cases {
		s := h.prepare(t, c)
		for _, f := range faulty.Kinds {
			for n := 1; n <= len(s.calls)+2; n++ {
				if n > len(s.calls) || f.Meets(s.calls[n-1].Name) {
					jobs = append(jobs, func() { h.meet(t, s, f, n) })
				}
			}
		}
	}
	all := len(jobs)
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
		t.Logf("proof: faults in whole commands: %d, of %d that there are", h.met.Load(), all)
	}
}

type commandHarness struct {
	bin  string
	root string // in memory, if there is such a folder
	made atomic.Int64
	met  atomic.Int64
}

// sampleFaults returns the commands, and the number of their faults, of this run.
func sampleFaults(sampling *rand.Rand) (cases []commandCase, faults int) {
	cases = slices.Clone(commandCases)
	switch n := os.Getenv("VDISK_FAULTS"); {
	case n == "all":
		return cases, math.MaxInt
	case n != "":
		faults, _ = strconv.Atoi(n)
		return cases, faults
	}
	sampling.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
	if testing.Short() {
		return cases[:2], 10
	}
	return cases[:6], 50
}

func newCommandHarness(t *testing.T) *commandHarness {
	h := &commandHarness{bin: filepath.Join(t.TempDir(), "vdisk")}
	if out, err := exec.Command("go", "build", "-o", h.bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var err error
	if h.root, err = os.MkdirTemp(testwatch.Memory(), "vdisk-fault-"); err != nil {
		h.root = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(h.root) })
	return h
}

// prepared is a folder with a store before a command, and what is there after it.
type prepared struct {
	commandCase
	dir           string
	calls         []faulty.Call
	before, after string
}

func (h *commandHarness) prepare(t *testing.T, c commandCase) *prepared {
	t.Helper()
	dir := filepath.Join(h.root, fmt.Sprint("template", h.made.Add(1)))
	s := &prepared{commandCase: c, dir: dir}
	image := make([]byte, 1<<20)
	for i := range image {
		image[i] = byte(i >> 8 * i >> 3)
	}
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "image"), image, 0o600))
	for _, args := range c.before {
		if text, err := h.command(dir, args).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", args, err, text)
		}
	}
	if c.crash {
		must(t, h.crash(dir))
	}
	if path := filepath.Join(dir, "store", "format"); c.old {
		text, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, bytes.Replace(text, fmt.Appendf(nil, `"version":%d`, format.StoreVersion),
			fmt.Appendf(nil, `"version":%d`, format.StoreVersion-1), 1), 0o600))
	}
	var err error
	work := h.copy(dir)
	if len(c.before) > 0 {
		s.before, err = state(work)
		must(t, err)
		work = h.copy(dir)
	}
	text, err := h.run(work, c.args, func(call faulty.Call) faulty.Fault {
		if inside(call, work) {
			s.calls = append(s.calls, call)
		}
		return faulty.Fault{}
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", c.args, err, text)
	}
	s.after, err = state(work)
	must(t, err)
	if len(s.calls) < 10 {
		t.Fatalf("%s makes the calls %v", c.args, s.calls)
	}
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func inside(c faulty.Call, dir string) bool {
	return c.Path == dir || strings.HasPrefix(c.Path, dir+"/")
}

// command is a command with its store and files in a folder, and with small chunks.
func (h *commandHarness) command(dir, args string) *exec.Cmd {
	cmd := exec.Command(h.bin, strings.Fields(args)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "VDISK_STORE="+filepath.Join(dir, "store"), "VDISK_MAX_SIZE=64M")
	return cmd
}

// crash lets the store's last owner be killed: it has flushed, but made no checkpoint.
func (h *commandHarness) crash(dir string) error {
	store := filepath.Join(dir, "store")
	s, err := cow.Open(store, quiet)
	if err != nil {
		return err
	}
	d, err := s.OpenDevice(cow.Ref{Volume: "v"}, false)
	if err != nil {
		return err
	}
	p := make([]byte, 64<<10)
	for i := range int64(16) {
		for j := range p {
			p[j] = byte(rand.Uint32())
		}
		if _, err := d.WriteAt(p, i*int64(len(p))); err != nil {
			return err
		}
	}
	if err := d.Flush(); err != nil {
		return err
	}
	killed := h.copy(dir)
	return errors.Join(d.Close(), s.Close(), os.RemoveAll(dir), os.Rename(killed, dir))
}

// copy returns a new folder with the same files. They have holes where there are zeros.
func (h *commandHarness) copy(dir string) string {
	to := filepath.Join(h.root, fmt.Sprint(h.made.Add(1)))
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		name := to + strings.TrimPrefix(path, dir)
		switch {
		case err != nil:
			return err
		case e.IsDir():
			return os.Mkdir(name, 0o700)
		case !e.Type().IsRegular():
			return nil
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(int64(len(p)))
		for off := 0; off < len(p); off += 64 << 10 {
			if part := p[off:min(len(p), off+64<<10)]; !format.IsZero(part) {
				_, werr := f.WriteAt(part, int64(off))
				err = errors.Join(err, werr)
			}
		}
		return errors.Join(err, f.Close())
	})
	if err != nil {
		panic(err)
	}
	return to
}

// run runs a command with faults.
func (h *commandHarness) run(dir, args string, judge faulty.Judge) (text string, err error) {
	var out bytes.Buffer
	cmd := h.command(dir, args)
	cmd.Stdout, cmd.Stderr = &out, &out
	wait, err := faulty.Start(cmd, judge)
	if err != nil {
		return "", err
	}
	err = wait()
	return out.String(), err
}

// state opens the store, checks it with all data, and describes all that it has, and the file that was exported.
func state(dir string) (text string, err error) {
	s, err := cow.Open(filepath.Join(dir, "store"), quiet)
	if errors.Is(err, cow.ErrNotFound) {
		return "no store", nil
	}
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	var problems []error
	_, err = s.Check(context.Background(), cow.CheckOptions{ReadData: true}, func(p cow.Problem) {
		problems = append(problems, fmt.Errorf("check: %s: %s: %s", p.Kind, p.Where, p.What))
	})
	if err := errors.Join(append(problems, err)...); err != nil {
		return "", err
	}
	var lines []string
	add := func(r cow.Ref) error {
		d, err := s.OpenDevice(r, true)
		if err != nil {
			return err
		}
		defer d.Close()
		sum := sha256.New()
		if _, err := io.Copy(sum, io.NewSectionReader(d, 0, d.Size())); err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%v: %d bytes, %x", r, d.Size(), sum.Sum(nil)[:8]))
		return nil
	}
	for _, v := range s.Volumes() {
		if strings.HasSuffix(v.Name, ".importing") { // an import that did not end
			continue
		}
		err = errors.Join(err, add(cow.Ref{Volume: v.Name}))
		for _, sn := range v.Snapshots {
			err = errors.Join(err, add(cow.Ref{Volume: v.Name, Snapshot: sn.Name}))
		}
	}
	if p, rerr := os.ReadFile(filepath.Join(dir, "out")); rerr == nil {
		lines = append(lines, fmt.Sprintf("out: %x", sha256.Sum256(p)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), err
}

// meet runs a command that meets a fault at its nth call.
func (h *commandHarness) meet(t *testing.T, s *prepared, f faulty.Kind, n int) {
	dir := h.copy(s.dir)
	defer os.RemoveAll(dir)
	var at faulty.Call
	seen := 0
	text, err := h.run(dir, s.args, func(c faulty.Call) faulty.Fault {
		if !inside(c, dir) {
			return faulty.Fault{}
		}
		seen++
		if seen < n || at.Name != "" && !f.Ever || !f.Meets(c.Name) {
			return faulty.Fault{}
		}
		if at.Name == "" {
			at = c
		}
		return f.Fault
	})
	if at.Name != "" {
		h.met.Add(1)
	}
	if err := h.judge(s, f, dir, text, at, err); err != nil {
		t.Errorf("%s (crashed: %t, old: %t), %s at call %d of %d, %v: %v\nits output: %s",
			s.args, s.crash, s.old, f.Name, n, len(s.calls), strings.Replace(at.String(), dir, "", 1), err, text)
	}
}

// judge looks at how a command ended, and at what it left.
func (h *commandHarness) judge(s *prepared, f faulty.Kind, dir, text string, at faulty.Call, err error) error {
	met := at.Name != ""
	data := f.Ever || strings.HasPrefix(at.Path, filepath.Join(dir, "store", "chunks")) || strings.HasPrefix(at.Path, filepath.Join(dir, "store", "meta.copy"))
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return err
	}
	switch {
	case err == nil:
	case exit.ExitCode() < 0 || strings.Contains(text, "panic") || strings.Contains(text, "goroutine "):
		return fmt.Errorf("it died: %w", err)
	case !met:
		return fmt.Errorf("it failed: %w", err)
	case f.Fine:
		// bbolt takes an interrupted sync for a failed one, which is final, and an interrupted unlocking too.
		if table := at.Path == filepath.Join(dir, "store", "meta.db"); !table || at.Name != "sync" && at.Name != "lock" {
			return fmt.Errorf("it failed: %w", err)
		}
	case !strings.Contains(text, f.Fault.Err.Error()):
		return fmt.Errorf("it failed with another error: %w", err)
	case f.Fault.Err == unix.ENOSPC && exit.ExitCode() != exitNoSpace, f.Fault.Err == unix.EIO && exit.ExitCode() != exitFailed && (exit.ExitCode() != exitCorrupt || !data): // an unreadable chunk or copy of the table is damage to it
		return fmt.Errorf("a wrong code: %w", err)
	}
	now, serr := state(dir)
	if serr != nil {
		return fmt.Errorf("afterwards (%v): %w", err, serr)
	}
	if now != s.after && (err == nil || now != s.before && !(s.before == "" && now == "no store" || now == "")) {
		return fmt.Errorf("%v; then the store has\n%s\nbefore it had\n%s", err, now, s.before)
	}
	if err == nil || now == s.after && s.after != s.before {
		return nil
	}
	again, err := h.command(dir, s.args).CombinedOutput()
	if strings.Contains(string(again), "vdisk rm j.importing") { // the disk went away before the import was noted
		if text, err := h.command(dir, "rm j.importing").CombinedOutput(); err != nil {
			return fmt.Errorf("after %s: %w: %s", again, err, text)
		}
		again, err = h.command(dir, s.args).CombinedOutput()
	}
	if err != nil {
		return fmt.Errorf("given again: %w: %s", err, again)
	}
	if now, err = state(dir); err != nil || now != s.after {
		return fmt.Errorf("given again: %w\n%s", err, now)
	}
	return nil
}

// quiet are options for a store of small chunks, as that of the commands is.
var quiet = cow.Options{MaxBytes: cow.MinMaxBytes, Logger: slog.New(slog.DiscardHandler)}
