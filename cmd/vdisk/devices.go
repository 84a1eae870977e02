package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) devicesCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "devices",
		Category:  groupAccess,
		Usage:     "list the ublk devices of this machine, whoever serves them",
		UsageText: "vdisk devices [--prune]",
		Description: "NAME is what the store shows on a device; STATE is the driver's, quiesced for one that waits for a server.\n" +
			"--prune deletes what nobody can want any more: dead devices without a server, and those of this store that it does not know.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "prune", Usage: "delete abandoned devices, and print them"}},
	}, func(c *cli.Context) error {
		if c.Bool("prune") {
			deleted, err := owner.Prune(c.Context, a.dir)
			if len(deleted) == 0 && err == nil {
				a.note("there is nothing to delete")
			}
			if perr := a.printDevices("deleted", deleted, func(d owner.MachineDevice) []string { return []string{d.Path, d.Abandoned} }); err == nil {
				err = perr
			}
			return err
		}
		list, err := owner.MachineDevices(c.Context, a.dir)
		if err != nil {
			return err
		}
		return a.printDevices("devices", list, func(d owner.MachineDevice) []string {
			server := "-"
			if d.ServerPID != 0 {
				server = fmt.Sprintf("%d %s", d.ServerPID, d.Command)
			}
			return []string{d.Path, a.size(d.Size), d.State, dash(d.Name), server}
		}, "DEVICE", "SIZE", "STATE", "NAME", "SERVER")
	})
}

// machineDeviceJSON is a ublk device of the machine in the output for programs.
type machineDeviceJSON struct {
	Path      string `json:"path"`
	Size      int64  `json:"size"`
	ReadOnly  bool   `json:"read_only"`
	State     string `json:"state"`
	Name      string `json:"name"`       // VOL or VOL@SNAP of the store; empty: not the store's
	ServerPID int    `json:"server_pid"` // 0: none
	Server    string `json:"server"`
	Abandoned string `json:"abandoned,omitempty"` // why nobody can want it
}

// printDevices prints a list; without a header it is a line of words a device.
func (a *app) printDevices(name string, devices []owner.MachineDevice, row func(owner.MachineDevice) []string, header ...string) error {
	list := []machineDeviceJSON{}
	var rows [][]string
	for _, d := range devices {
		list = append(list, machineDeviceJSON{d.Path, d.Size, d.ReadOnly, d.State, d.Name, d.ServerPID, d.Command, d.Abandoned})
		rows = append(rows, row(d))
	}
	return a.print(map[string]any{name: list}, func() error { return a.table(header, rows, len(header) == 0) })
}
