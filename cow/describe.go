package cow

import (
	"fmt"
	"iter"
	"maps"
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

// Volumes describes all volumes, in the order of their names. If there are very many rows, each is described as of some
// moment of the call: what is made, renamed or removed meanwhile may be there or not.
func (s *Store) Volumes() []VolumeInfo { return s.list(s.pauses()) }

// list is Volumes, and calls pause as describe does.
func (s *Store) list(pause func()) []VolumeInfo {
	s.mu.Lock()
	all := slices.Collect(maps.Values(s.catalog.volumes))
	out := make([]VolumeInfo, 0, len(all))
	for _, v := range all {
		if s.catalog.volumes[v.ID] == v { // otherwise it has been removed
			out = append(out, s.describe(v, pause))
		}
	}
	s.mu.Unlock() // sorting very many would make others wait
	for i := range out {
		out[i].sort()
	}
	slices.SortFunc(out, func(a, b VolumeInfo) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// rowsHeld is how many rows of volumes and snapshots are gone through before others may have Store.mu.
const rowsHeld = 128

// pauses returns a function that lets others have mu now and then. It is called before each of very many rows, by a caller
// that holds mu. What that caller knows of the store may be different afterwards.
func (s *Store) pauses() (pause func()) {
	rows := 0
	return func() {
		if rows++; rows%rowsHeld == 0 {
			s.mu.Unlock()
			s.mu.Lock()
		}
	}
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
	return s.describe(v, s.pauses()), nil
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

// describe describes a volume. It calls pause before each row. The caller holds mu.
func (s *Store) describe(v *volume, pause func()) VolumeInfo {
	pause()
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
	for _, sn := range slices.Collect(maps.Values(v.snapshots)) {
		if pause(); sn.Volume == v.ID { // otherwise it has been removed
			in.Snapshots = append(in.Snapshots, s.describeSnapshot(in.Name, sn))
		}
	}
	return in
}

// describeSnapshot describes a snapshot of a volume with a name. The caller holds mu.
func (s *Store) describeSnapshot(volume string, sn *snapshot) SnapshotInfo {
	in := SnapshotInfo{Volume: volume, Name: sn.Name, Size: sn.Size, Created: sn.Created, GUID: s.guidOf(sn), Holds: holdInfos(sn.Holds)}
	for c := range sn.clones() {
		if c.ID != sn.Volume { // not the volume itself, rolled back to this snapshot
			in.Clones = append(in.Clones, c.Name)
		}
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

// clones yields the volumes whose branches begin at the snapshot's point. The caller holds Store.mu.
func (sn *snapshot) clones() iter.Seq[*volume] {
	return func(yield func(*volume) bool) {
		for _, b := range sn.branch.forks[sn.Epoch] {
			if b.volume != nil && !yield(b.volume) {
				return
			}
		}
	}
}
