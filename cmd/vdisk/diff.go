package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) diffCommand() *cli.Command {
	return a.command(arity{1, 2}, &cli.Command{
		Name:      "diff",
		Category:  groupData,
		Usage:     "list what changed between two snapshots or volumes",
		UsageText: "vdisk diff VOL@A [VOL2[@B]] [-H]",
		Description: "Lists the extents, in bytes, in which VOL2@B may have other content than VOL@A: data, or a hole that reads as zeros.\n" +
			"The default for VOL2@B is VOL as it is now. What lies behind VOL2@B's end is not listed. A block that was written again\n" +
			"with what it had is listed, too; 'vdisk compare' looks at the content. Nothing is read but the map of what changed since\n" +
			"the last state that both have in common; volumes that have none are compared as a whole. A volume may be in use: then\n" +
			"the list has all that had changed when the command began, and maybe more. If damage is known in one of the two, the list\n" +
			"is followed by a note of it, with all that share it.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "script", Aliases: []string{"H"}, Usage: "no header, tabs between columns"}},
	}, a.diff)
}

func (a *app) diff(c *cli.Context) error {
	from, err := ref(c, 0)
	if c.NArg() == 1 {
		from, err = snapshotRef(c, 0)
	}
	to := cow.Ref{Volume: from.Volume}
	if err == nil && c.NArg() == 2 {
		to, err = ref(c, 1)
	}
	if err != nil {
		return err
	}
	return a.lookLong(c, func(s owner.Store) error {
		if a.json {
			return a.diffJSON(c, s, from, to)
		}
		format := "%-17d %-15d %s\n"
		var text strings.Builder // not written yet: an error may come before the first extent
		if c.Bool("script") {
			format = "%d\t%d\t%s\n"
		} else {
			fmt.Fprintf(&text, "%-17s %-15s %s\n", "OFFSET", "LENGTH", "TYPE")
		}
		_, err := s.Difference(c.Context, from, to, func(es []owner.Extent) error {
			for _, e := range es {
				fmt.Fprintf(&text, format, e.Offset, e.Length, typeOf(e))
			}
			return a.flush(&text)
		})
		damage, derr := sharedDamage(c.Context, s, from, to)
		a.noteDamage(damage)
		if err = cmp.Or(err, derr); err != nil {
			return err
		}
		return a.flush(&text)
	})
}

// flush writes the text to standard output, and empties it.
func (a *app) flush(text *strings.Builder) error {
	_, err := io.WriteString(a.stdout, text.String())
	text.Reset()
	return err
}

func typeOf(e owner.Extent) string {
	if e.Zero {
		return "zero"
	}
	return "data"
}

// extentJSON is an extent in the JSON output.
type extentJSON struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Type   string `json:"type"` // data or zero
}

// diffJSON writes the object difference of docs/json.md, its extents as they come: there may be very many.
func (a *app) diffJSON(c *cli.Context, s owner.Store, from, to cow.Ref) error {
	var text strings.Builder // not written yet: an error may come before the first extent
	fmt.Fprintf(&text, "{\n  \"from\": %q,\n  \"to\": %q,\n  \"extents\": [", from, to)
	between := "\n    "
	sizes, err := s.Difference(c.Context, from, to, func(es []owner.Extent) error {
		for _, e := range es {
			b, err := json.Marshal(extentJSON{e.Offset, e.Length, typeOf(e)})
			if err != nil {
				return err
			}
			text.WriteString(between)
			text.Write(b)
			between = ",\n    "
		}
		return a.flush(&text)
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(&text, "\n  ],\n  \"from_size\": %d,\n  \"to_size\": %d", sizes[0], sizes[1])
	damage, err := sharedDamage(c.Context, s, from, to)
	if err != nil {
		return err
	}
	if len(damage) > 0 {
		b, err := json.Marshal(damage)
		if err != nil {
			return err
		}
		fmt.Fprintf(&text, ",\n  \"damage\": %s", b)
	}
	text.WriteString("\n}\n")
	return a.flush(&text)
}
