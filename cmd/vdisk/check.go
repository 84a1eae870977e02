package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) checkCommand() *cli.Command {
	return a.command(arity{0, 1}, &cli.Command{
		Name:      "check",
		Category:  groupMaintenance,
		Usage:     "verify the store, or one volume",
		UsageText: "vdisk check [VOL] [--read-data] [--repair]",
		Description: "With VOL: its blocks, and those of its snapshots and origins. Only a check of the whole store finds leaked space.\n" +
			"Of damage, it names the volumes and snapshots that have it, each with OFFSET+LENGTH in bytes.\n" +
			"Exit codes: 0 all is well, 6 something is damaged, 1 something could not be read, 7 only space is leaked.\n" +
			"If log records that had been durable cannot be read any more, every command refuses the store, names the damaged place\n" +
			"and what lies behind it, and changes nothing. If there is no better copy of that file, --repair ends the log there. The\n" +
			"files behind are kept in the store's folder chunks.aside until you delete them.\n" +
			"The second copy of the table is verified, too. If it is bad and the table is sound, a new one is made.\n" +
			"--repair also makes right the counts in the table that a check of the whole store finds wrong, if nothing else is: the live\n" +
			"bytes of chunks, the numbers of moved blocks, the list of changes. It lists them, and keeps the old table as\n" +
			"meta.db.aside-N. No process may have the store open for that. If more is damaged: 'vdisk metadata rebuild'.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "read-data", Usage: "also read and verify all data"},
			&cli.BoolFlag{Name: "repair", Usage: "make wrong counts right; if the log is damaged, give up the records behind, so that the store can be opened"},
		},
	}, a.check)
}

// problemJSON is one problem in the JSON output.
type problemJSON struct {
	Kind  string `json:"kind"` // corrupt, unreadable, leak or copy
	Where string `json:"where"`
	What  string `json:"what"`
	// Lost is what volumes and snapshots lose by it, in the order of their names.
	Lost []lostJSON `json:"lost,omitempty"`
}

// checkJSON is the result of a check in the JSON output.
type checkJSON struct {
	OK         bool          `json:"ok"`
	Problems   []problemJSON `json:"problems"`
	Corrupt    int           `json:"corrupt"`
	Unreadable int           `json:"unreadable"` // things that could not be read
	Leaks      int           `json:"leaks"`
	Branches   int64         `json:"branches"`
	Leaves     int64         `json:"leaves"`
	Entries    int64         `json:"entries"`
	Chunks     int64         `json:"chunk_files"`
	LiveBytes  int64         `json:"live_bytes"`
	DataBytes  int64         `json:"data_bytes"`         // read and verified
	Repaired   []string      `json:"repaired,omitempty"` // what the repair gave up
	Mended     []problemJSON `json:"mended,omitempty"`   // wrong counts that are right now
	Aside      string        `json:"aside,omitempty"`    // the old table, if there were any
	Unmended   string        `json:"unmended,omitempty"` // why wrong counts were left
}

func (a *app) check(c *cli.Context) error {
	name := ""
	if c.NArg() > 0 {
		var err error
		if name, err = volumeName(c, 0); err != nil {
			return err
		}
	}
	j := checkJSON{Problems: []problemJSON{}}
	opts := a.options(c)
	opts.Offer, opts.Temporary, opts.Look = true, true, !c.Bool("repair")
	if !opts.Look {
		opts.Repair = func(d *cow.LogDamage) error {
			if j.Repaired = append(j.Repaired, d.Error()); !a.json {
				fmt.Fprintf(a.stdout, "given up: %v\n", d)
			}
			return nil
		}
	}
	if !opts.Look && name == "" {
		if err := a.mendTable(c, &j); err != nil {
			return err
		}
	}
	return use(func(s owner.Store) error {
		bar := a.bar("checking", -1)
		o := cow.CheckOptions{ReadData: c.Bool("read-data"), Volume: name, Progress: bar.of}
		r, err := s.Check(c.Context, o, func(p cow.Problem) {
			if a.json {
				j.Problems = append(j.Problems, problemJSON{p.Kind, p.Where, p.What, lostOf(p.Lost)})
				return
			}
			bar.finish()
			fmt.Fprintf(a.stdout, "%s: %s: %s\n", p.Kind, p.Where, p.What)
			if len(p.Lost) > 0 {
				fmt.Fprintf(a.stdout, "  takes %s\n", lostText(lostOf(p.Lost)))
			}
		})
		bar.finish()
		if err != nil {
			return err
		}
		j.OK, j.Corrupt, j.Unreadable, j.Leaks = r.Corrupt+r.Unreadable+r.Leaks == 0, r.Corrupt, r.Unreadable, r.Leaks
		j.Branches, j.Leaves, j.Entries, j.Chunks, j.LiveBytes, j.DataBytes = r.Branches, r.Versions, r.Entries, r.Chunks, r.LiveBytes, r.DataBytes
		if err := a.print(j, func() error { return a.checked(j, o.ReadData) }); err != nil {
			return err
		}
		return verdict(r)
	})(owner.Open(c.Context, a.dir, opts))
}

// mendTable makes wrong counts in the table right. If it cannot, the check goes on, and finds them.
func (a *app) mendTable(c *cli.Context, j *checkJSON) error {
	m, err := cow.MendTable(c.Context, a.dir, a.repairOptions())
	if err != nil {
		j.Unmended = err.Error()
		return nil
	}
	for _, p := range m.Problems {
		j.Mended = append(j.Mended, problemJSON{p.Kind, p.Where, p.What, lostOf(p.Lost)})
	}
	if j.Aside = m.Aside; a.json || j.Aside == "" {
		return nil
	}
	for _, p := range j.Mended {
		fmt.Fprintf(a.stdout, "made right: %s: %s\n", p.Where, p.What)
	}
	_, err = fmt.Fprintf(a.stdout, "the old table is kept as %s\n", j.Aside)
	return err
}

func (a *app) checked(j checkJSON, readData bool) error {
	if j.Unmended != "" && !j.OK {
		fmt.Fprintf(a.stdout, "no count was made right: %s\n", j.Unmended)
	}
	data := ""
	if readData {
		data = fmt.Sprintf(", %s of data read", a.size(j.DataBytes))
	}
	unreadable := ""
	if j.Unreadable > 0 {
		unreadable = fmt.Sprintf(", %d not looked at", j.Unreadable)
	}
	_, err := fmt.Fprintf(a.stdout, "%d branches, %d leaves, %d entries, %d chunks, %s live%s: %d corrupt, %d leaks%s\n",
		j.Branches, j.Leaves, j.Entries, j.Chunks, a.size(j.LiveBytes), data, j.Corrupt, j.Leaks, unreadable)
	return err
}

func verdict(r cow.CheckReport) error {
	switch {
	case r.Corrupt > 0:
		return fmt.Errorf("the check found %d damaged places: %w", r.Corrupt, cow.ErrCorrupt)
	case r.Unreadable > 0:
		return fmt.Errorf("the check could not look at %d places, and proves nothing of them", r.Unreadable)
	case r.Leaks > 0:
		return fmt.Errorf("the check found %d leaks: %w", r.Leaks, errLeaks)
	}
	return nil
}
