package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vdisk/vdisk/internal/guest"
)

// step is one command of a test run in the guest.
type step struct {
	name    string
	command string // shell
}

// suite has the files, steps and environment of guest test.
type suite struct {
	files map[string]string // as guest.Run's
	steps []step
	env   []string // NAME=VALUE
}

func (a *app) testFlags() (fs *flag.FlagSet, o *testOptions) {
	fs, o = a.flags("test"), &testOptions{}
	fs.StringVar(&o.kernel, "kernel", "all", "`name` of the kernel: stable, newest or all")
	fs.StringVar(&o.pattern, "run", "", "`regexp` of the tests to run")
	fs.StringVar(&o.scripts, "scripts", "testdata/guest/*.sh", "`glob` of the scripts to run")
	fs.DurationVar(&o.timeout, "timeout", 15*time.Minute, "deadline for each kernel")
	fs.BoolVar(&o.short, "short", false, "run the tests with -short")
	fs.IntVar(&o.memory, "memory", 4096, "memory in `MiB`")
	fs.Func("env", "`NAME=VALUE` for the environment of the tests (repeatable)", func(v string) error {
		if name, _, ok := strings.Cut(v, "="); !ok || strings.ContainsAny(name, " '") || name == "" {
			return fmt.Errorf("want NAME=VALUE, got %q", v)
		}
		o.env = append(o.env, v)
		return nil
	})
	fs.StringVar(&o.results, "results", "", "copy the content of /results to this host `folder`, in a folder for each kernel")
	return fs, o
}

type testOptions struct {
	kernel, pattern, scripts, results string
	env                               []string
	timeout                           time.Duration
	short                             bool
	memory                            int
}

// kernels returns the names for Build; nil means all.
func (o *testOptions) kernels() []string {
	if o.kernel == "all" {
		return nil
	}
	return []string{o.kernel}
}

func (a *app) test(ctx context.Context, args []string) (int, error) {
	fs, o := a.testFlags()
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	img, err := a.image(ctx, false, o.kernels()...)
	if err != nil {
		return 0, err
	}
	work, err := os.MkdirTemp("", "vdisk-guest-test-")
	if err != nil {
		return 0, fmt.Errorf("test: %w", err)
	}
	defer os.RemoveAll(work)
	s, err := a.gather(ctx, work, fs.Args(), o)
	if err != nil {
		return 0, fmt.Errorf("test: %w", err)
	}
	if len(s.steps) == 0 {
		return 0, errors.New("test: nothing to run: neither packages with tests nor scripts")
	}
	passed, failed := 0, 0
	for _, k := range img.Kernels() {
		good, bad := a.testKernel(ctx, img, k, s, o, filepath.Join(work, "results-"+k.Name))
		passed, failed = passed+good, failed+len(bad)
		fmt.Fprintf(a.stdout, "guest test: %s (%s): %d passed, %d failed%s\n", k.Name, k.Release, good, len(bad), list(bad))
		if ctx.Err() != nil {
			return 0, fmt.Errorf("test: %w", ctx.Err())
		}
	}
	fmt.Fprintf(a.stdout, "guest: %d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return 1, nil
	}
	return 0, nil
}

func list(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return ": " + strings.Join(names, ", ")
}

// testKernel runs the suite under one kernel. It returns the number of steps that passed, and the names of the others.
func (a *app) testKernel(ctx context.Context, img *guest.Image, k guest.Kernel, s *suite, o *testOptions, results string) (passed int, failed []string) {
	fmt.Fprintf(a.stdout, "guest test: booting %s (%s)\n", k.Name, k.Release)
	if o.results != "" {
		results = filepath.Join(o.results, k.Name)
	}
	os.Remove(filepath.Join(results, stepsFile)) // of an earlier run into the same folder
	res, err := img.Run(ctx, guest.Run{
		Kernel: k.Name, Files: s.files, Script: s.script(), Memory: o.memory,
		Timeout: o.timeout, Results: results, Stdout: a.stdout,
	})
	if err != nil {
		fmt.Fprintln(a.stderr, "guest:", strings.TrimPrefix(err.Error(), "guest: "))
	}
	if res != nil && err == nil {
		a.report(res)
	}
	text, _ := os.ReadFile(filepath.Join(results, stepsFile)) // not there when the guest died early
	passed, failed = s.judge(string(text))
	if err != nil {
		failed = append(failed, "the run itself")
	}
	if res != nil {
		for _, alert := range res.Alerts {
			if alert.Fatal {
				failed = append(failed, "the kernel's log")
				break
			}
		}
	}
	return passed, failed
}

// stepsFile is the file in which the guest records the end of each step: its number and its exit status.
const stepsFile = "guest-test.steps"

// script runs the steps one after another, whatever their outcome.
func (s *suite) script() string {
	var b strings.Builder
	b.WriteString("bad=0\n")
	for _, v := range s.env {
		fmt.Fprintf(&b, "export %s\n", quoteOne(v))
	}
	for i, st := range s.steps {
		fmt.Fprintf(&b, `echo "=== guest: "%[2]s
SECONDS=0
( %[3]s ); code=$?
[ $code = 0 ] && word=ok || { word="FAIL (exit status $code)"; bad=1; }
echo "--- guest: "%[2]s" $word ${SECONDS}s"
echo "%[1]d $code" >>/results/%[4]s; sync -f /results
`, i, quoteOne(st.name), st.command, stepsFile)
	}
	b.WriteString("exit $bad\n")
	return b.String()
}

// judge evaluates a steps file. A step that is missing in it did not end.
func (s *suite) judge(steps string) (passed int, failed []string) {
	ok := map[int]bool{}
	for line := range strings.Lines(steps) {
		n, code, _ := strings.Cut(strings.TrimSpace(line), " ")
		if i, err := strconv.Atoi(n); err == nil && code == "0" {
			ok[i] = true
		}
	}
	for i, st := range s.steps {
		if ok[i] {
			passed++
		} else {
			failed = append(failed, st.name)
		}
	}
	return passed, failed
}

// goPackage has the fields of go list -json that are used.
type goPackage struct {
	ImportPath, Dir           string
	TestGoFiles, XTestGoFiles []string
}

// gather compiles and lists the files for the guest.
func (a *app) gather(ctx context.Context, work string, patterns []string, o *testOptions) (*suite, error) {
	s := &suite{files: map[string]string{}, env: o.env}
	if main, _ := filepath.Glob("cmd/vdisk/*.go"); len(main) > 0 {
		if err := a.compile(ctx, "build", filepath.Join(work, "vdisk"), "./cmd/vdisk"); err != nil {
			return nil, err
		}
		s.files["bin/vdisk"] = filepath.Join(work, "vdisk")
	}
	packages, err := listPackages(ctx, patterns)
	if err != nil {
		return nil, err
	}
	for i, p := range packages {
		if len(p.TestGoFiles)+len(p.XTestGoFiles) == 0 {
			continue
		}
		binary := filepath.Join(work, fmt.Sprintf("%d.test", i))
		if err := a.compile(ctx, "test", binary, p.ImportPath); err != nil {
			return nil, err
		}
		s.addPackage(p, binary, o)
	}
	scripts, err := filepath.Glob(o.scripts)
	if err != nil {
		return nil, fmt.Errorf("-scripts: %w", err)
	}
	for _, file := range scripts {
		to := path.Join("scripts", filepath.Base(file))
		s.files[to] = file
		s.steps = append(s.steps, step{filepath.Base(file), "cd /tmp && bash /payload/" + quoteOne(to)})
	}
	return s, nil
}

// addPackage adds a step that runs a test binary in a folder with its package's testdata.
func (s *suite) addPackage(p goPackage, binary string, o *testOptions) {
	dir := path.Join("src", p.ImportPath)
	s.files[path.Join(dir, "package.test")] = binary
	if data := filepath.Join(p.Dir, "testdata"); isDir(data) {
		s.files[path.Join(dir, "testdata")] = data
	}
	command := fmt.Sprintf("cd /payload/%s && ./package.test -test.v -test.timeout=%s", quoteOne(dir), o.timeout)
	if o.short {
		command += " -test.short"
	}
	if o.pattern != "" {
		command += " -test.run=" + quoteOne(o.pattern)
	}
	s.steps = append(s.steps, step{p.ImportPath, command})
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func listPackages(ctx context.Context, patterns []string) ([]goPackage, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	cmd := exec.CommandContext(ctx, "go", append([]string{"list", "-json=ImportPath,Dir,TestGoFiles,XTestGoFiles"}, patterns...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var packages []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		packages = append(packages, p)
	}
}

// compile makes a static program, because the guest has other libraries than the host.
func (a *app) compile(ctx context.Context, what, to, pkg string) error {
	args := []string{"build", "-o", to, pkg}
	if what == "test" {
		args = []string{"test", "-c", "-o", to, pkg}
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	cmd.Stdout, cmd.Stderr = a.stderr, a.stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("compiling %s: %w", pkg, err)
	}
	return nil
}
