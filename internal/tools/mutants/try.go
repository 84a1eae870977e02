package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// waited is said of a test that noticed a mutant because something that it waited for never came (package testwatch).
const waited = ", which waited in vain"

var failedTest = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)

// try runs the test with the mutant in place of the file, and returns the test that failed. It does nothing with a
// mutant that no test can notice, but to make sure that its lines are there.
func (m *mutant) try(ctx context.Context, limit time.Duration) (by string, err error) {
	dir, err := folder()
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }() // a leftover in the folder for temporary files
	overlay, err := m.overlay(dir)
	if err != nil || m.equivalent != "" {
		return "", err
	}
	text, err := goTest(ctx, dir, limit, m.pkg, m.test, overlay, m.env)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err == nil:
		return "", fmt.Errorf("%s %s passes", m.pkg, m.test)
	case strings.Contains(text, "[build failed]"), strings.Contains(text, "[setup failed]"):
		return "", fmt.Errorf("it does not build:\n%s", text)
	case strings.Contains(text, "panic: test timed out"), errors.Is(err, context.DeadlineExceeded):
		return "", fmt.Errorf("only the time limit ended %s %s", m.pkg, m.test)
	}
	if f := failedTest.FindStringSubmatch(text); f != nil {
		if by = f[1]; strings.Contains(text, ": hangs: ") {
			by += waited
		}
		return by, nil
	}
	if strings.Contains(text, "panic:") || strings.Contains(text, "fatal error:") {
		return "a panic", nil
	}
	return "", fmt.Errorf("%w without a failed test:\n%s", err, text)
}

// group is a package, with the variables for its tests.
type group struct{ pkg, env string }

func (m *mutant) group() group { return group{m.pkg, strings.Join(m.env, " ")} }

// testBase runs the tests of the mutants without a mutant, those of a package in one run, and returns the errors of the
// packages that fail. A test that fails there would seem to kill every mutant.
func testBase(ctx context.Context, ms []mutant) map[group]error {
	tests, failed := map[group][]string{}, map[group]error{}
	var groups []group // in the order of the lists
	for _, m := range ms {
		if m.equivalent != "" {
			continue
		}
		g := m.group()
		if tests[g] == nil {
			groups = append(groups, g)
		}
		if !slices.Contains(tests[g], m.test) {
			tests[g] = append(tests[g], m.test)
		}
	}
	for _, g := range groups {
		start := time.Now()
		pattern := strings.Join(tests[g], "|")
		if slices.Contains(tests[g], "") {
			pattern = "" // all
		}
		dir, err := folder()
		text := ""
		if err == nil {
			text, err = goTest(ctx, dir, time.Hour, g.pkg, pattern, "", strings.Fields(g.env))
			err = errors.Join(err, os.RemoveAll(dir))
		}
		if err != nil {
			failed[g] = fmt.Errorf("without a mutant, %s fails, too: %w", g.pkg, err)
			fmt.Printf("FAILED      %s without a mutant: %v\n%s\n", g.pkg, err, text)
			continue
		}
		fmt.Printf("passes      %s without a mutant, %.0f s\n", g.pkg, time.Since(start).Seconds())
	}
	return failed
}

// folder makes a folder for a run. Its name is short, for the sake of sockets, and tests may enter it as other users.
func folder() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "m"); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// goTest runs tests of a package and returns what they print. Whatever they do, it ends soon after the limit, and leaves
// no process and no file: dir is their folder for temporary files.
func goTest(ctx context.Context, dir string, limit time.Duration, pkg, test, overlay string, env []string) (string, error) {
	building := 5 * time.Minute // beside other work
	ctx, cancel := context.WithTimeout(ctx, limit+building)
	defer cancel()
	args := []string{"test", "-count=1", "-short", "-vet=off", "-failfast", "-timeout", limit.String()}
	if test != "" {
		args = append(args, "-run", test)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
	memory := filepath.Join("/dev/shm", "vdisk-"+filepath.Base(dir))
	_ = os.Mkdir(memory, 0o755) // without it, the tests put their stores in dir
	defer func() { _ = os.RemoveAll(memory) }()
	cmd.Env = append(append(os.Environ(), env...), "TMPDIR="+dir, "VDISK_TEST_MEMORY="+memory)
	if overlay != "" {
		// By the environment, so that programs that a test builds are mutants, too.
		cmd.Env = append(cmd.Env, "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
	}
	// A group of its own, since the tests and the programs that they start are children of go.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // a test that fails may leave a child
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return string(out), err
}

// overlay writes the mutant and the file for go's -overlay.
func (m *mutant) overlay(dir string) (path string, err error) {
	source, err := os.ReadFile(m.file)
	if err != nil {
		return "", err
	}
	old := strings.Join(m.old, "\n")
	if n := strings.Count(string(source), old); n != 1 {
		return "", fmt.Errorf("its lines occur %d times", n)
	}
	changed := filepath.Join(dir, "mutant.go")
	text := strings.Replace(string(source), old, strings.Join(m.new, "\n"), 1)
	if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
		return "", err
	}
	file, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	list, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, list, 0o600)
}
