package main

import (
	"fmt"
	"os"
	"strings"
)

// mutant is one change that a test must notice.
type mutant struct {
	name, file string
	old, new   []string
	pkg, test  string
	env        []string // variables for the test
	equivalent string   // why no test can notice it
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
