package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

func (a *app) compareCommand() *cli.Command {
	return a.command(arity{2, 2}, &cli.Command{
		Name:      "compare",
		Category:  groupData,
		Usage:     "compare the contents of two volumes, snapshots or files",
		UsageText: "vdisk compare A B [--strict] [-f FORMAT] [-F FORMAT] [--backing]",
		Description: "A and B are VOL, VOL@SNAP, or a file or block device. A name with a slash is a file, and so is one that the store does\n" +
			"not have. The end of the shorter one must be followed by zeros in the other; with --strict the sizes must be equal.\n" +
			"Exit codes: 0 the same, 10 different; the message then says at which byte the difference begins. Of two snapshots, only\n" +
			"what changed since the last state that both have in common is read; of a file, no holes are. What is damaged is not\n" +
			"compared, but named, with the snapshots that share the damage; 6: all else is the same. A volume that is open for\n" +
			"writing is refused: take a snapshot and compare that. A file is raw unless -f (of A) or -F (of B) says another format,\n" +
			"as for 'vdisk import'; one that looks like another format is refused.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "strict", Aliases: []string{"s"}, Usage: "the sizes must be equal, too"},
			&cli.StringFlag{Name: "format", Aliases: []string{"f"}, Usage: "`FORMAT` of the file A"},
			&cli.StringFlag{Name: "format2", Aliases: []string{"F"}, Usage: "`FORMAT` of the file B"},
			backingFlag(),
		},
	}, a.compare)
}

// errDiffer is the result of a comparison of contents that differ.
var errDiffer = errors.New("they differ")

// compareJSON is the result of a comparison in the JSON output.
type compareJSON struct {
	Identical bool   `json:"identical"`
	Offset    *int64 `json:"offset"` // of the first byte that differs; null if none does
	SizeA     int64  `json:"size_a"`
	SizeB     int64  `json:"size_b"`
	// What could not be compared, because one of the two is damaged there. Identical is false then.
	Unread sparse.Ranges `json:"unread,omitempty"`
	// Damage is what the store knows to be damaged in one of the two, with all that share it.
	Damage []damageJSON `json:"damage,omitempty"`
}

// side is one of two things to compare: a file, or else ref.
type side struct {
	name string
	file bool
	ref  cow.Ref
	in   reading
}

func (a *app) compare(c *cli.Context) error {
	var sides [2]side
	for i, flag := range []string{"format", "format2"} {
		sides[i].name = c.Args().Get(i)
		in, err := readingAs(c, flag, "reads")
		if err != nil {
			return err
		}
		if sides[i].name == "-" {
			return usagef("standard input cannot be compared: put it into a file")
		}
		sides[i].in, sides[i].file = in, strings.Contains(sides[i].name, "/")
	}
	if c.Bool("backing") && sides[0].in.Format.IsStream() && sides[1].in.Format.IsStream() {
		return usageError{c, errors.New("--backing is for a -f or -F that qemu-img reads")}
	}
	if sides[0].file && sides[1].file {
		return a.compared(c, sides, nil)
	}
	opened := false
	err := a.lookLong(c, func(s owner.Store) error {
		opened = true
		for i := range sides {
			d := &sides[i]
			if err := d.find(c.Context, s); err != nil {
				return err
			}
			if !d.file && !d.in.checked {
				return usageError{c, fmt.Errorf("--%s is for a file, and %s is in the store; a name with a slash, such as ./%s, is a file", d.in.flag, d.name, d.name)}
			}
		}
		return a.compared(c, sides, s)
	})
	if !opened && errors.As(err, &noStoreError{}) && sides[0].exists() && sides[1].exists() {
		sides[0].file, sides[1].file = true, true
		return a.compared(c, sides, nil)
	}
	return err
}

// exists reports whether there is a file of this name.
func (d *side) exists() bool {
	_, err := os.Stat(d.name)
	return err == nil
}

// find looks the name up: in the store, and if it is not there among the files.
func (d *side) find(ctx context.Context, s owner.Store) error {
	if d.file {
		return nil
	}
	ref, err := cow.ParseRef(d.name)
	if err == nil {
		_, err = s.Volume(ctx, ref.Volume)
	}
	if err == nil {
		d.ref = ref
		return nil
	}
	if d.file = d.exists(); d.file {
		return nil
	}
	if errors.Is(err, cow.ErrNotFound) {
		return fmt.Errorf("%s is neither in the store nor a file: %w", d.name, fs.ErrNotExist)
	}
	return err
}

// with calls use with the content. It adds to unread what cannot be read.
func (d *side) with(c *cli.Context, a *app, s owner.Store, unread *sparse.Ranges, use func(sparse.Source) error) error {
	if !d.file {
		return s.Salvage(c.Context, d.ref, unread.Add, use)
	}
	src, done, err := a.source(c.Context, d.name, d.in)
	if err != nil {
		return err
	}
	defer done()
	return use(src)
}

// compared compares two sides and says the result.
func (a *app) compared(c *cli.Context, sides [2]side, s owner.Store) (err error) {
	var r owner.Comparison
	if !sides[0].file && !sides[1].file {
		r, err = s.Compare(c.Context, sides[0].ref, sides[1].ref)
	} else {
		err = sides[0].with(c, a, s, &r.Unread, func(x sparse.Source) error {
			return sides[1].with(c, a, s, &r.Unread, func(y sparse.Source) error {
				if c.Bool("strict") && x.Size() >= 0 && y.Size() >= 0 && x.Size() != y.Size() {
					r.Sizes = [2]int64{x.Size(), y.Size()}
					return nil
				}
				bar := a.progress("comparing", max(x.Size(), y.Size()))
				defer bar.finish()
				var err error
				r.At, r.Differs, err = sparse.Compare(c.Context, x, y, &r.Unread, bar.set)
				r.Sizes = [2]int64{x.Size(), y.Size()} // of a stream known only now
				return err
			})
		})
	}
	if err != nil {
		return fmt.Errorf("comparing %s and %s: %w", sides[0].name, sides[1].name, err)
	}
	var damage []damageJSON
	if s != nil {
		if damage, err = sharedDamage(c.Context, s, refsOf(sides)...); err != nil {
			return err
		}
	}
	return a.compareResult(c, sides, r, damage)
}

// refsOf returns the sides that are in the store.
func refsOf(sides [2]side) (refs []cow.Ref) {
	for _, d := range sides {
		if !d.file {
			refs = append(refs, d.ref)
		}
	}
	return refs
}

func (a *app) compareResult(c *cli.Context, sides [2]side, r owner.Comparison, damage []damageJSON) error {
	names := sides[0].name + " and " + sides[1].name
	sizes := fmt.Sprintf("%d and %d bytes", r.Sizes[0], r.Sizes[1])
	j := compareJSON{SizeA: r.Sizes[0], SizeB: r.Sizes[1], Unread: r.Unread, Damage: damage}
	for _, u := range r.Unread {
		a.note("not compared, as one of them cannot be read there: %d bytes at %d", u.Length, u.Offset)
	}
	a.noteDamage(damage)
	var err error
	switch {
	case c.Bool("strict") && r.Sizes[0] != r.Sizes[1]:
		err = fmt.Errorf("%s have different sizes, %s: %w", names, sizes, errDiffer)
	case r.Differs:
		j.Offset = &r.At
		err = fmt.Errorf("%s differ from byte %d on: %w", names, r.At, errDiffer)
	case len(r.Unread) > 0:
		err = fmt.Errorf("%s and %s: %s cannot be read and were not compared; all else is the same: %w", sides[0].name, sides[1].name, inRanges(r.Unread), cow.ErrCorrupt)
	default:
		j.Identical = true
		if r.Sizes[0] != r.Sizes[1] {
			a.note("their sizes are different, %s; behind the end of the shorter one there are only zeros", sizes)
		}
	}
	perr := a.print(j, func() error {
		if err != nil {
			return nil
		}
		_, err := fmt.Fprintf(a.stdout, "%s have the same content\n", names)
		return err
	})
	return errors.Join(perr, err)
}
