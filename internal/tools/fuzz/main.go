// Command fuzz runs the fuzz targets of the module, each for a time, and prints how many inputs they executed.
//
//	fuzz [-time 10m] [-targets REGEXP] [-first REGEXP] [-parallel N] [-out DIR]
//	fuzz -corpus [-tries N] [-targets REGEXP]
//
// The output of each target goes to a file in the folder DIR. A target that finds a failing input leaves the input in
// its package's testdata/fuzz, and the command fails. It also fails a target that hangs, with the stacks of its
// goroutines.
//
// With -corpus it fuzzes nothing, but chooses the inputs that are worth keeping: of those in testdata/fuzz and those
// that Go's cache has from earlier runs, the small ones that reach code that no other reaches.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the flags of a run.
type options struct {
	time     time.Duration
	parallel int
	out      string
}

func main() {
	var o options
	flag.DurationVar(&o.time, "time", 10*time.Minute, "how long each target runs")
	flag.IntVar(&o.parallel, "parallel", 2, "targets to run at once")
	flag.StringVar(&o.out, "out", "bin/fuzz", "the folder for the targets' output")
	names := flag.String("targets", "", "only targets whose name matches this regular expression")
	first := flag.String("first", "^$", "targets whose name matches this regular expression come first")
	corpus := flag.Bool("corpus", false, "choose the inputs that are kept in testdata/fuzz")
	tries := flag.Int("tries", 150, "how many inputs of each target to look at for that")
	flag.Parse()
	targets, err := find(*names, *first)
	switch {
	case err != nil:
	case *corpus:
		err = keep(targets, *tries)
	default:
		err = run(targets, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

// target is one fuzz target.
type target struct {
	pkg    string // import path
	module string // path of the module
	dir    string // folder of the package
	name   string
}

// folder returns the folder of the package within the module.
func (t target) folder() string { return strings.TrimPrefix(t.pkg, t.module+"/") }

func (t target) String() string { return "./" + t.folder() + " " + t.name }

var declaration = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)

// find lists the targets whose names match, those that match first at the beginning.
func find(names, first string) (ts []target, err error) {
	wanted, err := regexp.Compile(names)
	if err != nil {
		return nil, err
	}
	early, err := regexp.Compile(first)
	if err != nil {
		return nil, err
	}
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{.Module.Path}} {{.Dir}}", "./...").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		pkg, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		module, dir, _ := strings.Cut(rest, " ")
		files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			for _, m := range declaration.FindAllStringSubmatch(string(text), -1) {
				if wanted.MatchString(m[1]) {
					ts = append(ts, target{pkg, module, dir, m[1]})
				}
			}
		}
	}
	if len(ts) == 0 {
		return nil, errors.New("no target matches")
	}
	slices.SortStableFunc(ts, func(a, b target) int {
		x, y := early.MatchString(a.name), early.MatchString(b.name)
		switch {
		case x == y:
			return 0
		case x:
			return -1
		}
		return 1
	})
	return ts, nil
}

// run fuzzes the targets, so many at once.
func run(ts []target, o options) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	var mu sync.Mutex // guards what follows, and the output
	var total int64
	var bad []string
	var wg sync.WaitGroup
	next := make(chan target)
	for range max(o.parallel, 1) {
		wg.Go(func() {
			for t := range next {
				n, err := t.fuzz(o)
				mu.Lock()
				total += n
				if err != nil {
					bad = append(bad, t.name)
					fmt.Printf("FAILED  %v: %v\n", t, err)
				} else {
					fmt.Printf("ok      %v: %d executions\n", t, n)
				}
				mu.Unlock()
			}
		})
	}
	for _, t := range ts {
		next <- t
	}
	close(next)
	wg.Wait()
	fmt.Printf("fuzz: %d targets, %v each, %d executions, %d failed\n", len(ts), o.time, total, len(bad))
	if len(bad) > 0 {
		return fmt.Errorf("failed: %s", strings.Join(bad, ", "))
	}
	fmt.Printf("proof: fuzz targets: %d, none failed\n", len(ts))
	fmt.Printf("proof: fuzz executions: %d\n", total)
	return nil
}

const (
	// spare is how much longer than asked for a target may take: it is built, and minimises what it finds.
	spare = 5 * time.Minute
	// stacks is how long a target that hangs gets to print the stacks of its goroutines.
	stacks = 20 * time.Second
)

// fuzz runs one target, and returns the number of executions.
func (t target) fuzz(o options) (n int64, err error) {
	path := filepath.Join(o.out, strings.ReplaceAll(t.folder(), "/", ".")+"."+t.name+".out")
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), o.time+spare)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-fuzz", "^"+t.name+"$", "-fuzztime", o.time.String(),
		"-fuzzminimizetime", "50x", "-parallel", "1", t.pkg)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the target runs in processes of its own
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGQUIT) }
	cmd.WaitDelay = stacks
	err = cmd.Run()
	if ctx.Err() != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		err = fmt.Errorf("it hangs: its goroutines are in %s", path)
	}
	n, lines, rerr := readOutput(path)
	if rerr != nil {
		return n, rerr
	}
	if err == nil && n == 0 {
		err = errors.New("it executed nothing")
	}
	if err != nil && onlyTime(lines) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("%w (%s)\n%s", err, path, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
	return n, err
}

var executions = regexp.MustCompile(`^fuzz: elapsed: .*, execs: (\d+) `)

// readOutput returns the number of executions that a run reported last, and the lines that are not such reports.
func readOutput(path string) (n int64, lines []string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, nil, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<24)
	for s.Scan() {
		if m := executions.FindStringSubmatch(s.Text()); m != nil {
			if n, err = strconv.ParseInt(m[1], 10, 64); err != nil {
				return 0, nil, err
			}
			continue
		}
		lines = append(lines, s.Text())
	}
	return n, lines, s.Err()
}

// onlyTime reports whether a run failed for no other reason than that its time was over while a worker was at work,
// which Go reports as a failure at times: nothing but "context deadline exceeded", and no failing input.
func onlyTime(lines []string) bool {
	reasons := 0
	for _, l := range lines {
		switch l = strings.TrimSpace(l); {
		case l == "context deadline exceeded":
			reasons++
		case l == "", l == "FAIL", l == "exit status 1", strings.HasPrefix(l, "--- FAIL: Fuzz"), strings.HasPrefix(l, "FAIL\t"), strings.HasPrefix(l, "fuzz: "):
		default:
			return false
		}
	}
	return reasons == 1
}
