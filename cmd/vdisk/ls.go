package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/natural"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) lsCommand() *cli.Command {
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "ls",
		Category:  groupVolumes,
		Usage:     "list volumes and snapshots; with -t all also what is being received",
		UsageText: "vdisk ls [-t vol|snap|all] [--tree] [-l] [-o COLUMN,...] [--sort COLUMN [-r]] [-H] [VOL[@SNAP]...]",
		Description: "Columns: " + strings.Join(columnNames(), ", ") + ".\n" +
			"mapped      bytes of data\n" +
			"referenced  their space in the store, after compression, shared or not; ratio: mapped to referenced\n" +
			"exclusive   the part that nothing else has: removing the snapshot, or rolling the volume back, frees it\n" +
			"shared      the part that others have too\n" +
			"usedsnap    the space that removing all the volume's snapshots would free\n" +
			"used        the space that removing it would free; for a volume, with all its snapshots\n" +
			"family      what it takes with all that has an origin in common with it: what it comes from, and all clones\n" +
			"These are exact, and read the maps of the volumes: about 6 µs for each MiB, and again for each snapshot before which it\n" +
			"changed. The others cost nothing. A name with a colon or a dot is the property of that name.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Usage: "vol, snap or all", Value: "vol"},
			&cli.BoolFlag{Name: "long", Aliases: []string{"l"}, Usage: "show the space that they take"},
			&cli.StringSliceFlag{Name: "columns", Aliases: []string{"o"}, Usage: "`COLUMN,...` to show; several times: all of them"},
			&cli.StringFlag{Name: "sort", Usage: "sort by `COLUMN`; default: volumes by name, snapshots by age"},
			&cli.BoolFlag{Name: "reverse", Aliases: []string{"r"}, Usage: "the other way round"},
			&cli.BoolFlag{Name: "tree", Usage: "show clones below what they come from, with all snapshots unless -t says otherwise"},
			&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"},
		},
	}, a.ls)
}

func (a *app) ls(c *cli.Context) error {
	kind := c.String("type")
	if c.Bool("tree") && !c.IsSet("type") {
		kind = "all"
	}
	if !slices.Contains([]string{"vol", "snap", "all"}, kind) {
		return usageError{c, fmt.Errorf("-t %s: vol, snap and all are possible", kind)}
	}
	chosen, err := chooseColumns(c)
	if err != nil {
		return err
	}
	by, err := columnOf(c, cmp.Or(c.String("sort"), "name"))
	if err != nil {
		return err
	}
	patterns, err := argsFrom(c, 0, parsePattern)
	if err != nil {
		return err
	}
	for _, p := range patterns {
		if p.at {
			kind = "snap"
		}
		if p.at != patterns[0].at {
			return usageError{c, fmt.Errorf("%s and %s: volumes or snapshots can be listed, not both", patterns[0].text, p.text)}
		}
	}
	return a.look(c, func(s owner.Store) error {
		volumes, err := selectVolumes(c, s, patterns)
		if err != nil {
			return err
		}
		if kind != "all" && c.NArg() == 0 {
			volumes = slices.DeleteFunc(volumes, func(v volumeJSON) bool { return v.Receiving != nil })
		}
		slices.SortStableFunc(volumes, func(x, y volumeJSON) int { return natural.Compare(x.Name, y.Name) })
		items := itemsOf(volumes, kind)
		if by.usage || slices.ContainsFunc(chosen, func(c column) bool { return c.usage }) {
			families := by.name == "family" || slices.ContainsFunc(chosen, func(c column) bool { return c.name == "family" })
			err := addUsage(c, s, items, families)
			if families && errors.Is(err, cow.ErrCorrupt) { // perhaps of others in a family, which is shown as unknown
				err = addUsage(c, s, items, false)
			}
			switch {
			case errors.Is(err, cow.ErrCorrupt):
				a.note("what they take is not known, as the map is damaged; 'vdisk check' names the damage: %v", err)
			case err != nil:
				return err
			}
		}
		total := totalOf(items, c.NArg() == 0)
		if c.IsSet("sort") {
			slices.SortStableFunc(items, func(x, y item) int { return by.compare(a, x, y) })
		}
		if c.Bool("reverse") {
			slices.Reverse(items)
		}
		if c.Bool("tree") {
			items = treeOf(items, !c.Bool("script"))
		}
		if i, err := s.Info(c.Context); err == nil {
			a.noteFill(i)
		}
		return a.print(listJSON(items, kind, total), func() error { return a.printItems(items, chosen, total, c.Bool("script")) })
	})
}

// selectVolumes returns the volumes that the patterns name, or all. If they name snapshots, the volumes have only those.
func selectVolumes(c *cli.Context, s owner.Store, patterns []pattern) ([]volumeJSON, error) {
	list := []volumeJSON{}
	if len(patterns) == 0 {
		all, err := s.Volumes(c.Context)
		for _, v := range all {
			list = append(list, volumeOf(v))
		}
		return list, err
	}
	refs, err := expand(c, s, patterns)
	if err != nil {
		return nil, err
	}
	named := map[string][]string{} // names of snapshots, by volume
	var names []string             // of the volumes
	for _, r := range refs {
		if _, ok := named[r.Volume]; !ok {
			names = append(names, r.Volume)
		}
		named[r.Volume] = append(named[r.Volume], r.String())
	}
	for _, name := range names {
		found, err := s.Volume(c.Context, name)
		if err != nil {
			return nil, err
		}
		v := volumeOf(found)
		if patterns[0].at {
			if v.Snapshots, err = chosen(v.Snapshots, named[name]); err != nil {
				return nil, err
			}
		}
		list = append(list, v)
	}
	return list, nil
}

// chosen returns the snapshots with the given names, in their order.
func chosen(snapshots []snapshotJSON, names []string) (some []snapshotJSON, err error) {
	for _, name := range names {
		if !slices.ContainsFunc(snapshots, func(sn snapshotJSON) bool { return sn.Name == name }) {
			return nil, fmt.Errorf("snapshot %s: %w", name, cow.ErrNotFound)
		}
	}
	return slices.DeleteFunc(snapshots, func(sn snapshotJSON) bool { return !slices.Contains(names, sn.Name) }), nil
}

func itemsOf(volumes []volumeJSON, kind string) (items []item) {
	for _, v := range volumes {
		if kind != "snap" {
			items = append(items, item{volume: v})
		}
		for i := range v.Snapshots {
			if kind != "vol" {
				items = append(items, item{volume: v, snapshot: &v.Snapshots[i]})
			}
		}
	}
	return items
}

// addUsage gets the usage of all items in one request, which is much cheaper than one request per item.
func addUsage(c *cli.Context, s owner.Store, items []item, families bool) error {
	if len(items) == 0 {
		return nil
	}
	byName := map[string]*item{}
	var volumes []string
	snapshots := false
	for i := range items {
		name := items[i].volume.Name
		if n := len(volumes); n == 0 || volumes[n-1] != name { // items of a volume are adjacent
			volumes = append(volumes, name)
		}
		if items[i].snapshot != nil {
			name, snapshots = items[i].snapshot.Name, true
		}
		byName[name] = &items[i]
	}
	us, err := usageOfItems(c, s, volumes, snapshots, families)
	if err != nil {
		return err
	}
	for _, u := range us {
		i := byName[u.Ref.String()]
		if i == nil {
			continue // new, or of a type that is not shown
		}
		i.usage = usageOf(u)
		if i.snapshot != nil {
			i.snapshot.Usage = i.usage
		} else {
			i.volume.Usage = i.usage
		}
	}
	return nil
}

// usageOfItems gets the usage of the volumes, of their snapshots if those are shown, and of their families if those are.
func usageOfItems(c *cli.Context, s owner.Store, volumes []string, snapshots, families bool) ([]cow.Usage, error) {
	switch {
	case c.NArg() == 0 || families:
		return s.Usage(c.Context)
	case snapshots:
		return s.VolumeUsage(c.Context, volumes...)
	}
	refs := make([]cow.Ref, len(volumes))
	for i, name := range volumes {
		refs[i].Volume = name
	}
	return s.Usage(c.Context, refs...)
}

// listJSON returns {"volumes": [...]}, each with its snapshots, or with -t snap {"snapshots": [...]}.
func listJSON(items []item, kind string, total *totalJSON) any {
	volumes, snapshots := []volumeJSON{}, []snapshotJSON{}
	for _, i := range items {
		if i.snapshot != nil {
			snapshots = append(snapshots, *i.snapshot)
		} else {
			volumes = append(volumes, i.volume)
		}
	}
	if kind == "snap" {
		return map[string]any{"snapshots": snapshots}
	}
	if total != nil {
		return map[string]any{"volumes": volumes, "total": total}
	}
	return map[string]any{"volumes": volumes}
}

// totalJSON is what all volumes are together.
type totalJSON struct {
	Volumes   int   `json:"volumes"`
	Snapshots int   `json:"snapshots"`
	Size      int64 `json:"size"` // of the volumes
	Used      int64 `json:"used"` // what all of them take, and all that is kept for them
}

// totalOf returns the total of the items, or nil if they are not all volumes, or what they take is not known. The parts
// that clones share are nobody's "used", so that of families is added up.
func totalOf(items []item, all bool) *totalJSON {
	t, seen := &totalJSON{}, map[uint32]bool{}
	for _, i := range items {
		if i.snapshot != nil {
			continue
		}
		if i.usage == nil || i.usage.Family == nil {
			return nil
		}
		t.Volumes++
		t.Snapshots += len(i.volume.Snapshots)
		t.Size += i.volume.Size
		if id := i.usage.FamilyID; !seen[id] {
			seen[id] = true
			t.Used += *i.usage.Family
		}
	}
	if !all || t.Volumes == 0 {
		return nil
	}
	return t
}

// totalRow returns the last line of the list. A total of one volume says nothing.
func (a *app) totalRow(t *totalJSON, chosen []column) (row []string) {
	if t == nil || t.Volumes < 2 {
		return nil
	}
	text := map[string]string{
		"name": fmt.Sprintf("total of %d", t.Volumes), "size": a.size(t.Size), "snapshots": fmt.Sprint(t.Snapshots),
		"used": a.size(t.Used), "family": a.size(t.Used),
	}
	for _, c := range chosen {
		row = append(row, text[c.name])
	}
	return row
}

func (a *app) printItems(items []item, chosen []column, total *totalJSON, script bool) error {
	var header []heading
	for _, c := range chosen {
		header = append(header, heading{strings.ToUpper(c.name), c.right, c.free, c.bad})
	}
	var rows [][]string
	for _, i := range items {
		var row []string
		for _, c := range chosen {
			row = append(row, c.text(a, i))
		}
		rows = append(rows, row)
	}
	if row := a.totalRow(total, chosen); row != nil && !script {
		rows = append(rows, row)
	}
	return a.table(header, rows, script)
}
