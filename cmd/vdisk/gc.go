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
		Usage:     "reclaim the space of overwritten, discarded and deleted data now",
		UsageText: "vdisk gc [--waste PERCENT] [--cold] [-n]",
		Description: "Cleaning also runs by itself, when dead data exceeds its limit or space runs low. This command cleans now, at full\n" +
			"speed, every chunk file that is dead to at least PERCENT. Other commands can use the store meanwhile.\n" +
			"Data that has not changed for --cold-after is compressed again, better and in larger units, when the store's owner is\n" +
			"idle. --cold does that first, now, for all data; it takes as long as reading and compressing it.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "waste", Usage: "clean files that are dead to at least `PERCENT`, 5 to 100", Value: 10},
			&cli.BoolFlag{Name: "cold", Usage: "first recompress all data"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "only show how much is dead"},
		},
	}, a.gc)
}

// gcJSON is the result in the JSON output.
type gcJSON struct {
	Chunks int   `json:"chunk_files"` // cleaned chunk files
	Moved  int64 `json:"moved_bytes"`
	Freed  int64 `json:"freed_bytes"`
	Stored int64 `json:"stored_bytes"` // bytes of records after cleaning
	Live   int64 `json:"live_bytes"`

	Cold *cow.ColdReport `json:"cold,omitempty"`
}

func (a *app) gc(c *cli.Context) error {
	waste := c.Int("waste")
	if waste < 5 || waste > 100 {
		return usageError{c, fmt.Errorf("--waste %d: 5 to 100 is possible; below that, cleaning moves much data for little space", waste)}
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
