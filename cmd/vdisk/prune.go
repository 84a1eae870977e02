package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/retention"
)

// keepRules are the rules of prune, each with a flag --keep-RULE, and what they keep.
var keepRules = []struct{ rule, usage string }{
	{"last", "keep the `N` newest snapshots"},
	{"hourly", "keep the newest snapshot of each of the `N` newest hours that have any"},
	{"daily", "the same for `N` days"},
	{"weekly", "the same for `N` weeks"},
	{"monthly", "the same for `N` months"},
	{"yearly", "the same for `N` years"},
	{"within", "keep all that are newer than `DURATION` before the newest: years, months, days and hours, as in 1y6m or 2d12h"},
}

func (a *app) pruneCommand() *cli.Command {
	var keep []cli.Flag
	for _, r := range keepRules {
		keep = append(keep, &cli.StringFlag{Name: "keep-" + r.rule, Usage: r.usage})
	}
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "prune",
		Category:  groupVolumes,
		Usage:     "remove the snapshots that no rule keeps",
		UsageText: "vdisk prune VOL[@SNAP]...|--all {--keep-RULE N...|--policy} [-n] [-H]",
		Description: "A snapshot is kept if any of the rules keeps it, for each volume by itself, as 'restic forget' does. Without a rule, prune\n" +
			"is refused. Of VOL, only snapshots of 'vdisk snapshot --auto' are removed and counted; VOL@PATTERN stands for those that\n" +
			"match, whatever their names. Periods are of the calendar in local time (TZ). Snapshots stay in any case if they have holds,\n" +
			"clones or users, or a time in the future. All removals of a volume are one step. With --policy, each volume has the rules\n" +
			"of its property " + retention.Property + " ('vdisk set vm1 " + retention.Property + "=hourly=24,daily=7'); without VOL, it is for all that have one.\n" +
			"N may be 'unlimited'. Prints what it removes, and what stays although no rule keeps it; with -n or -v, all snapshots.\n" + patternHelp,
		Flags: append(keep,
			allFlag(),
			policyFlag("the rules are those of each volume's property "+retention.Property),
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "show what would be kept and removed, and remove nothing"},
			&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"}),
	}, func(c *cli.Context) error {
		patterns, err := argsFrom(c, 0, parsePattern)
		if err != nil {
			return err
		}
		policy, err := policyOf(c)
		if err != nil {
			return usageError{c, err}
		}
		open := a.with
		if c.Bool("dry-run") {
			open = a.look
		}
		return open(c, func(s owner.Store) error {
			return a.pruneVolumes(c, s, patterns, policy)
		})
	})
}

// pruneVolumes prunes one volume after the other. If one fails, the others are done.
func (a *app) pruneVolumes(c *cli.Context, s owner.Store, patterns []pattern, policy retention.Policy) error {
	list, err := a.toPrune(c, s, patterns, policy)
	if err != nil {
		return err
	}
	if len(list) == 0 && len(patterns) == 0 && c.Bool("policy") {
		a.noPolicy()
	}
	var errs []error
	for i := range list {
		errs = append(errs, list[i].prune(c, s))
	}
	return errors.Join(a.printPruned(c, list), errors.Join(errs...))
}

// policyOf returns the rules of the flags; none with --policy.
func policyOf(c *cli.Context) (p retention.Policy, err error) {
	rules := false
	for _, r := range keepRules {
		if flag := "keep-" + r.rule; c.IsSet(flag) {
			rules = true
			if err := p.Set(r.rule, c.String(flag)); err != nil {
				return p, fmt.Errorf("--%s: %w", flag, err)
			}
		}
	}
	switch {
	case c.Bool("policy") && rules:
		return p, errors.New("--policy has its own rules; leave out --keep-..., or --policy")
	case !c.Bool("policy") && p.IsEmpty():
		return p, errors.New("no rule keeps any snapshot: give one, such as --keep-daily 7, or --policy")
	case c.Bool("policy") && c.Bool("all"):
		return p, errors.New("--policy is for all volumes that have a policy; leave out --all")
	case c.Bool("all") && c.NArg() > 0:
		return p, errors.New("--all stands for all volumes; name none beside it")
	case !c.Bool("all") && !c.Bool("policy") && c.NArg() == 0:
		return p, errors.New("prune needs volumes: name some, or say --all")
	}
	return p, nil
}

// pruning is what prune does to one volume.
type pruning struct {
	volume    string
	policy    retention.Policy
	bad       error              // why the volume's policy is none
	snapshots []cow.SnapshotInfo // the oldest first; what the rules are for
	reasons   [][]string         // why each of them stays
	removed   []bool
	stuck     []bool // no rule keeps it, and yet it stays
}

// toPrune returns the volumes that the patterns, or --all or --policy, choose, with the snapshots that the rules are for.
func (a *app) toPrune(c *cli.Context, s owner.Store, patterns []pattern, policy retention.Policy) (list []pruning, err error) {
	refs, err := expand(c, s, patterns)
	if err != nil {
		return nil, err
	}
	all, err := s.Volumes(c.Context)
	if err != nil {
		return nil, err
	}
	if err := exist(all, refs); err != nil {
		return nil, err
	}
	named := map[cow.Ref]bool{}
	for _, r := range refs {
		named[r] = true
	}
	for _, r := range refs { // one set of rules for both series would count them together
		if r.Snapshot != "" && named[cow.Ref{Volume: r.Volume}] {
			return nil, usageError{c, fmt.Errorf("%s is named beside %v: prune them one after the other", r.Volume, r)}
		}
	}
	for _, v := range all {
		whole := len(patterns) == 0 && v.Receiving == nil || named[cow.Ref{Volume: v.Name}]
		p := pruning{volume: v.Name, policy: policy}
		for _, sn := range v.Snapshots {
			if whole && cow.IsAutoName(sn.Name) || named[cow.Ref{Volume: v.Name, Snapshot: sn.Name}] {
				p.snapshots = append(p.snapshots, sn)
			}
		}
		switch text := v.Properties[retention.Property]; {
		case !whole && len(p.snapshots) == 0:
			continue
		case !c.Bool("policy"):
		case text == "":
			if len(patterns) > 0 {
				a.note("%s has no policy ('vdisk set %s %s=daily=7')", v.Name, v.Name, retention.Property)
			}
			continue
		default:
			if p.policy, p.bad = retention.Parse(text); p.bad != nil {
				p.bad = fmt.Errorf("%s: its policy, the property %s=%s: %w", v.Name, retention.Property, text, p.bad)
			}
		}
		list = append(list, p)
	}
	return list, nil
}

// exist returns an error if one of the refs is not there.
func exist(all []owner.Volume, refs []cow.Ref) error {
	there := map[cow.Ref]bool{}
	for _, v := range all {
		there[cow.Ref{Volume: v.Name}] = true
		for _, sn := range v.Snapshots {
			there[cow.Ref{Volume: v.Name, Snapshot: sn.Name}] = true
		}
	}
	for _, r := range refs {
		if !there[r] {
			return fmt.Errorf("%v: %w", r, cow.ErrNotFound)
		}
	}
	return nil
}

// prune applies the rules, and removes what they do not keep.
func (p *pruning) prune(c *cli.Context, s owner.Store) error {
	n := len(p.snapshots)
	p.reasons, p.removed, p.stuck = make([][]string, n), make([]bool, n), make([]bool, n)
	if p.bad != nil {
		return p.bad
	}
	var times []time.Time
	for _, sn := range p.snapshots {
		times = append(times, sn.Created)
	}
	p.reasons = p.policy.Apply(times, time.Now(), time.Local)
	index := map[cow.Ref]int{}
	var targets []cow.PruneTarget
	for i, sn := range p.snapshots {
		if len(p.reasons[i]) == 0 {
			r := cow.Ref{Volume: p.volume, Snapshot: sn.Name}
			index[r] = i
			targets = append(targets, cow.PruneTarget{Ref: r, GUID: sn.GUID})
		}
	}
	if len(targets) == 0 {
		return nil
	}
	r, err := s.Prune(c.Context, c.Bool("dry-run"), targets...)
	for _, k := range r.Kept {
		p.reasons[index[k.Ref]], p.stuck[index[k.Ref]] = []string{k.Why}, true
	}
	for _, ref := range r.Removed {
		p.removed[index[ref]] = true
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.volume, err)
	}
	return nil
}

// prunedJSON is what prune has done to a volume, in the JSON output.
type prunedJSON struct {
	Volume  string     `json:"volume"`
	Policy  string     `json:"policy"`
	Kept    []keptJSON `json:"kept"`
	Removed []string   `json:"removed"`
}

// keptJSON is a snapshot that stays, in the JSON output.
type keptJSON struct {
	Name    string    `json:"name"` // VOL@SNAP
	Created time.Time `json:"created"`
	Reasons []string  `json:"reasons"`
}

func (a *app) printPruned(c *cli.Context, list []pruning) error {
	all := []prunedJSON{}
	rows := [][]string{}
	for _, p := range list {
		j := prunedJSON{Volume: p.volume, Policy: p.policy.String(), Kept: []keptJSON{}, Removed: []string{}}
		for i, sn := range p.snapshots {
			name := cow.Ref{Volume: p.volume, Snapshot: sn.Name}.String()
			what := "keep"
			switch {
			case p.removed[i]:
				what = "remove"
				j.Removed = append(j.Removed, name)
			case len(p.reasons[i]) > 0:
				j.Kept = append(j.Kept, keptJSON{name, sn.Created.UTC(), p.reasons[i]})
			default: // it was to be removed, and has gone before, or the removal failed
				continue
			}
			if p.removed[i] || p.stuck[i] || c.Bool("dry-run") || a.verbose {
				rows = append(rows, []string{name, when(sn.Created), what, dash(strings.Join(p.reasons[i], ", "))})
			}
		}
		all = append(all, j)
	}
	key := "pruned"
	if c.Bool("dry-run") {
		key = "would_prune"
	}
	return a.print(map[string]any{key: all}, func() error {
		if len(rows) == 0 {
			return nil
		}
		return a.table(headings("SNAPSHOT", "CREATED", "ACTION", "REASONS"), rows, c.Bool("script"))
	})
}
