package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) infoCommand() *cli.Command {
	return a.command(arity{0, 1}, &cli.Command{
		Name:      "info",
		Category:  groupVolumes,
		Usage:     "describe the store, a volume or a snapshot",
		UsageText: "vdisk info [VOL[@SNAP]]",
	}, func(c *cli.Context) error {
		if c.NArg() == 0 {
			return a.look(c, func(s owner.Store) error { return a.storeInfo(c, s) })
		}
		r, err := ref(c, 0)
		if err != nil {
			return err
		}
		return a.look(c, func(s owner.Store) error { return a.refInfo(c, s, r) })
	})
}

// storeJSON describes the store in the JSON output.
type storeJSON struct {
	Store       string       `json:"store"`
	UUID        string       `json:"uuid"`
	Version     int          `json:"version"`
	Created     time.Time    `json:"created"`
	Volumes     int          `json:"volumes"`
	Snapshots   int          `json:"snapshots"`
	ChunkFiles  int          `json:"chunk_files"`
	ChunkBytes  int64        `json:"chunk_bytes"` // size of the log's files
	LiveBytes   int64        `json:"live_bytes"`  // live data in them
	MetaBytes   int64        `json:"meta_bytes"`
	CopyBytes   int64        `json:"copy_bytes"`    // second copy of the table; 0: none
	FreeBytes   int64        `json:"free_bytes"`    // free space of the file system
	Reserve     int64        `json:"reserve_bytes"` // space that the store reserves for a full disk
	FillBytes   *int64       `json:"fill_bytes"`    // stored; null: not known
	FullAtBytes *int64       `json:"full_at_bytes"` // so much stored refuses new data
	FillPercent *int         `json:"fill_percent"`
	AsideFiles  int          `json:"aside_files"` // chunk files in STORE/chunks.aside; -1: cannot be listed
	AsideBytes  int64        `json:"aside_bytes"` // their size
	Scrub       scrubJSON    `json:"scrub"`
	Owner       *ownerJSON   `json:"owner"`   // null if no other process has the store open
	Waiting     []deviceJSON `json:"waiting"` // devices without a server
}

type ownerJSON struct {
	PID      int           `json:"pid"`
	Command  string        `json:"command"`
	Version  string        `json:"version"`
	Started  time.Time     `json:"started"`
	Devices  []deviceJSON  `json:"devices"`
	Services []serviceJSON `json:"services"`
	Clients  []clientJSON  `json:"clients"` // connections of NBD clients
}

// deviceJSON is an attached device in the JSON output.
type deviceJSON struct {
	Name     string `json:"name"` // VOL or VOL@SNAP
	Path     string `json:"path"`
	ReadOnly bool   `json:"read_only"`
	State    string `json:"state"`           // live, or waits for a server
	Error    string `json:"error,omitempty"` // why it still waits
}

type serviceJSON struct {
	Socket   string   `json:"socket"`
	ReadOnly bool     `json:"read_only"`
	Exports  []string `json:"exports"` // empty: all
	Clients  int      `json:"clients"`
}

func deviceJSONOf(d owner.Device) deviceJSON {
	return deviceJSON{Name: d.Ref.String(), Path: d.Path, ReadOnly: d.ReadOnly, State: stateOf(d), Error: d.Error}
}

// stateOf returns "live" for a served device and "waits" for a waiting one.
func stateOf(d owner.Device) string {
	if d.Waits {
		return "waits"
	}
	return "live"
}

// shown returns a device's path, and its state if that is not the usual one.
func shown(path, state string) string {
	if state == "waits" {
		return path + " (waits)"
	}
	return path
}

func ownerOf(s owner.Store, st owner.Status) *ownerJSON {
	if _, remote := s.(*owner.Client); !remote {
		return nil
	}
	j := &ownerJSON{PID: st.PID, Command: st.Command, Version: st.Version, Started: st.Started.UTC(), Devices: []deviceJSON{}, Services: []serviceJSON{}, Clients: []clientJSON{}}
	for _, d := range st.Devices {
		if !d.Waits {
			j.Devices = append(j.Devices, deviceJSONOf(d))
		}
	}
	for _, v := range st.Services {
		j.Services = append(j.Services, serviceJSON{Socket: v.Socket, ReadOnly: v.ReadOnly, Exports: v.Exports, Clients: v.Clients})
	}
	return j
}

func (a *app) storeInfo(c *cli.Context, s owner.Store) error {
	st, err := s.Status(c.Context)
	if err != nil {
		return err
	}
	i, err := s.Info(c.Context)
	if err != nil {
		return err
	}
	j := storeJSON{
		Store: a.dir, UUID: i.UUID, Version: i.Version, Created: i.Created.UTC(), Volumes: i.Volumes, Snapshots: i.Snapshots,
		ChunkFiles: i.Chunks, ChunkBytes: i.ChunkBytes, LiveBytes: i.LiveBytes, MetaBytes: i.MetaBytes, CopyBytes: i.CopyBytes, FreeBytes: i.FreeBytes, Reserve: i.ReserveBytes, AsideFiles: i.AsideFiles, AsideBytes: i.AsideBytes, Scrub: scrubOf(i.Scrub), Owner: ownerOf(s, st), Waiting: []deviceJSON{},
	}
	if f := i.Fill; f != nil {
		percent := f.Percent()
		j.FillBytes, j.FullAtBytes, j.FillPercent = &f.Bytes, &f.FullAt, &percent
	}
	if j.Owner != nil {
		if j.Owner.Clients, err = clientsOf(c.Context, s, cow.Ref{}); err != nil {
			return err
		}
	}
	for _, d := range st.Devices {
		if d.Waits {
			j.Waiting = append(j.Waiting, deviceJSONOf(d))
		}
	}
	return a.print(j, func() error { return a.fields(storeFields(a, j)) })
}

func copyText(a *app, j storeJSON) string {
	if j.CopyBytes == 0 {
		return "no second copy"
	}
	return "a second copy of " + a.size(j.CopyBytes)
}

func storeFields(a *app, j storeJSON) [][2]string {
	f := [][2]string{
		{"store", j.Store},
		{"uuid", j.UUID},
		{"format", fmt.Sprint(j.Version)},
		{"created", when(j.Created)},
		{"volumes", fmt.Sprint(j.Volumes)},
		{"snapshots", fmt.Sprint(j.Snapshots)},
		{"log", fmt.Sprintf("%s in %d chunks, %s live", a.size(j.ChunkBytes), j.ChunkFiles, a.size(j.LiveBytes))},
		{"table", a.size(j.MetaBytes) + ", and " + copyText(a, j)},
		{"free", fmt.Sprintf("%s, and %s kept for when the file system is full", a.size(j.FreeBytes), a.size(j.Reserve))},
	}
	if j.FillBytes != nil {
		f = append(f, [2]string{"fill", fillText(a, cow.Fill{Bytes: *j.FillBytes, FullAt: *j.FullAtBytes})})
	}
	switch {
	case j.AsideFiles < 0:
		f = append(f, [2]string{"set aside", "the files in chunks.aside cannot be listed"})
	case j.AsideFiles > 0:
		f = append(f, [2]string{"set aside", fmt.Sprintf("%d files, %s, in chunks.aside", j.AsideFiles, a.size(j.AsideBytes))})
	}
	f = append(f, scrubFields(a, j.Scrub)...)
	for _, d := range j.Waiting {
		text := d.Name + " as " + d.Path + " for a server"
		if d.Error != "" {
			text += ": " + d.Error
		}
		f = append(f, [2]string{"waits", text})
	}
	if j.Owner == nil {
		return append(f, [2]string{"owner", "none"})
	}
	f = append(f, [2]string{"owner", fmt.Sprintf("pid %d (%s), since %s", j.Owner.PID, j.Owner.Command, when(j.Owner.Started))})
	for _, d := range j.Owner.Devices {
		f = append(f, [2]string{"attached", d.Name + " as " + d.Path})
	}
	for _, v := range j.Owner.Services {
		what := "all volumes and snapshots"
		if len(v.Exports) > 0 {
			what = strings.Join(v.Exports, ", ")
		}
		f = append(f, [2]string{"served", fmt.Sprintf("%s at %s, %d clients", what, v.Socket, v.Clients)})
	}
	return append(f, clientFields(j.Owner.Clients)...)
}

// fewClients is how many clients 'info' shows; 'vdisk clients' lists all.
const fewClients = 10

func clientFields(list []clientJSON) (f [][2]string) {
	for i, c := range list {
		if i == fewClients {
			return append(f, [2]string{"client", fmt.Sprintf("%d more; 'vdisk clients' lists all", len(list)-i)})
		}
		f = append(f, [2]string{"client", c.text()})
	}
	return f
}

func (a *app) refInfo(c *cli.Context, s owner.Store, r cow.Ref) error {
	v, err := s.Volume(c.Context, r.Volume)
	if err != nil {
		return err
	}
	j := volumeOf(v)
	if j.Clients, err = clientsOf(c.Context, s, cow.Ref{Volume: r.Volume}); err != nil {
		return err
	}
	var us []cow.Usage
	if r.Snapshot != "" {
		us, err = s.Usage(c.Context, r)
	} else {
		us, err = s.VolumeUsage(c.Context, v.Name)
	}
	mapped := err == nil // if not, the figures are not known, and all else is
	if err != nil && !errors.Is(err, cow.ErrCorrupt) {
		return err
	}
	usage := map[string]*usageJSON{}
	for _, u := range us {
		if mapped {
			usage[u.Ref.String()] = usageOf(u)
		}
	}
	if err := addDamage(c.Context, s, &j); err != nil {
		return err
	}
	j.Usage = usage[j.Name]
	for i := range j.Snapshots {
		sn := &j.Snapshots[i]
		sn.Usage = usage[sn.Name]
		if sn.Name == r.String() && (sn.Usage != nil || !mapped) {
			return a.print(sn, func() error { return a.fields(snapshotFields(a, *sn)) })
		}
	}
	if r.Snapshot != "" {
		return fmt.Errorf("snapshot %v: %w", r, cow.ErrNotFound)
	}
	if j.Usage == nil && mapped { // removed meanwhile
		return fmt.Errorf("volume %v: %w", r, cow.ErrNotFound)
	}
	return a.print(j, func() error { return a.fields(volumeFields(a, j)) })
}

func volumeFields(a *app, j volumeJSON) [][2]string {
	u := j.Usage
	f := [][2]string{{"volume", j.Name}, {"size", a.size(j.Size)}}
	f = append(f, usageFields(a, u)...)
	f = append(f, damageFields(a, j.DamagedBytes, j.NotKnown)...)
	if len(j.Snapshots) > 0 && u != nil {
		f = append(f, [2]string{"used by snapshots", a.size(*u.UsedBySnapshots) + ", what removing them would free"})
	}
	if u != nil {
		f = append(f, [2]string{"used", a.size(u.Used) + ", what removing all of it would free"})
	}
	f = append(f, [][2]string{
		{"compress", j.Compress},
		{"logical block", fmt.Sprint(j.LogicalBlock)},
		{"created", when(j.Created)},
		{"origin", dash(j.Origin)},
		{"device", dash(shown(j.Device, j.DeviceState))},
	}...)
	f = append(f, clientFields(j.Clients)...)
	for _, key := range slices.Sorted(maps.Keys(j.Properties)) {
		f = append(f, [2]string{"property", key + "=" + j.Properties[key]})
	}
	if r := j.Receiving; r != nil {
		f = append(f, [2]string{"receiving", fmt.Sprintf("%s, up to block %d of %d", r.Snapshot, r.Mark, r.Blocks)}, [2]string{"guid", r.GUID}, [2]string{"base", dash(r.Base)})
	}
	for _, s := range j.Snapshots {
		text := fmt.Sprintf("%s  %s  %s", s.Name, a.size(s.Size), when(s.Created))
		if s.Usage != nil {
			text += "  exclusive " + a.size(s.Usage.Exclusive)
		}
		if *s.DamagedBytes > 0 {
			text += "  damaged " + a.size(*s.DamagedBytes)
		}
		if len(s.Clones) > 0 {
			text += "  clones: " + strings.Join(s.Clones, ", ")
		}
		if len(s.Holds) > 0 {
			text += "  holds: " + strings.ReplaceAll(s.tags(), ",", ", ")
		}
		f = append(f, [2]string{"snapshot", text})
	}
	return f
}

// usageFields returns the fields that volumes and snapshots have in common.
func usageFields(a *app, u *usageJSON) [][2]string {
	if u == nil {
		return [][2]string{{"space", "not known, as the map is damaged; 'vdisk check' names the damage"}}
	}
	return [][2]string{
		{"mapped", a.size(u.Mapped)},
		{"referenced", fmt.Sprintf("%s (ratio %s)", a.size(u.Referenced), u.ratio())},
		{"exclusive", fmt.Sprintf("%s, and %s shared with others", a.size(u.Exclusive), a.size(u.Shared))},
	}
}

func snapshotFields(a *app, j snapshotJSON) [][2]string {
	f := append([][2]string{{"snapshot", j.Name}, {"size", a.size(j.Size)}}, usageFields(a, j.Usage)...)
	f = append(f, damageFields(a, j.DamagedBytes, j.NotKnown)...)
	if j.Usage != nil {
		f = append(f, [2]string{"used", a.size(j.Usage.Used) + ", what removing it would free"})
	}
	return append(f, [][2]string{
		{"created", when(j.Created)},
		{"guid", dash(j.GUID)},
		{"clones", dash(strings.Join(j.Clones, ", "))},
		{"holds", dash(strings.ReplaceAll(j.tags(), ",", ", "))},
		{"device", dash(shown(j.Device, j.DeviceState))},
	}...)
}

// fields prints names and values in two columns.
func (a *app) fields(list [][2]string) error {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	for _, f := range list {
		fmt.Fprintf(w, "%s\t%s\n", f[0], cell(f[1]))
	}
	return w.Flush()
}
