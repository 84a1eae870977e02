package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/internal/guest"
)

func TestQuote(t *testing.T) {
	args := []string{"a b", "it's", "$HOME", "", "*", "new\nline"}
	out, err := exec.Command("sh", "-c", strings.Replace(quote(append([]string{"printf", `%s\0`}, args...)), "exec ", "", 1)).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"); !slices.Equal(got, args) {
		t.Errorf("got %q, want %q", got, args)
	}
}

func TestRunFlags(t *testing.T) {
	a := &app{stderr: &bytes.Buffer{}}
	fs, r := a.runFlags("run")
	err := fs.Parse([]string{"-kernel", "newest", "-memory", "512", "-bin", "a/vdisk", "-bin", "b.test", "-file", "/etc/x=y/z", "-results", "out", "--", "sh", "-c", "x"})
	if err != nil {
		t.Fatal(err)
	}
	if r.Kernel != "newest" || r.Memory != 512 || r.Results != "out" || !slices.Equal(fs.Args(), []string{"sh", "-c", "x"}) {
		t.Errorf("got %+v, arguments %q", r, fs.Args())
	}
	want := map[string]string{"bin/vdisk": "a/vdisk", "bin/b.test": "b.test", "/etc/x": "y/z"}
	if fmt.Sprint(r.Files) != fmt.Sprint(want) {
		t.Errorf("files %v, want %v", r.Files, want)
	}
	for _, bad := range []string{"x", "=x", "x="} {
		fs, _ := a.runFlags("run")
		if err := fs.Parse([]string{"-file", bad}); err == nil {
			t.Errorf("-file %s was accepted", bad)
		}
	}
}

func TestWrongUse(t *testing.T) {
	for _, args := range [][]string{nil, {"fly"}, {"run"}, {"run", "-no-such"}, {"test", "-kernel", "oldest"}, {"kernel"}, {"kernel", "oldest"}, {"package"}} {
		var stdout, stderr bytes.Buffer
		if code := run(t.Context(), args, &stdout, &stderr); code != exitFailed || stderr.Len() == 0 {
			t.Errorf("%q: exit status %d, said %q", args, code, stderr.String())
		}
	}
}

func TestExitCode(t *testing.T) {
	for err, want := range map[error]int{guest.ErrUnavailable: 77, guest.ErrTimeout: 124, guest.ErrPanic: 125, guest.ErrBoot: 125} {
		if got := exitCode(fmt.Errorf("run: %w: reason", err)); got != want {
			t.Errorf("%v: exit status %d, want %d", err, got, want)
		}
	}
}

// The script is the guest's, so it writes to /results; here that is a folder of the test.
func TestSuite(t *testing.T) {
	results := t.TempDir()
	s := &suite{env: []string{"LONG=it's 3"}, steps: []step{{"good", `cd / && [ "$LONG" = "it's 3" ]`}, {"it's bad", "exit 3"}, {"last", "cd " + results}}}
	script := strings.ReplaceAll(s.script(), "/results", results)
	out, err := exec.Command("bash", "-c", script).CombinedOutput()
	if code := err.(*exec.ExitError).ExitCode(); code != 1 {
		t.Errorf("exit status %d, want 1", code)
	}
	for _, want := range []string{"=== guest: good\n", "--- guest: good ok", "--- guest: it's bad FAIL (exit status 3)", "--- guest: last ok"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	steps, err := exec.Command("cat", results+"/"+stepsFile).Output()
	if err != nil {
		t.Fatal(err)
	}
	passed, failed := s.judge(string(steps))
	if passed != 2 || !slices.Equal(failed, []string{"it's bad"}) {
		t.Errorf("%d passed, failed %q", passed, failed)
	}
	if passed, failed := s.judge("0 0\n1 0\n"); passed != 2 || !slices.Equal(failed, []string{"last"}) {
		t.Errorf("a guest that died in the last step: %d passed, failed %q", passed, failed)
	}
}

func TestAddPackage(t *testing.T) {
	s := &suite{files: map[string]string{}}
	s.addPackage(goPackage{ImportPath: "example.org/m/p", Dir: t.TempDir()}, "/tmp/1.test", &testOptions{pattern: "Test(A|B)", timeout: time.Minute, short: true})
	if s.files["src/example.org/m/p/package.test"] != "/tmp/1.test" {
		t.Errorf("files %v", s.files)
	}
	want := `cd /payload/'src/example.org/m/p' && ./package.test -test.v -test.timeout=1m0s -test.short -test.run='Test(A|B)'`
	if s.steps[0].command != want {
		t.Errorf("got %s, want %s", s.steps[0].command, want)
	}
}
