package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// repairedJSON is the result of a repair in the JSON output.
type repairedJSON struct {
	Name    string     `json:"name"`
	Bytes   int64      `json:"written_bytes"`
	Written []lostJSON `json:"written"` // what was damaged, and has the content of the file now
	Left    []lostJSON `json:"left"`    // what is still damaged: the map cannot be read there
	Mended  []lostJSON `json:"mended"`  // what other volumes and snapshots have of it, where the file was proved to have what was lost
	Others  []lostJSON `json:"others"`  // what other volumes and snapshots still have of the damage
}

// repairFrom writes the content at path over the damaged blocks of a volume.
func (a *app) repairFrom(c *cli.Context, path, name string) error {
	for _, flag := range []string{"compress", "logical-block"} {
		if c.IsSet(flag) {
			return usageError{c, fmt.Errorf("--repair changes no property of a volume: no --%s", flag)}
		}
	}
	src, closeSource, err := a.imageOf(c, path)
	if err != nil {
		return err
	}
	defer closeSource()
	if src.Size() < 0 {
		return usageError{c, errors.New("--repair needs a file whose size is known before it is read: no stream, and none that is compressed")}
	}
	return a.during(c, func(s owner.Store) error {
		bar := a.progress("repairing "+name, src.Size())
		rep, err := s.Repair(c.Context, name, src, bar.set)
		bar.finish()
		if err != nil {
			return partly(fmt.Errorf("repairing from %s: %w", path, err))
		}
		j := repairedJSON{name, rep.Bytes, lostOf(rep.Written), lostOf(rep.Left), lostOf(rep.Mended), lostOf(rep.Others)}
		if err := a.print(j, func() error { return a.printRepaired(j, path) }); err != nil {
			return err
		}
		if len(rep.Left) > 0 {
			return fmt.Errorf("%s is still damaged in %d ranges, where its map cannot be read: %w", name, len(rep.Left), cow.ErrCorrupt)
		}
		return nil
	})
}

func (a *app) printRepaired(j repairedJSON, path string) error {
	for _, part := range []struct {
		what string
		list []lostJSON
	}{{"written", j.Written}, {"mended", j.Mended}, {"still damaged", j.Left}, {"still damaged", j.Others}} {
		for _, r := range part.list {
			if _, err := fmt.Fprintf(a.stdout, "%s: %s, %d bytes at %d\n", part.what, r.Name, r.Length, r.Offset); err != nil {
				return err
			}
		}
	}
	if len(j.Written)+len(j.Left) == 0 {
		a.note("%s is not damaged", j.Name)
	}
	if len(j.Others) > 0 {
		a.note("%s is not proved to have what was lost there: of those that share the damage, only %s has its content", path, j.Name)
	}
	return nil
}
