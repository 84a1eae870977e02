package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) setCommand() *cli.Command {
	return a.command(arity{2, -1}, &cli.Command{
		Name:      "set",
		Category:  groupVolumes,
		Usage:     "set properties of a volume",
		UsageText: "vdisk set VOL KEY=VALUE...",
		Description: "Properties are yours; vdisk only keeps them, but for some. auto.keep is the policy of 'vdisk prune'. With auto.attach=on,\n" +
			"or read-only, a daemon attaches the volume when it starts. KEY= removes one. A key has up\n" +
			"to 63 letters, digits and . _ - :, a value up to 1024 bytes, and a volume up to 64 properties and 16 KiB. All are set in one\n" +
			"step, or none. They stay when the volume is renamed or rolled back. A clone begins without. A sent snapshot takes them\n" +
			"along, and a full stream gives them to the volume that it makes.\n\n" +
			"Those that begin with limit. limit the clients of the volume, all together, from now on: limit.iops, limit.iops-read and\n" +
			"limit.iops-write in requests a second, limit.bps, limit.bps-read and limit.bps-write in bytes a second (20M). What is not used\n" +
			"is saved up for limit.burst, 100ms by default:\n\n" +
			"    vdisk set vm1 limit.iops=500 limit.bps=20M limit.burst=30s\n\n" +
			"limit.mapped and limit.exclusive limit how many bytes of the volume hold data, and how many bytes the data takes that it shares\n" +
			"with no snapshot. A write that would exceed them gets 'no space':\n\n" +
			"    vdisk set vm1 limit.mapped=8G limit.exclusive=2G",
	}, func(c *cli.Context) error {
		name, err := volumeName(c, 0)
		if err != nil {
			return err
		}
		changes := map[string]string{}
		for _, arg := range c.Args().Tail() {
			key, value, ok := strings.Cut(arg, "=")
			if !ok {
				return usageError{c, fmt.Errorf("%q is not KEY=VALUE, nor KEY= to remove a property", arg)}
			}
			if _, twice := changes[key]; twice {
				return usageError{c, fmt.Errorf("%q is named twice", key)}
			}
			changes[key] = value
		}
		return a.with(c, func(s owner.Store) error {
			if err := s.SetProperties(c.Context, name, changes); err != nil {
				return err
			}
			return a.printChanged(c, s, name)
		})
	})
}

func (a *app) getCommand() *cli.Command {
	return a.command(arity{1, 2}, &cli.Command{
		Name:        "get",
		Category:    groupVolumes,
		Usage:       "show the properties of a volume",
		UsageText:   "vdisk get [-H] VOL [KEY]",
		Description: "With a KEY, only its value. It is an error (3) if the volume does not have it.",
		Flags:       []cli.Flag{&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"}},
	}, func(c *cli.Context) error {
		name, err := volumeName(c, 0)
		if err != nil {
			return err
		}
		return a.look(c, func(s owner.Store) error {
			v, err := s.Volume(c.Context, name)
			if err != nil {
				return err
			}
			return a.printProperties(c, volumeOf(v))
		})
	})
}

func (a *app) printProperties(c *cli.Context, v volumeJSON) error {
	list := v.Properties
	if c.NArg() == 2 {
		key := c.Args().Get(1)
		value, ok := list[key]
		if !ok {
			return hintedError{
				fmt.Errorf("property %q of volume %s: %w", key, v.Name, cow.ErrNotFound),
				"'vdisk get " + v.Name + "' lists what it has",
			}
		}
		list = map[string]string{key: value}
	}
	return a.print(map[string]any{"name": v.Name, "properties": list}, func() error {
		var rows [][]string
		for _, key := range slices.Sorted(maps.Keys(list)) {
			rows = append(rows, []string{key, list[key]})
		}
		if c.NArg() == 2 {
			rows[0] = rows[0][1:]
			return a.table(nil, rows, true)
		}
		return a.table(headings("PROPERTY", "VALUE"), rows, c.Bool("script"))
	})
}

// properties returns KEY=VALUE for each property, separated by commas.
func properties(m map[string]string) string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(m)) {
		list = append(list, key+"="+m[key])
	}
	return strings.Join(list, ",")
}
