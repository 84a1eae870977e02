package main

import (
	"context"
	"fmt"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) clientsCommand() *cli.Command {
	return a.command(arity{0, 1}, &cli.Command{
		Name:      "clients",
		Category:  groupAccess,
		Usage:     "list the NBD clients that are connected",
		UsageText: "vdisk clients [VOL[@SNAP]]",
		Description: "Each connection has a line; a client may have several. PID and USER are of the process that connected; over TCP there is\n" +
			"an address instead. The counters are of the requests since SINCE, when the client connected. With a volume, its clients\n" +
			"and those of its snapshots are listed. 'vdisk disconnect' puts clients out.",
	}, func(c *cli.Context) error {
		var of cow.Ref
		if c.NArg() > 0 {
			var err error
			if of, err = ref(c, 0); err != nil {
				return err
			}
		}
		return a.look(c, func(s owner.Store) error {
			if of.Volume != "" {
				if _, err := exportNames(c.Context, s, owner.ServeOptions{Exports: []cow.Ref{of}}); err != nil {
					return err
				}
			}
			list, err := clientsOf(c.Context, s, of)
			if err != nil {
				return err
			}
			return a.print(map[string]any{"clients": list}, func() error { return a.printClients(list) })
		})
	})
}

func (a *app) disconnectCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "disconnect",
		Category:  groupAccess,
		Usage:     "put out NBD clients",
		UsageText: "vdisk disconnect VOL[@SNAP]|nbd:N|pid:N",
		Description: "Ends the connections that have a volume or snapshot open, a connection that 'vdisk clients' lists (nbd:N), or all\n" +
			"connections of a process (pid:N), and prints them. Requests under way are finished and answered first; a client that takes\n" +
			"no answers is cut off after 10 seconds. When the command returns, the volume is free. Nothing keeps a client from\n" +
			"connecting again; QEMU does so by itself if it was given reconnect-delay.",
	}, func(c *cli.Context) error {
		return a.with(c, func(s owner.Store) error {
			ended, err := s.Disconnect(c.Context, c.Args().First())
			if err != nil {
				return err
			}
			list := []clientJSON{}
			for _, d := range ended {
				list = append(list, clientJSONOf(d))
			}
			return a.print(map[string]any{"disconnected": list}, func() error {
				for _, d := range list {
					if _, err := fmt.Fprintln(a.stdout, d.text()); err != nil {
						return err
					}
				}
				return nil
			})
		})
	})
}

// clientJSON is the connection of an NBD client in the JSON output.
type clientJSON struct {
	Client       string    `json:"client"`            // nbd:N
	Name         string    `json:"name"`              // VOL, VOL@SNAP, or empty if it has opened nothing yet
	Mode         string    `json:"mode"`              // read-write, read-only or empty
	PID          int       `json:"pid"`               // 0: not known
	UID          int       `json:"uid"`               // -1: not known
	Command      string    `json:"command"`           // of the process; empty: not known
	Address      string    `json:"address,omitempty"` // over TCP
	TLS          bool      `json:"tls"`
	Socket       string    `json:"socket"` // of the service
	Since        time.Time `json:"since"`
	Requests     uint64    `json:"requests"`
	ReadBytes    uint64    `json:"read_bytes"`
	WrittenBytes uint64    `json:"written_bytes"`
	Errors       uint64    `json:"errors"`
}

func clientJSONOf(c owner.NBDClient) clientJSON {
	j := clientJSON{
		Client: c.ID, Name: c.Name, PID: c.PID, UID: c.UID, Command: c.Command, Address: c.Address, TLS: c.TLS, Socket: c.Socket,
		Since: c.Since.UTC(), Requests: c.Counters.Requests, ReadBytes: c.Counters.ReadBytes, WrittenBytes: c.Counters.WrittenBytes,
		Errors: c.Counters.Errors,
	}
	switch {
	case c.Name == "":
	case c.ReadOnly:
		j.Mode = "read-only"
	default:
		j.Mode = "read-write"
	}
	return j
}

// clientsOf lists the connections of NBD clients that have a volume, or a snapshot of it, open; or a snapshot; or of all.
func clientsOf(ctx context.Context, s owner.Store, of cow.Ref) (list []clientJSON, err error) {
	all, err := s.Clients(ctx)
	list = []clientJSON{}
	for _, c := range all {
		r, perr := cow.ParseRef(c.Name)
		if of.Volume == "" || perr == nil && (r == of || of.Snapshot == "" && r.Volume == of.Volume) {
			list = append(list, clientJSONOf(c))
		}
	}
	return list, err
}

func (a *app) printClients(list []clientJSON) error {
	header := append(headings("CLIENT", "NAME", "MODE", "PID", "USER", "PROGRAM"), numbers("REQUESTS", "READ", "WRITTEN", "ERRORS")...)
	header = append(header, headings("SINCE")...)
	var rows [][]string
	for _, c := range list {
		rows = append(rows, []string{
			c.Client, dash(c.Name), dash(c.Mode), c.pid(), dash(c.user()), dash(c.program()),
			fmt.Sprint(c.Requests), a.size(int64(c.ReadBytes)), a.size(int64(c.WrittenBytes)), fmt.Sprint(c.Errors), when(c.Since),
		})
	}
	return a.table(header, rows, false)
}

// text describes a client in a line.
func (c clientJSON) text() string {
	text := c.Client
	if c.Name != "" {
		text += fmt.Sprintf(": %s, %s", c.Name, c.Mode)
	}
	switch {
	case c.PID != 0:
		text += fmt.Sprintf(", pid %d (%s)", c.PID, dash(c.program()))
	case c.Address != "":
		text += ", from " + c.Address
	}
	return text
}

func (c clientJSON) pid() string {
	if c.PID == 0 {
		return "-"
	}
	return strconv.Itoa(c.PID)
}

// user returns the name of the client's user, or its number if it has none; of a client over TCP, its address.
func (c clientJSON) user() string {
	if c.UID < 0 {
		return c.Address
	}
	if u, err := user.LookupId(strconv.Itoa(c.UID)); err == nil {
		return u.Username
	}
	return strconv.Itoa(c.UID)
}

// program returns the name of the client's program.
func (c clientJSON) program() string {
	first, _, _ := strings.Cut(c.Command, " ")
	if first == "" {
		return ""
	}
	return filepath.Base(first)
}
