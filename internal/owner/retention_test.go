package owner

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
)

// tripper is an owner that takes and removes what it is asked for.
type tripper struct{}

func (tripper) RoundTrip(r *http.Request) (*http.Response, error) {
	var req request
	if err := decode(http.MaxBytesReader(nil, r.Body, maxRequest), &req); err != nil {
		return nil, err
	}
	var auto cow.AutoReport
	for _, name := range req.Names {
		auto.Taken = append(auto.Taken, cow.Ref{Volume: name, Snapshot: "s"})
	}
	var pruned cow.PruneReport
	for _, p := range req.Prune {
		pruned.Removed = append(pruned.Removed, p.Ref)
	}
	var v any = auto
	if strings.HasSuffix(r.URL.Path, "/prune") {
		v = pruned
	}
	b, err := json.Marshal(v)
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader(b))}, err
}

// TestManyAtOnce: names that do not fit into one request go to the owner in several.
func TestManyAtOnce(t *testing.T) {
	c := &Client{http: &http.Client{Transport: tripper{}}}
	var names []string
	var targets []cow.PruneTarget
	for i := range 17000 {
		name := fmt.Sprintf("%063d", i)
		names = append(names, name)
		targets = append(targets, cow.PruneTarget{Ref: cow.Ref{Volume: name, Snapshot: name}, GUID: format.GUID{1}})
	}
	auto, err := c.SnapshotAuto(t.Context(), names...)
	if n := len(names); err != nil || len(auto.Taken) != n || auto.Taken[n-1].Volume != names[n-1] {
		t.Errorf("%d taken, %v", len(auto.Taken), err)
	}
	pruned, err := c.Prune(t.Context(), false, targets...)
	if n := len(names); err != nil || len(pruned.Removed) != n || pruned.Removed[n-1] != targets[n-1].Ref {
		t.Errorf("%d removed, %v", len(pruned.Removed), err)
	}
}
