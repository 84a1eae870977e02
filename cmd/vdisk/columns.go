package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/natural"
)

// item is one line of the list: a volume or a snapshot.
type item struct {
	volume   volumeJSON
	snapshot *snapshotJSON
	usage    *usageJSON // nil if it was not asked for
	branch   string     // the lines to it in a tree
}

func (i item) name() string {
	if i.snapshot != nil {
		return i.snapshot.Name
	}
	return i.volume.Name
}

// column is a column that ls can show. It has numbers, which the list can be sorted by, or only texts.
type column struct {
	name   string
	usage  bool // needs item.usage
	free   bool // of any length
	right  bool // aligned to the right
	number func(i item) (n int64, ok bool)
	text   func(a *app, i item) string
	bad    func(text string) bool // the text means that something is wrong; nil: none does
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// words returns a column of texts: those of a volume, and those of a snapshot.
func words(name string, volume func(volumeJSON) string, snapshot func(snapshotJSON) string) column {
	return column{name: name, text: func(_ *app, i item) string {
		if i.snapshot != nil {
			return dash(snapshot(*i.snapshot))
		}
		return dash(volume(i.volume))
	}}
}

// freeWords is words for texts of any length.
func freeWords(name string, volume func(volumeJSON) string, snapshot func(snapshotJSON) string) column {
	c := words(name, volume, snapshot)
	c.free = true
	return c
}

// space returns a column of a part of the usage, which is "-" if the item was removed meanwhile.
func space(name string, part func(*usageJSON) int64) column {
	return sizes(name, true, func(i item) (int64, bool) {
		if i.usage == nil {
			return 0, false
		}
		return part(i.usage), true
	})
}

func sizes(name string, usage bool, number func(item) (int64, bool)) column {
	return column{name: name, usage: usage, right: true, number: number, text: func(a *app, i item) string {
		n, ok := number(i)
		if !ok {
			return "-"
		}
		return a.size(n)
	}}
}

func counts(name string, number func(item) (int64, bool)) column {
	return column{name: name, right: true, number: number, text: func(_ *app, i item) string {
		n, ok := number(i)
		if !ok {
			return "-"
		}
		return fmt.Sprint(n)
	}}
}

func ofVolumes(count func(volumeJSON) int) func(item) (int64, bool) {
	return func(i item) (int64, bool) { return int64(count(i.volume)), i.snapshot == nil }
}

func deviceColumn() column {
	c := words("device", func(v volumeJSON) string { return shown(v.Device, v.DeviceState) }, func(s snapshotJSON) string { return shown(s.Device, s.DeviceState) })
	c.bad = func(text string) bool { return strings.HasSuffix(text, "waits)") }
	return c
}

func none[T any](T) string { return "" }

var columns = []column{
	{name: "name", text: func(_ *app, i item) string { return i.branch + i.name() }},
	words("type", func(v volumeJSON) string {
		if v.Receiving != nil {
			return "receiving"
		}
		return "vol"
	}, func(snapshotJSON) string { return "snap" }),
	sizes("size", false, func(i item) (int64, bool) {
		if i.snapshot != nil {
			return i.snapshot.Size, true
		}
		return i.volume.Size, true
	}),
	space("mapped", func(u *usageJSON) int64 { return u.Mapped }),
	space("referenced", func(u *usageJSON) int64 { return u.Referenced }),
	space("exclusive", func(u *usageJSON) int64 { return u.Exclusive }),
	space("shared", func(u *usageJSON) int64 { return u.Shared }),
	sizes("usedsnap", true, func(i item) (int64, bool) {
		if i.usage == nil || i.usage.UsedBySnapshots == nil {
			return 0, false
		}
		return *i.usage.UsedBySnapshots, true
	}),
	sizes("family", true, func(i item) (int64, bool) {
		if i.usage == nil || i.usage.Family == nil {
			return 0, false
		}
		return *i.usage.Family, true
	}),
	space("used", func(u *usageJSON) int64 { return u.Used }),
	{name: "ratio", usage: true, right: true, number: func(i item) (int64, bool) {
		if i.usage == nil || i.usage.Referenced <= 0 {
			return 0, false
		}
		return int64(1000 * float64(i.usage.Mapped) / float64(i.usage.Referenced)), true
	}, text: func(_ *app, i item) string {
		if i.usage == nil {
			return "-"
		}
		return i.usage.ratio()
	}},
	{name: "compress", text: func(_ *app, i item) string { return i.volume.Compress }},
	counts("block", func(i item) (int64, bool) { return int64(i.volume.LogicalBlock), true }),
	counts("snapshots", ofVolumes(func(v volumeJSON) int { return len(v.Snapshots) })),
	freeWords("clones", none, func(s snapshotJSON) string { return strings.Join(s.Clones, ",") }),
	freeWords("holds", none, snapshotJSON.tags),
	freeWords("properties", func(v volumeJSON) string { return properties(v.Properties) }, none),
	freeWords("origin", func(v volumeJSON) string { return v.Origin }, none),
	deviceColumn(),
	counts("open", ofVolumes(func(v volumeJSON) int { return v.Open })),
	{name: "created", number: func(i item) (int64, bool) {
		if i.snapshot != nil {
			return i.snapshot.Created.UnixNano(), true
		}
		return i.volume.Created.UnixNano(), true
	}, text: func(_ *app, i item) string {
		if i.snapshot != nil {
			return when(i.snapshot.Created)
		}
		return when(i.volume.Created)
	}},
}

// defaultColumns are the columns that need only the table of volumes and snapshots, not their maps.
const defaultColumns = "name,size,compress,snapshots,origin,device,created"

// longColumns are the columns of ls -l.
const longColumns = "name,size,used,usedsnap,family,referenced,exclusive,mapped,ratio,snapshots,origin"

func columnNames() (names []string) {
	for _, c := range columns {
		names = append(names, c.name)
	}
	return names
}

// columnOf returns the column with a name; one with a colon or a dot is the property of that name.
func columnOf(c *cli.Context, name string) (column, error) {
	if strings.ContainsAny(name, ":.") {
		return freeWords(name, func(v volumeJSON) string { return v.Properties[name] }, none), nil
	}
	i := slices.IndexFunc(columns, func(c column) bool { return c.name == name })
	if i < 0 {
		return column{}, usageError{c, fmt.Errorf("there is no column %q; there are %s", name, strings.Join(columnNames(), ", "))}
	}
	return columns[i], nil
}

func chooseColumns(c *cli.Context) (chosen []column, err error) {
	names := c.StringSlice("columns")
	switch {
	case len(names) > 0:
	case c.Bool("long"):
		names = strings.Split(longColumns, ",")
	default:
		names = strings.Split(defaultColumns, ",")
	}
	for _, name := range names {
		col, err := columnOf(c, name)
		if err != nil {
			return nil, err
		}
		chosen = append(chosen, col)
	}
	return chosen, nil
}

// compare orders items by the column: by number if it has numbers, items without one first, and otherwise by text.
func (col column) compare(a *app, x, y item) int {
	if col.number == nil {
		return natural.Compare(col.text(a, x), col.text(a, y))
	}
	m, xHas := col.number(x)
	n, yHas := col.number(y)
	switch {
	case xHas && yHas:
		return cmp.Compare(m, n)
	case xHas:
		return 1
	case yHas:
		return -1
	}
	return 0
}
