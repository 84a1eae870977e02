package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) featuresCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "features",
		Category:  groupAccess,
		Usage:     "show what this machine supports: ublk, io_uring, NBD, safety when memory is short",
		UsageText: "vdisk features",
	}, func(c *cli.Context) error {
		m := featuresJSON{MachineFeatures: owner.Machine()}
		m.ReclaimOf, m.Reclaim = a.reclaim(c)
		return a.print(m, func() error {
			list := [][2]string{{"kernel", m.Kernel}, {"attach (ublk)", yes(m.Ublk.Available, m.Ublk.Reason)}}
			for _, f := range m.Ublk.Features {
				list = append(list, [2]string{"", f.Name + " (Linux " + f.Since + ")"})
			}
			return a.fields(append(list,
				[2]string{"io_uring", yes(m.IOUring.Available, m.IOUring.Reason)},
				[2]string{"serve (NBD)", "yes: needs nothing of the kernel"},
				[2]string{"kernel's NBD client", yes(m.NBDClient.Available, m.NBDClient.Reason)},
				[2]string{"safe when memory is short", "as " + m.ReclaimOf + ":"},
				[2]string{"  I/O flusher", yes(m.Reclaim.IOFlusher.Available, m.Reclaim.IOFlusher.Reason)},
				[2]string{"  locked memory", yes(m.Reclaim.LockedMemory.Available, m.Reclaim.LockedMemory.Reason)},
				[2]string{"  oom_score_adj", yes(m.Reclaim.OOMScore.Available, m.Reclaim.OOMScore.Reason)},
				[2]string{"  mount namespace", yes(m.Reclaim.MountNamespace.Available, m.Reclaim.MountNamespace.Reason)},
			))
		})
	})
}

// featuresJSON describes the machine in the JSON output.
type featuresJSON struct {
	owner.MachineFeatures
	ReclaimOf string        `json:"reclaim_of"` // the process that Reclaim describes
	Reclaim   owner.Reclaim `json:"reclaim"`
}

// reclaim returns the measures that keep the process which serves the store's devices from waiting for itself. If there
// is no such process, it returns those of a daemon that this user would start.
func (a *app) reclaim(c *cli.Context) (of string, r owner.Reclaim) {
	if st, err := owner.Running(c.Context, a.dir, a.options(c)); err == nil && st.Reclaim != nil {
		return fmt.Sprintf("pid %d (%s)", st.PID, st.Command), *st.Reclaim
	}
	return "a daemon started from here", owner.PrepareForReclaim()
}

func yes(available bool, reason string) string {
	if available {
		return "yes"
	}
	return "no: " + reason
}

// jsonVersion is the version of the JSON output: docs/json.md.
const jsonVersion = 1

// versionJSON describes the program in the JSON output.
type versionJSON struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	JSON     int    `json:"json_version"` // of what docs/json.md describes
	Format   uint32 `json:"store_format"` // the newest store format that it knows
	Handover int    `json:"handover"`     // the version of the hand-over that it supports
	NBD      int    `json:"handover_nbd"` // the same, of NBD clients
}

func (a *app) versionCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "version",
		Category:  groupMaintenance,
		Usage:     "print the version",
		UsageText: "vdisk version",
	}, func(*cli.Context) error {
		j := versionJSON{version(), runtime.Version(), jsonVersion, format.StoreVersion, owner.HandoverVersion, owner.NBDHandoverVersion}
		return a.print(j, func() error {
			_, err := fmt.Fprintf(a.stdout, "vdisk %s, store format %d, %s\n", j.Version, j.Format, j.Go)
			return err
		})
	})
}

// described is git's description of the commit that the program was built from. The Makefile sets it.
var described string

// version returns the module's version if the program was installed as a module, otherwise the commit.
func version() string {
	if described != "" {
		return described
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value[:min(12, len(s.Value))]
		}
	}
	return "unknown"
}
