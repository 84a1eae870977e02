package main

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) sendCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "send",
		Category:  groupData,
		Usage:     "write a snapshot to standard output, for 'vdisk receive'",
		UsageText: "vdisk send [-i @BASE | -I @BASE] VOL@SNAP [--resume BLOCK] [-n]",
		Description: "Without -i all of the snapshot is sent, and with -i what differs from the snapshot BASE, which the receiver must have. BASE\n" +
			"is @NAME, a snapshot of VOL, or VOL2@NAME: a clone is sent from its origin. -I also sends the snapshots between the two.\n" +
			"Data goes as it is stored, compressed. If a transfer is cut, 'vdisk receive' says with which --resume to go on.\n" +
			"Every block is verified before it is sent: damage ends the stream, and 'vdisk receive' then makes no snapshot.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "incremental", Aliases: []string{"i"}, Usage: "send only what differs from the snapshot `BASE`"},
			&cli.StringFlag{Name: "intermediate", Aliases: []string{"I"}, Usage: "as -i, and also send the snapshots between `BASE` and SNAP"},
			&cli.StringFlag{Name: "resume", Usage: "begin at `BLOCK`, which 'vdisk receive' has named"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "only show about how much would be sent"},
		},
	}, a.send)
}

// sendOptions parses the flags and the argument of send.
func sendOptions(c *cli.Context) (o cow.SendOptions, err error) {
	if o.Snapshot, err = snapshotRef(c, 0); err != nil {
		return o, err
	}
	base := ""
	switch o.Between = c.IsSet("intermediate"); {
	case o.Between && c.IsSet("incremental"):
		return o, usageError{c, errors.New("-i and -I exclude each other")}
	case o.Between:
		base = "intermediate"
	case c.IsSet("incremental"):
		base = "incremental"
	}
	if base != "" {
		if o.Base, err = baseRef(c, base, o.Snapshot.Volume); err != nil {
			return o, err
		}
	}
	if text := c.String("resume"); c.IsSet("resume") {
		if o.From, err = strconv.ParseUint(text, 10, 64); err != nil {
			return o, usageError{c, fmt.Errorf("--resume %q: the number of a block is needed, as 'vdisk receive' has named it", text)}
		}
	}
	o.Estimate = c.Bool("dry-run")
	return o, nil
}

// sentJSON is a stream that send would write, in the JSON output.
type sentJSON struct {
	Snapshot string `json:"snapshot"`
	Base     string `json:"base"` // VOL@SNAP, or empty
	GUID     string `json:"guid"`
	Units    uint64 `json:"units"`
	Holes    uint64 `json:"holes"`
	Data     uint64 `json:"data_bytes"` // before compression
	Length   int64  `json:"length"`     // of the stream, estimated
}

func (a *app) send(c *cli.Context) error {
	o, err := sendOptions(c)
	if err != nil {
		return err
	}
	if !o.Estimate && isTerminal(rawOf(a.stdout)) {
		return usagef("standard output is a terminal: redirect it into 'vdisk receive' or a file")
	}
	return a.lookLong(c, a.streaming(!o.Estimate, func(s owner.Store) error {
		bar := a.progress("sending "+o.Snapshot.String(), -1)
		o.Progress = bar.of
		sent, err := s.Send(c.Context, o, rawOf(a.stdout))
		bar.finish()
		if err != nil || !o.Estimate {
			return err
		}
		list := []sentJSON{}
		for _, t := range sent {
			j := sentJSON{Snapshot: t.Snapshot.String(), GUID: t.GUID.String(), Units: t.Units, Holes: t.Holes, Data: t.Blocks * 4096, Length: t.Length}
			if t.Base.Volume != "" {
				j.Base = t.Base.String()
			}
			list = append(list, j)
		}
		return a.print(map[string]any{"streams": list}, func() error {
			for _, j := range list {
				from := ""
				if j.Base != "" {
					from = " from " + j.Base
				}
				if _, err := fmt.Fprintf(a.stdout, "%s%s: about %s, for %s of data and %d holes\n", j.Snapshot, from, a.size(j.Length), a.size(int64(j.Data)), j.Holes); err != nil {
					return err
				}
			}
			return nil
		})
	}))
}
