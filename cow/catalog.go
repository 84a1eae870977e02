package cow

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/format"
)

// branch is a line of history in memory. Its ID and origin never change.
type branch struct {
	format.Branch                // Epoch is guarded by Store.mu
	origin        *branch        // nil: it began empty
	originEpoch   uint32         // OriginEpoch, without the lock
	volume        *volume        // whose head it is, or nil; guarded by Store.mu
	damaged       bool           // a version is damaged, and the reaper has given up; guarded by Store.mu
	reaping       bool           // the head's versions are going; guarded by Store.mu
	reaped        bool           // they are gone; guarded by Store.mu
	points        []*snapshot    // by epoch, with those that have lost their name; guarded by Store.mu
	forks         map[uint32]int // how many branches begin at an epoch's point; guarded by Store.mu
	unwritten     atomic.Int64   // dirty leaves and images that no checkpoint has committed
	orphaned      uint64         // generation in which it lost its volume, while the head's versions wait for the reaper; guarded by Store.mu
}

// volume is a volume in memory.
type volume struct {
	format.Volume // guarded by Store.mu
	branch        *branch
	size          atomic.Int64 // Volume.Size, for devices
	readers       int          // open handles; guarded by Store.mu
	writer        bool
	snapshots     map[string]*snapshot // by name; guarded by Store.mu
	codec         *codecPool
}

// snapshot is a point of a branch that has a name, or (Volume 0) had one.
type snapshot struct {
	format.Snapshot
	branch  *branch
	made    uint64 // generation in which it was taken; 0: before this process
	open    int    // handles; guarded by Store.mu
	dropped uint64 // generation in which the name went; guarded by Store.mu
}

// tables are the volumes, snapshots and branches in memory; all guarded by
// Store.mu. The dirty sets name the rows that the next checkpoint writes or removes.
type catalog struct {
	volumes       map[uint32]*volume
	snapshots     map[uint32]*snapshot
	branches      map[uint32]*branch
	byName        map[string]*volume
	unnamedPoints map[*snapshot]struct{} // those of volume 0
	waiting       map[*snapshot]struct{} // of these, those at which no branch begins: the reaper's
	orphaned      map[*branch]struct{}   // those without a volume that are not reaped
	nextID        uint64                 // more than lastID: there are no more

	dirtyVolumes, dirtySnapshots, dirtyBranches map[uint32]struct{}
}

func newCatalog() catalog {
	return catalog{
		volumes: map[uint32]*volume{}, snapshots: map[uint32]*snapshot{}, branches: map[uint32]*branch{},
		byName: map[string]*volume{}, unnamedPoints: map[*snapshot]struct{}{}, waiting: map[*snapshot]struct{}{}, orphaned: map[*branch]struct{}{}, nextID: 1,
		dirtyVolumes: map[uint32]struct{}{}, dirtySnapshots: map[uint32]struct{}{}, dirtyBranches: map[uint32]struct{}{},
	}
}

// Numbers are given once in the life of a store. Where one is used up, what needs another is refused.
const (
	lastID    = math.MaxUint32 - 1 // so that the next one can be written down
	lastEpoch = head - 1
)

// newID hands out ids; volumes, snapshots and branches share them. Whoever uses them asks enoughIDs before.
func (t *catalog) newID() uint32 {
	n := t.nextID
	t.nextID++
	return uint32(n)
}

// enoughIDs is an error if ids were handed out that there are not.
func (t *catalog) enoughIDs() error {
	if t.nextID > lastID+1 {
		return fmt.Errorf("the store has given all %d numbers of volumes, snapshots and branches, which are not given again; make another store: %w", uint32(lastID), ErrExhausted)
	}
	return nil
}

func (t *catalog) usedID(n uint32) { t.nextID = max(t.nextID, uint64(n)+1) }

// putBranch, putVolume and putSnapshot install a row as it now is. A row that
// refers to one that is not there is an error in the log or the table.

func (t *catalog) putBranch(r format.Branch, gen uint64) error {
	b := t.branches[r.ID]
	if b == nil {
		b = &branch{Branch: r, originEpoch: r.OriginEpoch}
		if r.OriginBranch != 0 {
			if b.origin = t.branches[r.OriginBranch]; b.origin == nil {
				return corruptf("branch %d has the origin %d, which does not exist", r.ID, r.OriginBranch)
			}
			t.fork(b, +1)
		}
		t.branches[r.ID] = b
		t.orphan(b, gen) // until a volume takes it
	}
	b.Epoch = r.Epoch // the rest never changes, and is read without the lock
	t.usedID(r.ID)
	t.dirtyBranches[r.ID] = struct{}{}
	return nil
}

func (t *catalog) putVolume(r format.Volume, gen uint64) error {
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
		v = &volume{codec: pool, snapshots: map[string]*snapshot{}}
		t.volumes[r.ID] = v
	} else {
		delete(t.byName, v.Name)
		if v.branch != b {
			t.orphan(v.branch, gen)
		}
	}
	v.Volume, v.branch, b.volume = r, b, v
	delete(t.orphaned, b)
	v.size.Store(r.Size)
	t.byName[r.Name] = v
	t.usedID(r.ID)
	t.dirtyVolumes[r.ID] = struct{}{}
	return nil
}

// dropVolume removes a volume, and with it the names of its snapshots.
func (t *catalog) dropVolume(n uint32, gen uint64) error {
	v := t.volumes[n]
	if v == nil {
		return corruptf("volume %d is deleted but does not exist", n)
	}
	for _, s := range v.snapshots { // of many the event names none
		s.dropped = gen
		t.unname(s)
		t.dirtySnapshots[s.ID] = struct{}{}
	}
	delete(t.volumes, n)
	delete(t.byName, v.Name)
	t.orphan(v.branch, gen)
	t.dirtyVolumes[n] = struct{}{}
	return nil
}

func (t *catalog) putSnapshot(r format.Snapshot, gen uint64) error {
	s := t.snapshots[r.ID]
	if s == nil {
		b := t.branches[r.Branch]
		if b == nil {
			return corruptf("snapshot %q is on branch %d, which does not exist", r.Name, r.Branch)
		}
		s = &snapshot{branch: b, made: gen}
		t.snapshots[r.ID] = s
		i, _ := b.search(r.Epoch)
		b.points = slices.Insert(b.points, i, s)
	}
	if v := t.volumes[s.Volume]; v != nil {
		delete(v.snapshots, s.Name)
	}
	if r.Volume == 0 {
		if s.Volume != 0 {
			s.dropped = gen
		}
	} else if v := t.volumes[r.Volume]; v != nil {
		v.snapshots[r.Name] = s
	} else {
		return corruptf("snapshot %q is of volume %d, which does not exist", r.Name, r.Volume)
	}
	s.Snapshot = r
	if r.Volume == 0 {
		t.unname(s)
	}
	t.usedID(r.ID)
	t.dirtySnapshots[r.ID] = struct{}{}
	return nil
}

// unname notes that a point has no name any more.
func (t *catalog) unname(s *snapshot) {
	s.Volume = 0
	t.unnamedPoints[s] = struct{}{}
	if s.branch.forks[s.Epoch] == 0 {
		t.waiting[s] = struct{}{}
	}
}

// apply installs what an event says: the live path and replay both do.
func (t *catalog) apply(ev *format.Event, gen uint64) error {
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

// forget removes the row of a point that nobody needs.
func (t *catalog) forget(s *snapshot) {
	delete(t.snapshots, s.ID)
	delete(t.unnamedPoints, s)
	delete(t.waiting, s)
	if i, found := s.branch.search(s.Epoch); found {
		s.branch.points = slices.Delete(s.branch.points, i, i+1)
	}
	t.dirtySnapshots[s.ID] = struct{}{}
}

// forgetBranch removes the row of a branch that has neither head nor points.
func (t *catalog) forgetBranch(b *branch) {
	delete(t.branches, b.ID)
	delete(t.orphaned, b)
	if b.origin != nil {
		t.fork(b, -1)
	}
	t.dirtyBranches[b.ID] = struct{}{}
}

// orphan takes a branch's volume away, in a generation.
func (t *catalog) orphan(b *branch, gen uint64) {
	b.volume, b.orphaned = nil, gen
	t.orphaned[b] = struct{}{}
}

// fork counts the branches that begin at the point where b begins: one more, or one less.
func (t *catalog) fork(b *branch, by int) {
	o, epoch := b.origin, b.originEpoch
	if o.forks == nil {
		o.forks = map[uint32]int{}
	}
	if o.forks[epoch] += by; o.forks[epoch] == 0 {
		delete(o.forks, epoch)
	}
	i, found := o.search(epoch)
	if !found || o.points[i].Volume != 0 {
		return
	}
	if o.forks[epoch] == 0 {
		t.waiting[o.points[i]] = struct{}{}
	} else {
		delete(t.waiting, o.points[i])
	}
}

// search finds the first point of the branch at or after an epoch.
func (b *branch) search(epoch uint32) (i int, found bool) {
	return slices.BinarySearchFunc(b.points, epoch, func(s *snapshot, epoch uint32) int { return cmp.Compare(s.Epoch, epoch) })
}
