package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdDoc writes a block of code of a document, so that a script runs what users read: doc FILE HEADING N OUT. The first
// block behind the heading is 1.
func cmdDoc(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: doc FILE HEADING N OUT")
	}
	text, err := os.ReadFile(filepath.Join(ts.Getenv("REPO"), args[0]))
	ts.Check(err)
	blocks := codeBlocks(string(text), args[1])
	var n int
	if _, err := fmt.Sscan(args[2], &n); err != nil || n < 1 || n > len(blocks) {
		ts.Fatalf("%s, %s: there are %d blocks of code", args[0], args[1], len(blocks))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), []byte(blocks[n-1]), 0o600))
}

// codeBlocks returns the indented blocks of code of a section, without those of the sections below it.
func codeBlocks(text, heading string) (blocks []string) {
	here, blank, indent := false, true, ""
	for line := range strings.Lines(text) {
		empty := strings.TrimSpace(line) == ""
		switch level, title, is := strings.Cut(line, "# "); {
		case is && strings.Trim(level, "#") == "":
			here = strings.TrimSpace(title) == heading
		case !here:
		case indent != "" && (empty || strings.HasPrefix(line, indent)):
			blocks[len(blocks)-1] += strings.TrimPrefix(line, indent)
		case blank && strings.HasPrefix(line, "    "):
			indent = line[:len(line)-len(strings.TrimLeft(line, " "))]
			blocks = append(blocks, strings.TrimPrefix(line, indent))
		case !empty:
			indent = ""
		}
		blank = empty
	}
	for i := range blocks {
		blocks[i] = strings.TrimRight(blocks[i], "\n") + "\n"
	}
	return blocks
}
