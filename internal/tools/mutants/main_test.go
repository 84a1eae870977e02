package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestLists holds each mutant in the lists to have a place in the program. The short form in make test runs some of
// them only.
func TestLists(t *testing.T) {
	t.Chdir("../../..")
	lists, err := filepath.Glob("testdata/mutants/*.txt")
	if err != nil || len(lists) == 0 {
		t.Fatal("no lists: ", err)
	}
	ms, err := choose(options{}, lists)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, m := range ms {
		if names[m.name] {
			t.Errorf("two mutants have the name %q", m.name)
		}
		names[m.name] = true
		if _, err := m.overlay(t.TempDir()); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
		if m.pkg == "" {
			continue
		}
		if _, err := os.Stat(m.pkg); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}
