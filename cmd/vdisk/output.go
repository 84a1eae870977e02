package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
)

// print writes v as JSON with --json; otherwise it calls text, which prints for people.
func (a *app) print(v any, text func() error) error {
	if !a.json {
		return text()
	}
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// note prints a remark for people, apart from the output.
func (a *app) note(format string, args ...any) {
	if !a.quiet && !a.json {
		fmt.Fprintf(a.stderr, "note: %s\n", cell(fmt.Sprintf(format, args...)))
	}
}

func when(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// volumeJSON is a volume in the JSON output.
type volumeJSON struct {
	Name         string         `json:"name"`
	Size         int64          `json:"size"`
	LogicalBlock int            `json:"logical_block"`
	Compress     string         `json:"compress"`
	Created      time.Time      `json:"created"`
	Origin       string         `json:"origin"`       // VOL@SNAP, "(deleted)" or empty
	Open         int            `json:"open"`         // how often it is open: by devices, clients, commands
	Device       string         `json:"device"`       // /dev/ublkbN or empty
	DeviceState  string         `json:"device_state"` // live, waits or empty
	Snapshots    []snapshotJSON `json:"snapshots"`
	Usage        *usageJSON     `json:"usage,omitempty"`
	DamagedBytes *int64         `json:"damaged_bytes,omitempty"` // as far as the owner knows
	NotKnown     []lostJSON     `json:"not_known,omitempty"`     // ranges of it where the map cannot be read
	// Receiving is there if the volume holds what has been received of another one.
	Receiving *receivingJSON `json:"receiving,omitempty"`
	// Properties are the user's.
	Properties map[string]string `json:"properties"`
	// Clients are NBD clients that have the volume or a snapshot of it open; only in the answer of info.
	Clients []clientJSON `json:"clients,omitempty"`
}

// receivingJSON is what is being received, in the JSON output.
type receivingJSON struct {
	Snapshot string    `json:"snapshot"` // VOL@SNAP, what it becomes
	GUID     string    `json:"guid"`
	Base     string    `json:"base"` // GUID, or empty
	Size     int64     `json:"size"`
	Created  time.Time `json:"created"`
	Mark     uint64    `json:"mark"`   // the block to resume at
	Blocks   uint64    `json:"blocks"` // of the snapshot
}

// snapshotJSON is a snapshot in the JSON output.
type snapshotJSON struct {
	Name        string     `json:"name"` // VOL@SNAP
	Volume      string     `json:"volume"`
	Size        int64      `json:"size"`
	Created     time.Time  `json:"created"`
	GUID        string     `json:"guid"` // of its content, the same in all stores
	Clones      []string   `json:"clones"`
	Device      string     `json:"device"`
	DeviceState string     `json:"device_state"`
	Usage       *usageJSON `json:"usage,omitempty"`
	Holds       []holdJSON `json:"holds"`

	DamagedBytes *int64     `json:"damaged_bytes,omitempty"` // as far as the owner knows
	NotKnown     []lostJSON `json:"not_known,omitempty"`     // ranges of it where the map cannot be read
}

// holdJSON is a hold of a snapshot in the JSON output.
type holdJSON struct {
	Snapshot string    `json:"snapshot,omitempty"` // VOL@SNAP
	Tag      string    `json:"tag"`
	Created  time.Time `json:"created"`
}

// tags are the tags of the holds, separated by commas.
func (j snapshotJSON) tags() string {
	var tags []string
	for _, h := range j.Holds {
		tags = append(tags, h.Tag)
	}
	return strings.Join(tags, ",")
}

// usageJSON is the space that a volume or snapshot takes (docs/reclaim.md, Space).
type usageJSON struct {
	Mapped     int64 `json:"mapped"`     // bytes of blocks that hold data
	Referenced int64 `json:"referenced"` // bytes that those take in the store
	Exclusive  int64 `json:"exclusive"`  // freed if it alone were removed
	// The part of Referenced that others refer to, too.
	Shared int64 `json:"shared"`
	// Freed if all snapshots of the volume were removed.
	UsedBySnapshots *int64 `json:"used_by_snapshots,omitempty"`
	// Freed if it were removed; a volume: with its snapshots.
	Used int64 `json:"used"`
	// What a volume takes with all that has an origin in common with it.
	Family *int64 `json:"family,omitempty"`

	FamilyID uint32 `json:"-"` // the same for all volumes of a family; 0: not known
}

func volumeOf(v owner.Volume) volumeJSON {
	j := volumeJSON{
		Name: v.Name, Size: v.Size, LogicalBlock: v.LogicalBlock, Compress: v.Codec, Created: v.Created.UTC(),
		Origin: v.Origin, Open: v.Open, Snapshots: []snapshotJSON{}, Properties: map[string]string{},
	}
	maps.Copy(j.Properties, v.Properties)
	j.Device, j.DeviceState = deviceOf(v, "")
	if r := v.Receiving; r != nil {
		j.Receiving = &receivingJSON{
			Snapshot: cow.Ref{Volume: r.Volume, Snapshot: r.Snapshot}.String(), GUID: r.GUID.String(), Base: r.Base.String(),
			Size: r.Size, Created: r.Created.UTC(), Mark: r.Mark, Blocks: r.Blocks,
		}
	}
	for _, s := range v.Snapshots {
		j.Snapshots = append(j.Snapshots, snapshotOf(v, s))
	}
	return j
}

func snapshotOf(v owner.Volume, s cow.SnapshotInfo) snapshotJSON {
	j := snapshotJSON{
		Name: cow.Ref{Volume: v.Name, Snapshot: s.Name}.String(), Volume: v.Name, Size: s.Size,
		Created: s.Created.UTC(), GUID: s.GUID.String(), Clones: append([]string{}, s.Clones...), Holds: []holdJSON{},
	}
	for _, h := range s.Holds {
		j.Holds = append(j.Holds, holdJSON{Tag: h.Tag, Created: h.Created.UTC()})
	}
	j.Device, j.DeviceState = deviceOf(v, s.Name)
	return j
}

func deviceOf(v owner.Volume, snapshot string) (path, state string) {
	for _, d := range v.Devices {
		if d.Ref.Snapshot == snapshot {
			return d.Path, stateOf(d)
		}
	}
	return "", ""
}

func usageOf(u cow.Usage) *usageJSON {
	j := &usageJSON{Mapped: u.Mapped, Referenced: u.Referenced, Exclusive: u.Exclusive, Shared: u.Shared, Used: u.Used}
	if u.Ref.Snapshot == "" {
		j.UsedBySnapshots = &u.UsedBySnapshots
	}
	if u.FamilyID != 0 {
		j.Family, j.FamilyID = &u.Family, u.FamilyID
	}
	return j
}
