package main

import (
	"fmt"
	"path"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// pattern is an argument that may name several volumes or snapshots: with the wildcards of path.Match on both sides of
// the @, and with VOL@A..B for the snapshots from A to B, the oldest first. A or B may be missing.
type pattern struct {
	text             string
	volume, snapshot string
	at               bool
}

// patternHelp describes patterns in the help of commands that take them.
const patternHelp = "VOL and SNAP may have wildcards (*, ?, [a-z]; quote them from the shell), and VOL@A..B are the snapshots from A to B,\n" +
	"in the order in which they were taken; without A from the first, without B to the last."

// wild reports whether a text has wildcards. No name can have them.
func wild(text string) bool { return strings.ContainsAny(text, `*?[\`) }

// parsePattern parses the n-th argument.
func parsePattern(c *cli.Context, n int) (p pattern, err error) {
	p.text = c.Args().Get(n)
	p.volume, p.snapshot, p.at = strings.Cut(p.text, "@")
	if !wild(p.text) && !p.isRange() {
		_, err := cow.ParseRef(p.text)
		return p, err
	}
	for _, part := range []string{p.volume, p.snapshot} {
		if _, err := path.Match(part, ""); err != nil {
			return p, usageError{c, fmt.Errorf("%s: a wildcard is incomplete", p.text)}
		}
	}
	return p, nil
}

// snapshotPattern is parsePattern for snapshots.
func snapshotPattern(c *cli.Context, n int) (pattern, error) {
	p, err := parsePattern(c, n)
	if err == nil && !p.at {
		err = usageError{c, fmt.Errorf("%s is a volume, and a snapshot is needed: %s@NAME", p.text, p.text)}
	}
	return p, err
}

// isRange reports whether the pattern may be a range. A snapshot may be called A..B, too, and is then meant.
func (p pattern) isRange() bool { return !wild(p.snapshot) && strings.Contains(p.snapshot, "..") }

// expand returns the volumes and snapshots that the patterns name, each once. Those without wildcards need not exist. A
// pattern that matches nothing is an error.
func expand(c *cli.Context, s owner.Store, patterns []pattern) (refs []cow.Ref, err error) {
	seen := map[cow.Ref]bool{}
	var all []owner.Volume
	for _, p := range patterns {
		if !wild(p.text) && !p.isRange() {
			refs = append(refs, cow.Ref{Volume: p.volume, Snapshot: p.snapshot}) // what is named twice is the command's business
			continue
		}
		if all == nil {
			if all, err = s.Volumes(c.Context); err != nil {
				return nil, err
			}
		}
		found := 0
		for _, r := range p.matches(all) {
			if found++; !seen[r] {
				seen[r] = true
				refs = append(refs, r)
			}
		}
		if found == 0 {
			return nil, fmt.Errorf("nothing matches %s: %w", p.text, cow.ErrNotFound)
		}
	}
	return refs, nil
}

// matches returns what matches the pattern. What is being received is no volume yet.
func (p pattern) matches(all []owner.Volume) (refs []cow.Ref) {
	for _, v := range all {
		if v.Receiving != nil && wild(p.volume) || !matches(p.volume, v.Name) {
			continue
		}
		if !p.at {
			refs = append(refs, cow.Ref{Volume: v.Name})
			continue
		}
		for _, sn := range p.of(v.Snapshots) {
			refs = append(refs, cow.Ref{Volume: v.Name, Snapshot: sn.Name})
		}
	}
	return refs
}

// of returns those of a volume's snapshots, the oldest first, that match.
func (p pattern) of(snapshots []cow.SnapshotInfo) (some []cow.SnapshotInfo) {
	for i, sn := range snapshots {
		if matches(p.snapshot, sn.Name) {
			some = append(some, snapshots[i])
		}
	}
	if len(some) > 0 || !p.isRange() {
		return some
	}
	first, last, _ := strings.Cut(p.snapshot, "..")
	from, to := -1, -1
	for i, sn := range snapshots {
		if sn.Name == first || first == "" && i == 0 {
			from = i
		}
		if sn.Name == last || last == "" {
			to = i
		}
	}
	if from < 0 || to < from {
		return nil
	}
	return snapshots[from : to+1]
}

func matches(pattern, name string) bool {
	ok, err := path.Match(pattern, name)
	return ok && err == nil // parsePattern has refused it
}

// expandVolumes returns a snapshot to take for each volume that the patterns name.
func expandVolumes(c *cli.Context, s owner.Store, patterns []pattern) (refs []cow.Ref, err error) {
	for _, p := range patterns {
		volumes, err := expand(c, s, []pattern{{text: p.volume, volume: p.volume}})
		if err != nil {
			return nil, err
		}
		for _, v := range volumes {
			refs = append(refs, cow.Ref{Volume: v.Volume, Snapshot: p.snapshot})
		}
	}
	return refs, nil
}

// newSnapshot parses the n-th argument as snapshots to take: only the volume may have wildcards.
func newSnapshot(c *cli.Context, n int) (pattern, error) {
	p, err := snapshotPattern(c, n)
	if err == nil {
		_, err = cow.ParseRef("v@" + p.snapshot)
	}
	return p, err
}
