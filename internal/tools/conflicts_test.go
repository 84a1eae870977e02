package tools

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestConflictMarkers refuses files in which a merge has left its marks.
func TestConflictMarkers(t *testing.T) {
	if line, is := conflictMark([]byte("a\n<<<<<<< HEAD\nb\n")); !is || line != 2 {
		t.Fatalf("line %d, %t", line, is)
	}
	list := exec.Command("git", "ls-files", "-z")
	list.Dir = "../.."
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimRight(string(out), "\x00"), "\x00")
	if len(names) < 100 {
		t.Fatalf("%d files", len(names))
	}
	for _, name := range names {
		p, err := os.ReadFile("../../" + name)
		if os.IsNotExist(err) {
			continue // removed, and not committed yet
		}
		if err != nil {
			t.Error(err)
		}
		if line, is := conflictMark(p); is {
			t.Errorf("%s:%d has a mark of a merge", name, line)
		}
	}
}

// conflictMark returns the line of the first mark.
func conflictMark(p []byte) (line int, is bool) {
	s := bufio.NewScanner(bytes.NewReader(p))
	for s.Buffer(nil, len(p)+1); s.Scan(); {
		if line++; bytes.HasPrefix(s.Bytes(), []byte("<<<<<<< ")) || bytes.HasPrefix(s.Bytes(), []byte(">>>>>>> ")) {
			return line, true
		}
	}
	return 0, false
}
