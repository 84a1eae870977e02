package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) lsCommand() *cli.Command {
	return a.command(arity{0, -1}, &cli.Command{
		Name:      "ls",
		Category:  groupVolumes,
		Usage:     "list volumes and snapshots; with -t all also what is being received",
		UsageText: "vdisk ls [-t vol|snap|all] [-l] [-o COLUMN,...] [-H] [VOL...]",
		Description: "Columns: " + strings.Join(columnNames(), ", ") + ".\n" +
			"mapped      bytes of data\n" +
			"referenced  their space in the store, after compression, shared or not; ratio: mapped to referenced\n" +
			"exclusive   the part that nothing else has: removing the snapshot, or rolling the volume back, frees it\n" +
			"shared      the part that others have too\n" +
			"usedsnap    the space that removing all the volume's snapshots would free\n" +
			"used        the space that removing it would free; for a volume, with all its snapshots\n" +
			"A name with a colon is the property of that name.\n" +
			"These are exact, and read the maps of the volumes: about 6 µs for each MiB, and again for each snapshot before which it\n" +
			"changed. The others cost nothing.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Usage: "vol, snap or all", Value: "vol"},
			&cli.BoolFlag{Name: "long", Aliases: []string{"l"}, Usage: "show the space that they take"},
			&cli.StringFlag{Name: "columns", Aliases: []string{"o"}, Usage: "`COLUMN,...` to show"},
			&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"},
		},
	}, a.ls)
}

// item is one line of the list: a volume or a snapshot.
type item struct {
	volume   volumeJSON
	snapshot *snapshotJSON
	usage    *usageJSON // nil if it was not asked for
}

// column is a column that ls can show.
type column struct {
	name  string
	usage bool // needs item.usage
	text  func(a *app, i item) string
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// pick returns a function that formats a volume or a snapshot.
func pick(volume func(volumeJSON) string, snapshot func(snapshotJSON) string) func(*app, item) string {
	return func(_ *app, i item) string {
		if i.snapshot != nil {
			return dash(snapshot(*i.snapshot))
		}
		return dash(volume(i.volume))
	}
}

// bytesOf returns a function that formats a part of the usage, or "-" if the item was removed meanwhile.
func bytesOf(part func(*usageJSON) int64) func(*app, item) string {
	return func(a *app, i item) string {
		if i.usage == nil {
			return "-"
		}
		return a.size(part(i.usage))
	}
}

var columns = []column{
	{"name", false, pick(func(v volumeJSON) string { return v.Name }, func(s snapshotJSON) string { return s.Name })},
	{"type", false, pick(func(v volumeJSON) string {
		if v.Receiving != nil {
			return "receiving"
		}
		return "vol"
	}, func(snapshotJSON) string { return "snap" })},
	{"size", false, func(a *app, i item) string {
		if i.snapshot != nil {
			return a.size(i.snapshot.Size)
		}
		return a.size(i.volume.Size)
	}},
	{"mapped", true, bytesOf(func(u *usageJSON) int64 { return u.Mapped })},
	{"referenced", true, bytesOf(func(u *usageJSON) int64 { return u.Referenced })},
	{"exclusive", true, bytesOf(func(u *usageJSON) int64 { return u.Exclusive })},
	{"shared", true, bytesOf(func(u *usageJSON) int64 { return u.Shared })},
	{"usedsnap", true, func(a *app, i item) string {
		if i.usage == nil || i.usage.UsedBySnapshots == nil {
			return "-"
		}
		return a.size(*i.usage.UsedBySnapshots)
	}},
	{"used", true, bytesOf(func(u *usageJSON) int64 { return u.Used })},
	{"ratio", true, func(_ *app, i item) string {
		if i.usage == nil {
			return "-"
		}
		return i.usage.ratio()
	}},
	{"compress", false, func(_ *app, i item) string { return i.volume.Compress }},
	{"block", false, func(_ *app, i item) string { return fmt.Sprint(i.volume.LogicalBlock) }},
	{"snapshots", false, pick(func(v volumeJSON) string { return fmt.Sprint(len(v.Snapshots)) }, func(snapshotJSON) string { return "" })},
	{"clones", false, pick(func(volumeJSON) string { return "" }, func(s snapshotJSON) string { return strings.Join(s.Clones, ",") })},
	{"holds", false, pick(func(volumeJSON) string { return "" }, snapshotJSON.tags)},
	{"properties", false, pick(func(v volumeJSON) string { return properties(v.Properties) }, func(snapshotJSON) string { return "" })},
	{"origin", false, pick(func(v volumeJSON) string { return v.Origin }, func(snapshotJSON) string { return "" })},
	{"device", false, pick(func(v volumeJSON) string { return shown(v.Device, v.DeviceState) }, func(s snapshotJSON) string { return shown(s.Device, s.DeviceState) })},
	{"open", false, pick(func(v volumeJSON) string { return fmt.Sprint(v.Open) }, func(snapshotJSON) string { return "" })},
	{"created", false, pick(func(v volumeJSON) string { return when(v.Created) }, func(s snapshotJSON) string { return when(s.Created) })},
}

// defaultColumns are the columns that need only the table of volumes and snapshots, not their maps.
const defaultColumns = "name,size,compress,snapshots,origin,device,created"

// longColumns are the columns of ls -l.
const longColumns = "name,size,used,usedsnap,referenced,exclusive,mapped,ratio,snapshots,origin"

func columnNames() (names []string) {
	for _, c := range columns {
		names = append(names, c.name)
	}
	return names
}

func chooseColumns(c *cli.Context) (chosen []column, err error) {
	list := c.String("columns")
	switch {
	case list != "":
	case c.Bool("long"):
		list = longColumns
	default:
		list = defaultColumns
	}
	for name := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(columns, func(c column) bool { return c.name == name })
		if strings.Contains(name, ":") {
			chosen = append(chosen, column{name, false, pick(func(v volumeJSON) string { return v.Properties[name] }, func(snapshotJSON) string { return "" })})
			continue
		}
		if i < 0 {
			return nil, usageError{c, fmt.Errorf("there is no column %q; there are %s", name, strings.Join(columnNames(), ", "))}
		}
		chosen = append(chosen, columns[i])
	}
	return chosen, nil
}

func (a *app) ls(c *cli.Context) error {
	kind := c.String("type")
	if !slices.Contains([]string{"vol", "snap", "all"}, kind) {
		return usageError{c, fmt.Errorf("-t %s: vol, snap and all are possible", kind)}
	}
	chosen, err := chooseColumns(c)
	if err != nil {
		return err
	}
	return a.look(c, func(s owner.Store) error {
		volumes, err := a.selectVolumes(c, s)
		if err != nil {
			return err
		}
		if kind != "all" && c.NArg() == 0 {
			volumes = slices.DeleteFunc(volumes, func(v volumeJSON) bool { return v.Receiving != nil })
		}
		items := itemsOf(volumes, kind)
		if slices.ContainsFunc(chosen, func(c column) bool { return c.usage }) {
			if err := addUsage(c, s, items); err != nil {
				return err
			}
		}
		return a.print(listJSON(items, kind), func() error { return a.printItems(items, chosen, c.Bool("script")) })
	})
}

// selectVolumes returns the volumes that the arguments name, or all.
func (a *app) selectVolumes(c *cli.Context, s owner.Store) ([]volumeJSON, error) {
	var all []owner.Volume
	var err error
	if c.NArg() == 0 {
		all, err = s.Volumes(c.Context)
	}
	for i := 0; i < c.NArg() && err == nil; i++ {
		var name string
		var v owner.Volume
		if name, err = volumeName(c, i); err == nil {
			v, err = s.Volume(c.Context, name)
			all = append(all, v)
		}
	}
	list := []volumeJSON{}
	for _, v := range all {
		list = append(list, volumeOf(v))
	}
	return list, err
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
func addUsage(c *cli.Context, s owner.Store, items []item) error {
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
	us, err := usageOfItems(c, s, volumes, snapshots)
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

// usageOfItems gets the usage of the volumes, and of their snapshots if those are shown.
func usageOfItems(c *cli.Context, s owner.Store, volumes []string, snapshots bool) ([]cow.Usage, error) {
	switch {
	case c.NArg() == 0:
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
func listJSON(items []item, kind string) any {
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
	return map[string]any{"volumes": volumes}
}

func (a *app) printItems(items []item, chosen []column, script bool) error {
	var header []string
	for _, c := range chosen {
		header = append(header, strings.ToUpper(c.name))
	}
	var rows [][]string
	for _, i := range items {
		var row []string
		for _, c := range chosen {
			row = append(row, c.text(a, i))
		}
		rows = append(rows, row)
	}
	return a.table(header, rows, script)
}
