package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) devicesCommand() *cli.Command {
	return a.command(arity{0, 1}, &cli.Command{
		Name:      "devices",
		Category:  groupAccess,
		Usage:     "list all ublk devices of this machine",
		UsageText: "vdisk devices [--prune [--force] [/dev/ublkbN]]",
		Description: "NAME is the volume or snapshot that the store serves as the device. STATE is the driver's; 'quiesced' means that the\n" +
			"device waits for a server.\n" +
			"--prune deletes dead devices that have no server. With a device it deletes that one, and with --force even if it waits,\n" +
			"as for a device whose store is lost. Use 'vdisk detach' for this store's devices.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "prune", Usage: "delete dead devices, or the named one, and print them"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "delete the named device even if it waits for its server: users see I/O errors"},
		},
	}, func(c *cli.Context) error {
		name := c.Args().First()
		switch {
		case c.Bool("prune"):
			return a.prune(c, name)
		case name != "" || c.Bool("force"):
			return usagef("a device and --force go with --prune")
		}
		list, err := owner.MachineDevices(c.Context, a.dir)
		if err != nil && len(list) == 0 {
			return err
		}
		return errors.Join(err, a.printDevices("devices", list, func(d owner.MachineDevice) []string {
			server := "-"
			if d.ServerPID != 0 {
				server = fmt.Sprintf("%d %s", d.ServerPID, d.Command)
			}
			return []string{d.Path, a.size(d.Size), d.State, dash(d.Name), server}
		}, heading{text: "DEVICE"}, heading{text: "SIZE", right: true}, heading{text: "STATE"}, heading{text: "NAME"}, heading{text: "SERVER"}))
	})
}

// prune deletes the named device, or all abandoned ones.
func (a *app) prune(c *cli.Context, name string) error {
	var deleted []owner.MachineDevice
	var err error
	if name != "" {
		var d owner.MachineDevice
		if d, err = owner.DeleteDevice(c.Context, a.dir, name, c.Bool("force")); err == nil {
			deleted = append(deleted, d)
		}
	} else if c.Bool("force") {
		return usagef("--force needs the device that is meant")
	} else {
		deleted, err = owner.Prune(c.Context, a.dir)
	}
	if len(deleted) == 0 && err == nil {
		a.note("there is nothing to delete")
	}
	return errors.Join(err, a.printDevices("deleted", deleted, func(d owner.MachineDevice) []string { return []string{d.Path, d.Abandoned} }))
}

// machineDeviceJSON is a ublk device of the machine in the JSON output.
type machineDeviceJSON struct {
	Path      string `json:"path"`
	Size      int64  `json:"size"`
	ReadOnly  bool   `json:"read_only"`
	State     string `json:"state"`
	Name      string `json:"name"`       // VOL or VOL@SNAP of the store; empty: not a device of the store
	ServerPID int    `json:"server_pid"` // 0: it has no server
	Server    string `json:"server"`
	Abandoned string `json:"abandoned,omitempty"` // why nobody can need it
}

// printDevices prints a table. Without a header it prints one line of words per device.
func (a *app) printDevices(name string, devices []owner.MachineDevice, row func(owner.MachineDevice) []string, header ...heading) error {
	list := []machineDeviceJSON{}
	var rows [][]string
	for _, d := range devices {
		list = append(list, machineDeviceJSON{d.Path, d.Size, d.ReadOnly, d.State, d.Name, d.ServerPID, d.Command, d.Abandoned})
		rows = append(rows, row(d))
	}
	return a.print(map[string]any{name: list}, func() error { return a.table(header, rows, len(header) == 0) })
}
