package cow

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vdisk/vdisk/format"
)

// SnapshotInfo describes a snapshot.
type SnapshotInfo struct {
	Volume  string    `json:"volume"`
	Name    string    `json:"name"`
	Size    int64     `json:"size"`
	Created time.Time `json:"created"`
	Clones  []string  `json:"clones,omitempty"` // volumes that began here
	// GUID is the same in all stores that have this state, because they sent it to one another.
	GUID  format.GUID `json:"guid"`
	Holds []HoldInfo  `json:"holds,omitempty"` // in the order of their tags
}

// VolumeInfo describes a volume.
type VolumeInfo struct {
	Name         string         `json:"name"`
	Size         int64          `json:"size"`
	Codec        string         `json:"codec"` // none, s2, zstd, zstd:N
	LogicalBlock int            `json:"logical_block"`
	Created      time.Time      `json:"created"`
	Origin       string         `json:"origin,omitempty"` // VOL@SNAP it was cloned from or rolled back to
	Snapshots    []SnapshotInfo `json:"snapshots,omitempty"`
	Open         int            `json:"open"` // number of open devices
	// Receiving is set for a hidden volume, whose content is being received.
	Receiving *ReceivingInfo `json:"receiving,omitempty"`
	// Properties are the user's own. Nobody changes the map.
	Properties map[string]string `json:"properties,omitempty"`
}

// Volumes describes all volumes, in the order of their names.
func (s *Store) Volumes() []VolumeInfo {
	s.mu.Lock()
	clones := s.clones()
	out := make([]VolumeInfo, 0, len(s.catalog.volumes))
	for _, v := range s.catalog.volumes {
		out = append(out, s.describe(v, clones))
	}
	s.mu.Unlock() // sorting very many would make others wait
	for i := range out {
		out[i].sort()
	}
	slices.SortFunc(out, func(a, b VolumeInfo) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Volume describes one volume.
func (s *Store) Volume(name string) (VolumeInfo, error) {
	in, err := s.unsorted(name)
	in.sort()
	return in, err
}

func (s *Store) unsorted(name string) (VolumeInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return VolumeInfo{}, ErrClosed
	}
	v, _, err := s.lookup(Ref{Volume: name})
	if err != nil {
		return VolumeInfo{}, err
	}
	return s.describe(v, s.clones()), nil
}

// Has reports whether there is such a volume or snapshot.
func (s *Store) Has(r Ref) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, err := s.lookup(r)
	return err == nil
}

// sort sorts the snapshots in the order in which they were taken.
func (in *VolumeInfo) sort() {
	for i := range in.Snapshots {
		slices.Sort(in.Snapshots[i].Clones)
	}
	slices.SortFunc(in.Snapshots, func(a, b SnapshotInfo) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
}

func (s *Store) describe(v *volume, clones map[point][]*volume) VolumeInfo {
	in := VolumeInfo{
		Name: v.Name, Size: v.Size, Codec: v.Codec.String(), LogicalBlock: v.LogicalBlock,
		Created: v.Created, Open: v.readers, Receiving: receivingInfo(v.Receiving), Properties: v.Properties,
	}
	if v.Level != 0 {
		in.Codec += fmt.Sprintf(":%d", v.Level)
	}
	if v.writer {
		in.Open++
	}
	if v.branch.origin != nil {
		in.Origin = s.pointName(v.branch.origin, v.branch.OriginEpoch)
	}
	if len(v.snapshots) > 0 {
		in.Snapshots = make([]SnapshotInfo, 0, len(v.snapshots))
	}
	for _, sn := range v.snapshots {
		si := SnapshotInfo{Volume: v.Name, Name: sn.Name, Size: sn.Size, Created: sn.Created, GUID: s.guidOf(sn), Holds: holdInfos(sn.Holds)}
		for _, c := range clones[point{sn.branch, sn.Epoch}] {
			if c.ID != sn.Volume { // not the volume itself, rolled back to this snapshot
				si.Clones = append(si.Clones, c.Name)
			}
		}
		in.Snapshots = append(in.Snapshots, si)
	}
	return in
}

// guidOf returns the GUID of a snapshot.
func (s *Store) guidOf(sn *snapshot) format.GUID { return sn.GUIDOf(s.wal.UUID()) }

func (s *Store) pointName(b *branch, epoch uint32) string {
	if i, found := b.search(epoch); found && b.points[i].Volume != 0 {
		return s.catalog.volumes[b.points[i].Volume].Name + "@" + b.points[i].Name
	}
	return "(deleted)"
}

// point is a point at which branches begin.
type point struct {
	b     *branch
	epoch uint32
}

// clones returns the volumes whose branches begin at a point, by point. The caller holds mu.
func (s *Store) clones() map[point][]*volume {
	clones := map[point][]*volume{}
	for _, v := range s.catalog.volumes {
		if v.branch.origin != nil {
			p := point{v.branch.origin, v.branch.OriginEpoch}
			clones[p] = append(clones[p], v)
		}
	}
	return clones
}
