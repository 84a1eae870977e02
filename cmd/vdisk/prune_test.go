package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/retention"
)

// prunedStore is a store whose volume full cannot be pruned.
type prunedStore struct {
	owner.Store
	volumes []owner.Volume
	asked   []cow.Ref
	targets []cow.PruneTarget
}

func namedBy(targets []cow.PruneTarget) (refs []cow.Ref) {
	for _, t := range targets {
		refs = append(refs, t.Ref)
	}
	return refs
}

func (s *prunedStore) Volumes(context.Context) ([]owner.Volume, error) { return s.volumes, nil }

func (s *prunedStore) Prune(_ context.Context, dry bool, targets ...cow.PruneTarget) (r cow.PruneReport, err error) {
	refs := namedBy(targets)
	s.targets = append(s.targets, targets...)
	if refs[0].Volume == "full" {
		return r, cow.ErrNoSpace
	}
	s.asked = append(s.asked, refs...)
	r.Removed = append(r.Removed, refs[:1]...)
	for _, ref := range refs[1:] {
		r.Kept = append(r.Kept, cow.KeptSnapshot{Ref: ref, Why: "in use"})
	}
	return r, nil
}

// TestPruneGoesOn: a volume whose policy is not understood, and one that cannot be pruned, are errors, and the other
// volumes are done. Snapshots with other names and those of the future stay.
func TestPruneGoesOn(t *testing.T) {
	now := time.Now()
	s := &prunedStore{}
	for name, keep := range map[string]string{"bad": "lost=1", "full": "last=1", "good": "last=1", "none": ""} {
		v := owner.Volume{VolumeInfo: cow.VolumeInfo{Name: name, Properties: map[string]string{retention.Property: keep}}}
		for i := range 5 {
			at := now.AddDate(0, 0, i-4)
			v.Snapshots = append(v.Snapshots, cow.SnapshotInfo{Volume: name, Name: cow.AutoName(at), Created: at, GUID: format.GUID{byte(i + 1)}}, cow.SnapshotInfo{Volume: name, Name: fmt.Sprint("mine", i), Created: at})
		}
		v.Snapshots = append(v.Snapshots, cow.SnapshotInfo{Volume: name, Name: "auto-20991231T000000Z", Created: now.AddDate(50, 0, 0)})
		s.volumes = append(s.volumes, v)
	}
	var out bytes.Buffer
	a := &app{stdout: &out, stderr: io.Discard, verbose: true}
	set := flag.NewFlagSet("", flag.ContinueOnError)
	set.Bool("policy", true, "")
	err := a.pruneVolumes(cli.NewContext(nil, set, nil), s, nil, retention.Policy{})
	if !errors.Is(err, cow.ErrNoSpace) || !strings.Contains(err.Error(), `bad: its policy, the property auto.keep=lost=1: "lost" is no rule`) {
		t.Error(err)
	}
	if len(s.asked) != 4 || s.asked[0] != (cow.Ref{Volume: "good", Snapshot: cow.AutoName(now.AddDate(0, 0, -4))}) {
		t.Error(s.asked)
	}
	if len(s.targets) < 4 || s.targets[len(s.targets)-1].GUID.IsZero() {
		t.Error("it has not said which snapshots it means")
	}
	for _, want := range []string{"keep    " + retention.Future, "remove  -", "keep    in use", "keep    last snapshot"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "bad@") || strings.Contains(out.String(), "mine") {
		t.Error(&out)
	}
}
