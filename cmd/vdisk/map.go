package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) mapCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "map",
		Category:  groupData,
		Usage:     "list where a volume or snapshot has data, as 'qemu-img map' does",
		UsageText: "vdisk map VOL[@SNAP] [--output human|json]",
		Description: "Lists the extents of data and, with --output json (or --json), also the holes between them, in the form of qemu-img.\n" +
			"\"offset\" is the place in the disk as vdisk serves it, which is \"start\". \"depth\" is always 0: a volume has all of its\n" +
			"content in its own map, however many clones lie above it. \"compressed\" is always false: blocks are compressed one by one,\n" +
			"and each can be read by itself. A volume may be in use.",
		Flags: []cli.Flag{&cli.StringFlag{Name: "output", Usage: "human or json", Value: "human"}},
	}, a.mapDisk)
}

func (a *app) mapDisk(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	out := c.String("output")
	if out != "human" && out != "json" {
		return usageError{c, fmt.Errorf("--output %s: human or json", out)}
	}
	m := diskMap{name: r.String(), json: a.json || out == "json"}
	return a.lookLong(c, func(s owner.Store) error {
		m.begin()
		sizes, err := s.Difference(c.Context, cow.Ref{}, r, func(es []owner.Extent) error {
			for _, e := range es {
				m.add(e)
			}
			return a.flush(&m.text)
		})
		if err != nil {
			return err
		}
		m.end(sizes[1])
		return a.flush(&m.text)
	})
}

// diskMap writes the map of a disk in the form of qemu-img 8.2.
type diskMap struct {
	name string
	json bool
	at   int64 // everything before it is written
	text strings.Builder
}

func (m *diskMap) begin() {
	if m.json {
		m.text.WriteString("[")
		return
	}
	fmt.Fprintf(&m.text, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
}

// add adds an extent of data, and the hole before it.
func (m *diskMap) add(e owner.Extent) {
	m.entry(m.at, e.Offset-m.at, false)
	m.entry(e.Offset, e.Length, true)
	m.at = e.Offset + e.Length
}

func (m *diskMap) end(size int64) {
	m.entry(m.at, size-m.at, false)
	if m.json {
		m.text.WriteString("]\n")
	}
}

func (m *diskMap) entry(start, length int64, data bool) {
	switch {
	case length == 0:
	case m.json:
		if start > 0 {
			m.text.WriteString(",\n")
		}
		fmt.Fprintf(&m.text, `{ "start": %d, "length": %d, "depth": 0, "present": true, "zero": %v, "data": %v, "compressed": false, "offset": %d}`,
			start, length, !data, data, start)
	case data:
		fmt.Fprintf(&m.text, "%-16s%-16s%-16s%s\n", hex(start), hex(length), hex(start), m.name)
	}
}

// hex is what printf writes for %#x.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", n)
}
