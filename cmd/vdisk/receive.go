package main

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) receiveCommand() *cli.Command {
	return a.command(arity{1, 2}, &cli.Command{
		Name:      "receive",
		Category:  groupData,
		Usage:     "make snapshots of what 'vdisk send' wrote",
		UsageText: "vdisk receive VOL[@NAME] [FILE|-] [--force] [-n]\n   vdisk receive --abort VOL",
		Description: "Streams are read from FILE, or from standard input. A full stream makes the volume VOL. An incremental one goes on top of\n" +
			"its base, which must be here: VOL must not be open, nor have changed since; --force gives up what has changed. If there\n" +
			"is no VOL, it becomes a clone of the base. The snapshot keeps its name, unless NAME is given.\n" +
			"A stream is received as a whole. If it is cut, VOL stays as it is, the message says how to go on, and 'vdisk ls -t all'\n" +
			"shows what is there of it: a volume VOL.receiving, which --abort removes.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "give up what has changed in VOL since the base"},
			&cli.BoolFlag{Name: "abort", Usage: "give up what has been received of VOL"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "verify the streams, and show what would be received"},
		},
	}, a.receive)
}

// receivedJSON is a snapshot that was received, in the JSON output.
type receivedJSON struct {
	Snapshot string `json:"snapshot"`
	Base     string `json:"base"` // VOL@SNAP here; empty: there is none, or it was known to the part before
	GUID     string `json:"guid"`
	From     uint64 `json:"from"` // the block at which the stream began
	Units    uint64 `json:"units"`
	Holes    uint64 `json:"holes"`
	Data     uint64 `json:"data_bytes"` // before compression
	Length   int64  `json:"length"`     // of the stream
}

func (a *app) receive(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	if c.Bool("abort") {
		if c.NArg() > 1 || r.Snapshot != "" || c.Bool("force") || c.Bool("dry-run") {
			return usageError{c, fmt.Errorf("--abort takes a volume, and nothing else")}
		}
		return a.with(c, func(s owner.Store) error {
			if err := s.AbortReceive(c.Context, r.Volume); err != nil {
				return err
			}
			return a.print(map[string]any{"aborted": r.Volume}, func() error { return nil })
		})
	}
	path := "-"
	if c.NArg() > 1 {
		path = c.Args().Get(1)
	}
	in, done, err := a.input(c, path, sentStream)
	if err != nil {
		return err
	}
	defer done()
	o := cow.ReceiveOptions{Target: r, Force: c.Bool("force"), DryRun: c.Bool("dry-run")}
	run := a.duringNew
	if o.DryRun {
		run = a.during
	}
	return run(c, func(s owner.Store) error {
		bar := a.progress("receiving "+r.Volume, -1)
		list, err := s.Receive(c.Context, &countedReader{r: in, count: bar.set}, o)
		bar.finish()
		if len(list) > 0 {
			if perr := a.printReceived(list, o.DryRun); perr != nil && err == nil {
				err = perr
			}
		}
		switch {
		case errors.Is(err, cow.ErrNotFound):
			return hintedError{err, "'vdisk info VOL' shows the GUIDs of snapshots; send from one that both stores have (-i), or all of it"}
		case errors.Is(err, cow.ErrExists):
			return hintedError{err, "'vdisk ls -t all' lists what there is; what was received already need not be sent, and 'vdisk receive VOL@NAME' chooses other names"}
		}
		return partly(err)
	})
}

// countedReader reports how much has been read.
type countedReader struct {
	r     io.Reader
	n     atomic.Int64
	count func(int64)
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.count(r.n.Add(int64(n)))
	return n, err
}

func (a *app) printReceived(received []cow.Received, dry bool) error {
	list := []receivedJSON{}
	for _, t := range received {
		j := receivedJSON{
			Snapshot: t.Snapshot.String(), GUID: t.GUID.String(), From: t.From, Units: t.Units, Holes: t.Holes, Data: t.Blocks * 4096, Length: t.Length,
		}
		if t.Base.Volume != "" {
			j.Base = t.Base.String()
		}
		list = append(list, j)
	}
	name := "received"
	if dry {
		name = "would_receive"
	}
	return a.print(map[string]any{name: list}, func() error {
		for _, j := range list {
			verb := "received"
			if dry {
				verb = "would receive"
			}
			if _, err := fmt.Fprintf(a.stdout, "%s %s: %s of data and %d holes in %s\n", verb, j.Snapshot, a.size(int64(j.Data)), j.Holes, a.size(j.Length)); err != nil {
				return err
			}
		}
		return nil
	})
}
