package main

import (
	"encoding/json"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// TestDescribe describes this test program, which has no modules of others if it was built in this module.
func TestDescribe(t *testing.T) {
	file, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := describe(file, "vdisk", "1.2.0", "86400")
	if err != nil {
		t.Fatal(err)
	}
	if got := b.Metadata.Component.PURL; got != "pkg:golang/github.com/vdisk/vdisk@1.2.0" {
		t.Errorf("the program is %q", got)
	}
	if b.Metadata.Timestamp != "1970-01-02T00:00:00Z" {
		t.Errorf("its time is %q", b.Metadata.Timestamp)
	}
	if len(b.Components) == 0 || !strings.HasPrefix(b.Components[0].PURL, "pkg:golang/std@1.") {
		t.Errorf("components: %+v", b.Components)
	}
	again, err := describe(file, "vdisk", "1.2.0", "86400")
	one, _ := json.Marshal(b)
	two, _ := json.Marshal(again)
	if err != nil || !slices.Equal(one, two) {
		t.Errorf("another description of the same program: %s, %s, %v", one, two, err)
	}
	if _, err := describe(file, "vdisk", "1.2.0", "soon"); err == nil {
		t.Error("a time that is none was taken")
	}
	if _, err := describe("main.go", "vdisk", "1.2.0", ""); err == nil {
		t.Error("a file that is no program was described")
	}
}

func TestLibrary(t *testing.T) {
	sum := "h1:" + strings.Repeat("A", 43) + "="
	c, err := library(&debug.Module{Path: "a.org/m", Version: "v1", Replace: &debug.Module{Path: "b.org/m", Version: "v2", Sum: sum}})
	if err != nil || c.PURL != "pkg:golang/b.org/m@v2" || c.Properties[0].Value != sum {
		t.Errorf("a module that is replaced: %+v, %v", c, err)
	}
	for _, bad := range []string{"", "h2:" + sum[3:], sum[:20]} {
		if _, err := library(&debug.Module{Path: "a.org/m", Version: "v1", Sum: bad}); err == nil {
			t.Errorf("the sum %q was taken", bad)
		}
	}
}
