package tools

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPromises holds each test and each script that docs/promises.md names to exist.
func TestPromises(t *testing.T) {
	const root = "../.."
	text, err := os.ReadFile(filepath.Join(root, "docs/promises.md"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range function.FindAllStringSubmatch(string(source), -1) {
			tests[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, m := range regexp.MustCompile("`((?:Test|Fuzz)\\w+|testdata/[^`]+)`").FindAllStringSubmatch(string(text), -1) {
		named++
		if _, err := os.Stat(filepath.Join(root, m[1])); err != nil && !tests[m[1]] {
			t.Errorf("%s is named, and there is no such test", m[1])
		}
	}
	if named < 50 {
		t.Errorf("only %d tests are named", named)
	}
}
