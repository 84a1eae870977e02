package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// TestExamples: each command has examples, and each of them is accepted: the flags exist, and the number of arguments is
// right.
func TestExamples(t *testing.T) {
	var out bytes.Buffer
	a := &app{stdout: &out, stderr: &out}
	shown := map[string]bool{}
	for _, c := range a.program().Commands {
		if c.Hidden {
			continue
		}
		shown[c.Name] = true
		if examples[c.Name] == "" {
			t.Errorf("%s has no example", c.Name)
		}
		for line := range strings.SplitSeq(examples[c.Name], "\n") {
			ran := false
			program := a.program()
			program.Command(c.Name).Action = func(*cli.Context) error {
				ran = true
				return nil
			}
			args := strings.Fields(strings.SplitN(line, " > ", 2)[0])
			if err := program.Run(reorderArgs(program, args)); err != nil || !ran {
				t.Errorf("%s: %v", line, err)
			}
		}
	}
	for name := range examples {
		if !shown[name] {
			t.Errorf("there are examples of %s, and no such command", name)
		}
	}
}
