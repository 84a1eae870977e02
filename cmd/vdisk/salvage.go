package main

import (
	"encoding/json"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/owner/sparse"
)

// salvageJSON is what was saved, in the JSON output.
type salvageJSON struct {
	Name      string        `json:"name"`
	File      string        `json:"file"`
	Size      int64         `json:"size"`
	LostBytes int64         `json:"lost_bytes"`
	Lost      sparse.Ranges `json:"lost"` // zeros in the file
}

// salvage exports all of r that can be read, and lists the rest.
func (a *app) salvage(c *cli.Context, s owner.Store, r cow.Ref, path string, write func(sparse.Source) error) error {
	j := salvageJSON{Name: r.String(), File: path, Lost: sparse.Ranges{}}
	err := s.Salvage(c.Context, r, j.Lost.Add, func(src sparse.Source) error {
		j.Size = src.Size()
		return write(src)
	})
	if err != nil {
		return err
	}
	j.LostBytes = j.Lost.Bytes()
	if err := a.listLost(j, path == "-"); err != nil || j.LostBytes == 0 {
		return err
	}
	return hintedError{
		fmt.Errorf("%s cannot be read, and are zeros in the image, which stays: %w", inRanges(j.Lost), cow.ErrCorrupt),
		"'vdisk info " + r.Volume + "' and 'vdisk check --read-data' name the snapshots that have the same damage",
	}
}

// listLost lists what is lost: with --json on standard output, unless the image goes there.
func (a *app) listLost(j salvageJSON, image bool) error {
	if !a.json {
		for _, l := range j.Lost {
			if _, err := fmt.Fprintf(a.stderr, "lost: %d bytes at %d\n", l.Length, l.Offset); err != nil {
				return err
			}
		}
		return nil
	}
	to := a.stdout
	if image {
		to = a.stderr
	}
	enc := json.NewEncoder(to)
	enc.SetIndent("", "  ")
	return enc.Encode(j)
}
