// Package tools holds the scripts behind the Makefile, and a test of the project's structure.
package tools

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/vdisk/vdisk"

// layers lists the packages from the top down, with the packages of this module that each may import. A package that is
// missing here may import none of them.
var layers = map[string][]string{
	"cmd/vdisk":                {"internal/web", "internal/natural", "internal/owner", "internal/journal", "internal/retention", "internal/freeze", "internal/owner/sparse", "internal/image", "internal/stream", "internal/bench", "internal/metrics", "internal/storage", "internal/size", "cow", "format", "ublk"},
	"internal/image":           {"internal/owner/sparse", "nbd", "cow"},
	"internal/web":             {"internal/owner", "internal/metrics", "internal/localhttp", "internal/journal", "internal/natural", "cow"},
	"internal/owner":           {"internal/journal", "internal/retention", "internal/owner/sparse", "internal/rbddiff", "internal/stream", "internal/bench", "internal/metrics", "internal/localhttp", "internal/storage", "internal/ratelimit", "cow", "format", "nbd", "ublk"},
	"internal/metrics":         {"internal/localhttp", "cow", "ublk"},
	"internal/localhttp":       {},
	"internal/natural":         {},
	"internal/bench":           {"internal/workload", "cow", "format", "ublk"},
	"cow":                      {"internal/stream", "internal/ratelimit", "internal/size", "cow/internal/audit", "cow/internal/leafcache", "cow/internal/wal", "cow/internal/fault", "cow/internal/lockorder", "metadata", "format", "internal/storage"},
	"cow/internal/audit":       {"cow/internal/fault", "metadata", "format"},
	"cow/internal/leafcache":   {"cow/internal/fault", "cow/internal/lockorder", "metadata", "format"},
	"cow/internal/wal":         {"cow/internal/fault", "cow/internal/lockorder", "format", "internal/storage"},
	"cow/internal/fault":       {"format", "internal/storage"},
	"cow/internal/lockorder":   {},
	"metadata":                 {"format", "internal/storage"},
	"internal/stream":          {"format"},
	"internal/rbddiff":         {},
	"internal/journal":         {"internal/storage"},
	"internal/retention":       {},
	"internal/freeze":          {},
	"internal/ratelimit":       {"internal/size"},
	"internal/size":            {},
	"internal/storage/crashfs": {"internal/storage"},
	"ublk/examples/loop":       {"ublk"},
	"ublk/examples/null":       {"ublk"},
	"ublk/examples/ram":        {"ublk"},
	"internal/guest/cmd/guest": {"internal/guest"},
	"internal/testwatch":       {},
	"internal/testcache":       {},

	"internal/storage/crashtable": {"internal/storage", "internal/storage/crashfs"},
	"internal/tools/soak":         {"internal/nbdclient", "internal/workload"},
	"internal/tools/bench":        {},
	"internal/nbdclient":          {},
	"internal/testpki":            {},
	"internal/registers":          {"internal/nbdclient"},
}

// TestLayers checks that imports only point down, that ublk and nbd stand alone, and that format is at the bottom.
func TestLayers(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", module+"/...")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for d := json.NewDecoder(out); ; seen++ {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		for _, i := range p.Imports {
			ours, is := strings.CutPrefix(i, module+"/")
			if is && !slices.Contains(layers[name], ours) {
				t.Errorf("%s imports %s, which is not below it", name, ours)
			}
		}
	}
	if err := cmd.Wait(); err != nil || seen < len(layers) {
		t.Errorf("go list: %d packages, %v", seen, err)
	}
	for name, below := range layers {
		for _, b := range below {
			if slices.Contains(layers[b], name) {
				t.Errorf("%s and %s are above one another", name, b)
			}
		}
	}
}
