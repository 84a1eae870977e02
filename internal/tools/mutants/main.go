// Command mutants breaks the program on purpose, one line at a time, and reports which test notices.
//
//	mutants [-run REGEXP] [-package REGEXP] [-parallel N] FILE...
//
// A FILE is a list of mutants, blocks that a blank line separates:
//
//	name: the table is committed without a sync
//	file: metadata/db.go
//	- 			NoSync:          o.NoSync,
//	+ 			NoSync:          true,
//	test: ./cmd/vdisk TestOrderOfSystemCalls
//
// The lines after - must occur exactly once in the file; those after + take their place. The test is a package and,
// optionally, a pattern of tests; the command fails if it passes with the mutant. A line "env: VDISK_FAULTS=all" sets
// a variable for it, so that a test that otherwise takes a sample tries everything. A block that says
// "equivalent: WHY" is not run: no test can tell that mutant from the program.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

func main() {
	name := flag.String("run", "", "run only mutants whose name matches this regular expression")
	pkg := flag.String("package", "", "run only mutants whose test is in a package that matches this regular expression")
	parallel := flag.Int("parallel", 1, "mutants to try at once")
	limit := flag.Duration("timeout", 5*time.Minute, "limit for the tests of one mutant")
	flag.Parse()
	ms, err := choose(*name, *pkg, flag.Args())
	if err == nil {
		err = run(ms, *parallel, *limit)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// mutant is one change that a test must notice.
type mutant struct {
	name, file string
	old, new   []string
	pkg, test  string
	env        []string // variables for the test
	equivalent string   // why no test can notice it
}

// choose returns the mutants of the files whose names and packages match.
func choose(name, pkg string, files []string) (chosen []mutant, err error) {
	names, err := regexp.Compile(name)
	if err != nil {
		return nil, err
	}
	packages, err := regexp.Compile(pkg)
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		ms, err := read(file)
		if err != nil {
			return nil, err
		}
		for _, m := range ms {
			if names.MatchString(m.name) && packages.MatchString(m.pkg) {
				chosen = append(chosen, m)
			}
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("no mutant matches")
	}
	return chosen, nil
}

// run tries the mutants, so many at once, and prints what became of each.
func run(ms []mutant, parallel int, limit time.Duration) error {
	var mu sync.Mutex // guards the counts and the output
	var killed, equivalent int
	var bad []string
	try := func(m *mutant) {
		start := time.Now()
		by, err := m.try(limit)
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			bad = append(bad, m.name)
			fmt.Printf("FAILED      %s (%s): %v\n", m.name, m.file, err)
		case m.equivalent != "":
			equivalent++
			fmt.Printf("equivalent  %s: %s\n", m.name, m.equivalent)
		default:
			killed++
			fmt.Printf("killed      %s: by %s, %.0f s\n", m.name, by, time.Since(start).Seconds())
		}
	}
	var wg sync.WaitGroup
	next := make(chan *mutant)
	for range max(parallel, 1) {
		wg.Go(func() {
			for m := range next {
				try(m)
			}
		})
	}
	for i := range ms {
		next <- &ms[i]
	}
	close(next)
	wg.Wait()
	fmt.Printf("mutants: %d killed, %d equivalent, %d not\n", killed, equivalent, len(bad))
	if len(bad) > 0 {
		return fmt.Errorf("not killed: %s", strings.Join(bad, "; "))
	}
	fmt.Printf("proof: mutants: %d of %d killed, %d equivalent\n", killed, len(ms), equivalent)
	return nil
}

// read reads a list of mutants.
func read(path string) (ms []mutant, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for _, block := range strings.Split(string(text), "\n\n") {
		var m mutant
		for _, line := range strings.Split(block, "\n") {
			key, value, _ := strings.Cut(line, " ")
			switch key {
			case "name:":
				m.name = value
			case "file:":
				m.file = value
			case "-":
				m.old = append(m.old, value)
			case "+":
				m.new = append(m.new, value)
			case "test:":
				m.pkg, m.test, _ = strings.Cut(value, " ")
			case "env:":
				m.env = append(m.env, value)
			case "equivalent:":
				m.equivalent = value
			case "", "#":
			default:
				return nil, fmt.Errorf("%s: what is %q?", path, line)
			}
		}
		if m.name == "" {
			continue
		}
		if m.file == "" || len(m.old) == 0 || m.pkg == "" && m.equivalent == "" {
			return nil, fmt.Errorf("%s: mutant %q lacks a line", path, m.name)
		}
		ms = append(ms, m)
	}
	return ms, nil
}

var failedTest = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)

// try runs the test with the mutant in place of the file, and returns the tests that failed. It does nothing with a
// mutant that no test can notice, but to make sure that its lines are there.
func (m *mutant) try(limit time.Duration) (by string, err error) {
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(dir) }() // a leftover in the folder for temporary files
	overlay, err := m.overlay(dir)
	if err != nil || m.equivalent != "" {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit+time.Minute)
	defer cancel()
	args := []string{"test", "-count=1", "-short", "-vet=off", "-failfast", "-timeout", limit.String()}
	if m.test != "" {
		args = append(args, "-run", m.test)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, m.pkg)...)
	// By the environment, so that programs that a test builds are mutants, too.
	cmd.Env = append(append(os.Environ(), m.env...), "GOFLAGS=-overlay="+overlay)
	out, err := cmd.CombinedOutput()
	text := string(out)
	switch {
	case err == nil:
		return "", fmt.Errorf("%s %s passes", m.pkg, m.test)
	case strings.Contains(text, "[build failed]"), strings.Contains(text, "[setup failed]"):
		return "", fmt.Errorf("it does not build:\n%s", text)
	case strings.Contains(text, "panic: test timed out"), ctx.Err() != nil:
		return "", fmt.Errorf("only the time limit ended %s %s", m.pkg, m.test)
	}
	if f := failedTest.FindStringSubmatch(text); f != nil {
		return f[1], nil
	}
	if strings.Contains(text, "panic:") || strings.Contains(text, "fatal error:") {
		return "a panic", nil
	}
	return "", fmt.Errorf("%w without a failed test:\n%s", err, text)
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
