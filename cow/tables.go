package cow

import (
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

// branch is a line of history in memory. Its ID and origin never change.
type branch struct {
	format.Branch         // Epoch is guarded by Store.mu
	origin        *branch // nil: it began empty
	originEpoch   uint32  // OriginEpoch, without the lock
	volume        *volume // whose head it is, or nil; guarded by Store.mu
	stuck         bool    // a version is damaged, and the reaper has given up; guarded by Store.mu
	reaping       bool    // the head's versions are going; guarded by Store.mu
	reaped        bool    // they are gone; guarded by Store.mu
	headless      uint64  // generation in which it lost its volume, while the head's versions wait for the reaper; guarded by Store.mu
}

// volume is a volume in memory.
type volume struct {
	format.Volume // guarded by Store.mu
	branch        *branch
	size          atomic.Int64 // Volume.Size, for devices
	readers       int          // open handles; guarded by Store.mu
	writer        bool
	codec         *codecPool
}

// snapshot is a point of a branch that has a name, or (Volume 0) had one.
type snapshot struct {
	format.Snapshot
	branch  *branch
	open    int    // handles; guarded by Store.mu
	dropped uint64 // generation in which the name went; guarded by Store.mu
}

// tables are the volumes, snapshots and branches in memory; all guarded by
// Store.mu. The dirty sets name the rows that the next checkpoint writes or removes.
type tables struct {
	volumes   map[uint32]*volume
	snapshots map[uint32]*snapshot
	branches  map[uint32]*branch
	byName    map[string]*volume
	nextID    uint32

	dirtyVolumes, dirtySnapshots, dirtyBranches map[uint32]struct{}
}

func newTables() tables {
	return tables{
		volumes: map[uint32]*volume{}, snapshots: map[uint32]*snapshot{}, branches: map[uint32]*branch{},
		byName: map[string]*volume{}, nextID: 1,
		dirtyVolumes: map[uint32]struct{}{}, dirtySnapshots: map[uint32]struct{}{}, dirtyBranches: map[uint32]struct{}{},
	}
}

// newID hands out ids; volumes, snapshots and branches share them.
func (t *tables) newID() uint32 {
	n := t.nextID
	t.nextID++
	return n
}

func (t *tables) usedID(n uint32) { t.nextID = max(t.nextID, n+1) }

// putBranch, putVolume and putSnapshot install a row as it now is. A row that
// refers to one that is not there is an error in the log or the table.

func (t *tables) putBranch(r format.Branch, gen uint64) error {
	b := t.branches[r.ID]
	if b == nil {
		b = &branch{Branch: r, originEpoch: r.OriginEpoch}
		if r.OriginBranch != 0 {
			if b.origin = t.branches[r.OriginBranch]; b.origin == nil {
				return corruptf("branch %d has the origin %d, which does not exist", r.ID, r.OriginBranch)
			}
		}
		b.headless = gen // until a volume takes it
		t.branches[r.ID] = b
	}
	b.Epoch = r.Epoch // the rest never changes, and is read without the lock
	t.usedID(r.ID)
	t.dirtyBranches[r.ID] = struct{}{}
	return nil
}

func (t *tables) putVolume(r format.Volume, gen uint64) error {
	b := t.branches[r.Branch]
	if b == nil {
		return corruptf("volume %q is on branch %d, which does not exist", r.Name, r.Branch)
	}
	v := t.volumes[r.ID]
	if v == nil {
		pool, err := newCodecPool(r.Codec, r.Level)
		if err != nil {
			return corruptf("volume %q: %v", r.Name, err)
		}
		v = &volume{codec: pool}
		t.volumes[r.ID] = v
	} else {
		delete(t.byName, v.Name)
		if v.branch != b {
			v.branch.volume, v.branch.headless = nil, gen
		}
	}
	v.Volume, v.branch, b.volume = r, b, v
	v.size.Store(r.Size)
	t.byName[r.Name] = v
	t.usedID(r.ID)
	t.dirtyVolumes[r.ID] = struct{}{}
	return nil
}

func (t *tables) dropVolume(n uint32, gen uint64) error {
	v := t.volumes[n]
	if v == nil {
		return corruptf("volume %d is deleted but does not exist", n)
	}
	delete(t.volumes, n)
	delete(t.byName, v.Name)
	v.branch.volume, v.branch.headless = nil, gen
	t.dirtyVolumes[n] = struct{}{}
	return nil
}

func (t *tables) putSnapshot(r format.Snapshot, gen uint64) error {
	s := t.snapshots[r.ID]
	if s == nil {
		b := t.branches[r.Branch]
		if b == nil {
			return corruptf("snapshot %q is on branch %d, which does not exist", r.Name, r.Branch)
		}
		s = &snapshot{branch: b}
		t.snapshots[r.ID] = s
	}
	if r.Volume == 0 && s.Volume != 0 {
		s.dropped = gen
	}
	s.Snapshot = r
	t.usedID(r.ID)
	t.dirtySnapshots[r.ID] = struct{}{}
	return nil
}

// apply installs what an event says: the live path and replay both do.
func (t *tables) apply(ev *format.Event, gen uint64) error {
	for _, r := range ev.Branches {
		if err := t.putBranch(r, gen); err != nil {
			return err
		}
	}
	for _, n := range ev.DropVolumes {
		if err := t.dropVolume(n, gen); err != nil {
			return err
		}
	}
	for _, r := range ev.Volumes {
		if err := t.putVolume(r, gen); err != nil {
			return err
		}
	}
	for _, r := range ev.Snapshots {
		if err := t.putSnapshot(r, gen); err != nil {
			return err
		}
	}
	return nil
}

// find returns a named volume's snapshot.
func (t *tables) find(v *volume, name string) *snapshot {
	for _, s := range t.snapshots {
		if s.Volume == v.ID && s.Name == name {
			return s
		}
	}
	return nil
}

// point is a branch's state at the end of an epoch.
type point struct {
	b     *branch
	epoch uint32
}

// origins are the points at which branches start.
func (t *tables) origins() map[point]bool {
	set := make(map[point]bool, len(t.branches))
	for _, b := range t.branches {
		if b.origin != nil {
			set[point{b.origin, b.originEpoch}] = true
		}
	}
	return set
}
