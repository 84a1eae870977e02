package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) attachCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "attach",
		Category:  groupAccess,
		Usage:     "make a block device (ublk) of a volume or snapshot, and print its path",
		UsageText: "vdisk attach VOL[@SNAP] [--read-only] [--queues N] [--depth N] [--partscan|--no-partscan]",
		Description: "The device is served by the process that owns the store; when there is none, a daemon is started, which ends\n" +
			"with the last device. Its log is STORE/daemon.log. Snapshots are read-only. When the process is killed, the device stays and its\n" +
			"users wait, until 'vdisk recover', or the next attach, brings its server back.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "read-only", Usage: "refuse writes"},
			&cli.IntFlag{Name: "queues", Usage: "hardware queues, each with a thread (default: one a CPU, at most 4)"},
			&cli.BoolFlag{Name: "partscan", Usage: "have the kernel read the partition table (default for volumes)"},
			&cli.BoolFlag{Name: "no-partscan", Usage: "have it left alone: whoever writes the disk writes the table (default for snapshots; Linux 7.0)"},
			&cli.IntFlag{Name: "depth", Usage: "requests under way in a queue (default: 64)"},
		},
	}, a.attach)
}

func (a *app) attach(c *cli.Context) error {
	r, err := ref(c, 0)
	if err != nil {
		return err
	}
	for _, flag := range []string{"queues", "depth"} {
		if c.IsSet(flag) && c.Int(flag) < 1 {
			return usageError{c, fmt.Errorf("--%s %d: at least 1 is needed", flag, c.Int(flag))}
		}
	}
	scan := ""
	switch {
	case c.Bool("partscan") && c.Bool("no-partscan"):
		return usageError{c, errors.New("--partscan and --no-partscan exclude each other")}
	case c.Bool("partscan"):
		scan = "yes"
	case c.Bool("no-partscan"):
		scan = "no"
	}
	s, _, err := owner.OpenLasting(c.Context, a.dir, a.options(c), a.daemonArgs())
	if err != nil {
		return err
	}
	defer s.Close()
	d, err := s.Attach(c.Context, owner.AttachOptions{
		Ref: r, ReadOnly: c.Bool("read-only"), Queues: c.Int("queues"), Depth: c.Int("depth"), PartScan: scan,
	})
	if err != nil {
		return err
	}
	return a.print(deviceJSONOf(d), func() error {
		_, err := fmt.Fprintln(a.stdout, d.Path)
		return err
	})
}

func (a *app) detachCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "detach",
		Category:  groupAccess,
		Usage:     "remove a block device",
		UsageText: "vdisk detach VOL[@SNAP]|/dev/ublkbN [--force]",
		Description: "A device that is open or mounted, or that waits for its server, is left alone, unless forced. All that was written to it is\n" +
			"durable when the command succeeds. When the volume cannot be flushed, the device stays; --force removes it, and the\n" +
			"command fails.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "also what is in use or waits: its users see I/O errors"}},
	}, func(c *cli.Context) error {
		err := a.with(c, func(s owner.Store) error { return s.Detach(c.Context, c.Args().First(), c.Bool("force")) })
		if errors.Is(err, cow.ErrElsewhere) && c.Bool("force") {
			err = owner.GiveUp(c.Context, a.dir, c.Args().First(), a.options(c))
		}
		return err
	})
}
