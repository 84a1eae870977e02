package tools

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestImportsNameTheFormat holds that the examples of imports work: an image in a format is refused without its name.
func TestImportsNameTheFormat(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	image := regexp.MustCompile(`vdisk (import|create .*--from) +\S+\.(qcow2?|qed|vmdk|vdi|vhdx?|vpc|gz|xz|zst)\b`)
	found := 0
	for _, file := range append(files, "../../README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if !image.MatchString(line) {
				continue
			}
			found++
			if !strings.Contains(line, "--format ") {
				t.Errorf("%s: %s", file, line)
			}
		}
	}
	if found < 3 {
		t.Errorf("%d examples were found", found)
	}
}
