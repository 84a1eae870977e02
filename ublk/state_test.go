package ublk

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// TestTransitions: a device makes only the transitions of the table.
func TestTransitions(t *testing.T) {
	steps := 0
	for from := StateStarting; from <= StateQuiesced; from++ {
		for to := StateStarting; to <= StateQuiesced; to++ {
			d := &Device{state: from}
			allowed := false
			for _, s := range transitions[from] {
				allowed = allowed || s == to
			}
			if moved := d.moveLocked(to); moved != allowed || moved && d.state != to || !moved && d.state != from {
				t.Errorf("%v to %v: moved %v, now %v", from, to, moved, d.state)
			}
			if allowed {
				steps++
			}
		}
		if ends := len(transitions[from]) == 0; ends != from.ended() {
			t.Errorf("%v is an end: %v", from, ends)
		}
		// Every state that is not an end has a transition to one, so nothing waits for ever.
		if !from.ended() {
			found := false
			for _, s := range transitions[from] {
				found = found || s.ended()
			}
			if !found {
				t.Errorf("no way out of %v", from)
			}
		}
	}
	if steps != 15 {
		t.Errorf("%d steps; the package documentation and docs/ublk.md show 15", steps)
	}
}

// TestNothingSetsTheStatePastTheTable looks for assignments to Device.state in the package.
func TestNothingSetsTheStatePastTheTable(t *testing.T) {
	if _, err := os.Stat("state.go"); err != nil {
		t.Log("no source here: a test binary that was copied elsewhere")
		return
	}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			a, ok := n.(*ast.AssignStmt)
			if !ok {
				return true
			}
			for _, left := range a.Lhs {
				if s, ok := left.(*ast.SelectorExpr); ok && s.Sel.Name == "state" {
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "d" {
						found++
						if f.Name() != "state.go" {
							t.Errorf("%v sets the state", set.Position(a.Pos()))
						}
					}
				}
			}
			return true
		})
	}
	if found != 1 {
		t.Errorf("%d assignments to the state, want 1", found)
	}
}
