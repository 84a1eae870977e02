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
		Usage:     "attach a volume or snapshot as a block device (ublk), and print its path",
		UsageText: "vdisk attach VOL[@SNAP] [--read-only] [--queues N] [--depth N] [--partscan|--no-partscan]",
		Description: "The process that owns the store serves the device. If there is none, a daemon is started, which ends with its last\n" +
			"device; its log is STORE/daemon.log. Snapshots are read-only. If the server is killed, the device stays, and I/O waits\n" +
			"until 'vdisk recover' or the next attach brings a server.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "read-only", Usage: "refuse writes"},
			&cli.IntFlag{Name: "queues", Usage: "hardware queues, each with a thread", DefaultText: "one for each CPU, at most 4"},
			&cli.BoolFlag{Name: "partscan", Usage: "let the kernel read the partition table (default for volumes)"},
			&cli.BoolFlag{Name: "no-partscan", Usage: "keep the kernel from reading the partition table, which a guest may have written (default for snapshots; Linux 7.0)"},
			&cli.IntFlag{Name: "depth", Usage: "requests in flight for each queue", DefaultText: "64"},
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

// notAttached gives the error that something is not attached a hint that says what is.
func notAttached(err error) error {
	var none noStoreError
	if !errors.Is(err, cow.ErrNotFound) || errors.As(err, &none) {
		return err
	}
	return hintedError{err, "'vdisk ls -t all -o name,device' shows what is attached"}
}

func (a *app) detachCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "detach",
		Category:  groupAccess,
		Usage:     "detach a block device",
		UsageText: "vdisk detach VOL[@SNAP]|/dev/ublkbN [--force]",
		Description: "A device that is open or mounted, or that waits for its server, is refused without --force. All data that was written\n" +
			"to it is durable when the command succeeds. If the volume cannot be flushed, the device stays; --force then removes it,\n" +
			"and the command fails.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "detach even if in use or waiting: users see I/O errors"}},
	}, func(c *cli.Context) error {
		err := a.with(c, func(s owner.Store) error { return s.Detach(c.Context, c.Args().First(), c.Bool("force")) })
		if errors.Is(err, cow.ErrElsewhere) && c.Bool("force") {
			err = owner.GiveUp(c.Context, a.dir, c.Args().First(), a.options(c))
		}
		if err != nil {
			return notAttached(err)
		}
		return a.print(map[string]any{"detached": c.Args().First()}, func() error { return nil })
	})
}
