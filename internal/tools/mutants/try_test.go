package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// module makes a module with a function and tests of it the working directory.
func module(t *testing.T) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"go.mod": "module m\n",
		"m.go":   "package m\n\nfunc Add(a, b int) int { return a + b }\n",
		"m_test.go": `package m

import (
	"os"
	"os/exec"
	"testing"
)

func TestAdd(t *testing.T) {
	if Add(1, 2) != 3 {
		t.Error("wrong")
	}
}

func TestNothing(t *testing.T) {}

// A child keeps the output open. Only a kill ends it.
func TestHangs(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if Add(1, 2) != 3 {
		select {}
	}
}
`,
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTry: a mutant is killed by a test that fails, and not by one that passes, does not build, or takes too long. A
// test that leaves a child is waited for no longer than its limit.
func TestTry(t *testing.T) {
	module(t)
	wrong := mutant{name: "wrong", file: "m.go", old: []string{"a + b"}, new: []string{"a - b"}, pkg: "."}
	for _, c := range []struct{ test, by, err string }{
		{"TestAdd", "TestAdd", ""},
		{"TestNothing", "", "passes"},
		{"TestHangs", "", "time limit"},
	} {
		wrong.test = c.test
		by, err := wrong.try(t.Context(), time.Second)
		if by != c.by || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", c.test, by, err)
		}
	}
	wrong.new = []string{"a -"}
	if _, err := wrong.try(t.Context(), time.Second); err == nil || !strings.Contains(err.Error(), "does not build") {
		t.Error("it does not build: ", err)
	}
	ms := []mutant{{pkg: ".", test: "TestAdd"}, {pkg: "./none", test: "TestNothing"}}
	if failed := testBase(t.Context(), ms); failed[ms[0].group()] != nil || failed[ms[1].group()] == nil {
		t.Error("without a mutant: ", failed)
	}
}

// TestResults: what was killed is not tried again, until something of it changes. A line that was cut does not count.
func TestResults(t *testing.T) {
	module(t)
	m := mutant{name: "wrong", file: "m.go", old: []string{"a + b"}, new: []string{"a - b"}, pkg: ".", test: "TestAdd"}
	file := filepath.Join("bin", "results")
	known := func() bool {
		t.Helper()
		r, err := openResults(file)
		if err != nil {
			t.Fatal(err)
		}
		defer r.close()
		_, ok := r.has(&m)
		return ok
	}
	note := func() {
		t.Helper()
		r, err := openResults(file)
		if err == nil {
			err = r.add(&m, "TestAdd")
			r.close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if known() {
		t.Error("an empty file has a result")
	}
	note()
	if !known() {
		t.Error("a result is not found again")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text[:len(text)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if known() {
		t.Error("half a line counts")
	}
	if note(); !known() {
		t.Error("a result behind half a line is not found")
	}
	for _, name := range []string{m.file, "m_test.go"} {
		if note(); !known() {
			t.Error("a result is not found again")
		}
		old, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, append(old, '\n'), 0o600); err != nil {
			t.Fatal(err)
		}
		if known() {
			t.Errorf("a result counts although %s has changed", name)
		}
	}
}
