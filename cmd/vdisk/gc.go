package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) gcCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "gc",
		Category:  groupMaintenance,
		Usage:     "give back the space of what was overwritten, discarded and deleted, now",
		UsageText: "vdisk gc [--waste PERCENT] [--cold] [-n]",
		Description: "It happens by itself where more is dead than should be, or room is short. This does it now, for every chunk file of\n" +
			"which at least that much is dead, at full speed and beside whatever uses the store.\n\n" +
			"Data that has not changed for --cold-after is compressed again, better and in larger units, while the store's owner has\n" +
			"nothing else to do. With --cold that is done now, with all data, first; it takes as long as reading and compressing it.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "waste", Usage: "clean files of which at least `PERCENT` is dead, 5 to 100", Value: 10},
			&cli.BoolFlag{Name: "cold", Usage: "first compress all data again"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "only say how much is dead"},
		},
	}, a.gc)
}

// gcJSON is the outcome in the output for programs.
type gcJSON struct {
	Chunks int   `json:"chunk_files"` // that were cleaned
	Moved  int64 `json:"moved_bytes"`
	Freed  int64 `json:"freed_bytes"`
	Stored int64 `json:"stored_bytes"` // of records, afterwards
	Live   int64 `json:"live_bytes"`

	Cold *cow.ColdReport `json:"cold,omitempty"`
}

func (a *app) gc(c *cli.Context) error {
	waste := c.Int("waste")
	if waste < 5 || waste > 100 {
		return usageError{c, fmt.Errorf("--waste %d: 5 to 100 is possible; what is less would be moved for next to nothing", waste)}
	}
	if c.Bool("cold") && c.Bool("dry-run") {
		return usageError{c, errors.New("--cold and --dry-run exclude each other")}
	}
	return a.during(c, func(s owner.Store) error {
		var j gcJSON
		if c.Bool("cold") {
			r, err := s.Cold(c.Context)
			if err != nil {
				return err
			}
			j.Cold = &r
		}
		if !c.Bool("dry-run") {
			r, err := s.Clean(c.Context, float64(waste)/100)
			if err != nil {
				return err
			}
			j.Chunks, j.Moved, j.Freed = r.Chunks, r.Moved, r.Freed
		}
		info, err := s.Info(c.Context)
		if err != nil {
			return err
		}
		j.Stored, j.Live = info.ChunkBytes, info.LiveBytes
		return a.print(j, func() error {
			if j.Cold != nil {
				fmt.Fprintf(a.stdout, "%s compressed to %s\n", a.size(j.Cold.Before), a.size(j.Cold.Written))
			}
			if !c.Bool("dry-run") {
				fmt.Fprintf(a.stdout, "%d chunk files cleaned, %s moved, %s given back\n", j.Chunks, a.size(j.Moved), a.size(j.Freed))
			}
			_, err := fmt.Fprintf(a.stdout, "%s stored, %s of it dead\n", a.size(j.Stored), a.size(max(0, j.Stored-j.Live)))
			return err
		})
	})
}
