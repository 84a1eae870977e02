package cow

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/ratelimit"
)

// branch is a branch in memory. Its ID never changes, and may be read without a lock.
type branch struct {
	format.Branch                  // all but ID is guarded by Store.mu
	leaves        leafcache.Branch // the branch, for the cache of leaves
	origin        *branch          // nil: it began empty, or has been flattened; guarded by Store.mu
	volume        *volume          // the volume whose head this is, or nil; guarded by Store.mu
	damaged       bool             // a version is damaged, so the reaper has stopped; guarded by Store.mu
	reaping       bool             // the head's versions are being reaped; guarded by Store.mu
	reaped        bool             // the head's versions have been reaped; guarded by Store.mu
	points        []*snapshot      // by epoch, including the unnamed ones; guarded by Store.mu
	forks         forks            // the branches that begin at its points; guarded by Store.mu
	forkAt        int              // where it is among those that begin at the same point; guarded by Store.mu
	orphaned      uint64           // generation in which it lost its volume, until reaped; guarded by Store.mu
	count         *headCount       // what the head holds; nil: nobody asks; guarded by Store.mu
	written       uint32           // the newest epoch in which this process has put or replayed anything; guarded by Store.mu
}

// point is a point at which branches begin.
type point struct {
	b     *branch
	epoch uint32
}

// forks is the branches that begin at points of a branch, by the points' epochs, in no order.
type forks map[uint32][]*branch

// head stands for a branch's newest state where an epoch is expected.
const head = leafcache.Head

// leaf returns the key of a leaf of the branch as of an epoch, or of its head.
func (b *branch) leaf(index, asOf uint32) leafcache.Key {
	return leafcache.Key{Branch: &b.leaves, Index: index, AsOf: asOf}
}

// volume is a volume in memory.
type volume struct {
	format.Volume // guarded by Store.mu
	branch        *branch
	size          atomic.Int64 // Volume.Size, for devices
	flattening    bool         // guarded by Store.mu
	readers       int          // open read-only devices of it and its snapshots; guarded by Store.mu
	writer        bool
	snapshots     map[string]*snapshot // by name; guarded by Store.mu
	codec         *codecPool
	packed        packed            // what was written to it; guarded by Store.mu
	limiter       ratelimit.Limiter // by its properties; for the servers, which ask it for each request
	quota         quota             // by its properties; guarded by Store.mu
	hasQuota      atomic.Bool       // quota limits something
}

// snapshot is a point of a branch that has a name, or had one and is unnamed (Volume 0).
type snapshot struct {
	format.Snapshot
	branch  *branch
	made    uint64 // generation in which it was taken; 0: before this process opened the store
	open    int    // open devices; guarded by Store.mu
	dropped uint64 // generation in which it lost its name; guarded by Store.mu
}

// catalog is the volumes, snapshots and branches in memory. Store.mu guards all of it. The dirty sets name the rows
// that the next checkpoint writes or removes.
type catalog struct {
	volumes       map[uint32]*volume
	snapshots     map[uint32]*snapshot
	branches      map[uint32]*branch
	byName        map[string]*volume
	receiving     map[string]*volume     // the hidden volumes that are being received, by the name of the target
	unnamedPoints map[*snapshot]struct{} // the points without a volume, which have lost their name
	waiting       map[*snapshot]struct{} // of these, the ones at which no branch begins: for the reaper
	orphaned      map[*branch]struct{}   // branches that have no volume and are not reaped
	nextID        uint64                 // above lastID, there are no more IDs

	dirtyVolumes, dirtySnapshots, dirtyBranches map[uint32]struct{}
}

func newCatalog() catalog {
	return catalog{
		volumes: map[uint32]*volume{}, snapshots: map[uint32]*snapshot{}, branches: map[uint32]*branch{},
		byName: map[string]*volume{}, receiving: map[string]*volume{}, unnamedPoints: map[*snapshot]struct{}{}, waiting: map[*snapshot]struct{}{}, orphaned: map[*branch]struct{}{}, nextID: 1,
		dirtyVolumes: map[uint32]struct{}{}, dirtySnapshots: map[uint32]struct{}{}, dirtyBranches: map[uint32]struct{}{},
	}
}

// IDs and epochs are never reused in the life of a store. Once they are used up, any operation that needs another one
// is refused.
const (
	lastID    = math.MaxUint32 - 1 // leaves room to store the next ID
	lastEpoch = head - 1
)

// newID returns a new ID, from the one sequence that volumes, snapshots and branches share. Before the IDs are used,
// the caller must call enoughIDs.
func (t *catalog) newID() uint32 {
	n := t.nextID
	t.nextID++
	return uint32(n)
}

// enoughIDs returns ErrExhausted if newID has returned IDs beyond the last one.
func (t *catalog) enoughIDs() error {
	if t.nextID > lastID+1 {
		return fmt.Errorf("the store has given all %d numbers of volumes, snapshots and branches, which are not given again; make another store: %w", uint32(lastID), ErrExhausted)
	}
	return nil
}

func (t *catalog) usedID(n uint32) { t.nextID = max(t.nextID, uint64(n)+1) }

// putBranch, putVolume and putSnapshot install a row as it is now. A row that refers to a row that does not exist is an
// error in the log or the table.

func (t *catalog) putBranch(r format.Branch, gen uint64) error {
	b := t.branches[r.ID]
	if b == nil {
		b = &branch{Branch: r}
		b.leaves.ID, b.leaves.OriginEpoch = r.ID, r.OriginEpoch
		if r.OriginBranch != 0 {
			if b.origin = t.branches[r.OriginBranch]; b.origin == nil {
				return fault.Corruptf("branch %d has the origin %d, which does not exist", r.ID, r.OriginBranch)
			}
			b.leaves.Origin.Store(&b.origin.leaves)
			t.fork(b)
		}
		t.branches[r.ID] = b
		t.orphan(b, gen) // until a volume takes it
	}
	if b.origin != nil && r.OriginBranch == 0 {
		t.cut(b, gen)
	}
	if r.Epoch > b.Epoch {
		b.count.endEpoch()
	}
	b.Epoch = r.Epoch // the other fields never change
	t.usedID(r.ID)
	t.dirtyBranches[r.ID] = struct{}{}
	return nil
}

func (t *catalog) putVolume(r format.Volume, gen uint64) error {
	b := t.branches[r.Branch]
	if b == nil {
		return fault.Corruptf("volume %q is on branch %d, which does not exist", r.Name, r.Branch)
	}
	v := t.volumes[r.ID]
	if v == nil {
		pool, err := newCodecPool(r.Codec, r.Level)
		if err != nil {
			return fault.Corruptf("volume %q: %v", r.Name, err)
		}
		v = &volume{codec: pool, snapshots: map[string]*snapshot{}}
		t.volumes[r.ID] = v
	} else {
		t.unlist(v)
		if v.branch != b {
			t.orphan(v.branch, gen)
		}
	}
	v.Volume, v.branch, b.volume = r, b, v
	delete(t.orphaned, b)
	v.size.Store(r.Size)
	v.limiter.Set(ratelimit.Of(r.Properties))
	v.quota = quotaOf(r.Properties)
	if v.hasQuota.Store(v.quota != quota{}); v.quota == (quota{}) {
		b.count = nil
	}
	t.byName[r.Name] = v
	if r.Receiving != nil {
		t.receiving[r.Receiving.Volume] = v
	}
	t.usedID(r.ID)
	t.dirtyVolumes[r.ID] = struct{}{}
	return nil
}

// dropVolume removes a volume, and with it the names of its snapshots.
func (t *catalog) dropVolume(n uint32, gen uint64) error {
	v := t.volumes[n]
	if v == nil {
		return fault.Corruptf("volume %d is deleted but does not exist", n)
	}
	for _, s := range v.snapshots { // if there are many, the event does not list them
		s.dropped = gen
		t.unname(s)
		t.dirtySnapshots[s.ID] = struct{}{}
	}
	delete(t.volumes, n)
	t.unlist(v)
	t.orphan(v.branch, gen)
	t.dirtyVolumes[n] = struct{}{}
	return nil
}

// unlist removes a volume from what finds it by name.
func (t *catalog) unlist(v *volume) {
	delete(t.byName, v.Name)
	if v.Receiving != nil {
		delete(t.receiving, v.Receiving.Volume)
	}
}

func (t *catalog) putSnapshot(r format.Snapshot, gen uint64) error {
	s := t.snapshots[r.ID]
	if s == nil {
		b := t.branches[r.Branch]
		if b == nil {
			return fault.Corruptf("snapshot %q is on branch %d, which does not exist", r.Name, r.Branch)
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
		return fault.Corruptf("snapshot %q is of volume %d, which does not exist", r.Name, r.Volume)
	}
	s.Snapshot = r
	if r.Volume == 0 {
		t.unname(s)
	}
	t.usedID(r.ID)
	t.dirtySnapshots[r.ID] = struct{}{}
	return nil
}

// unname notes that a point has lost its name.
func (t *catalog) unname(s *snapshot) {
	s.Volume = 0
	t.unnamedPoints[s] = struct{}{}
	if len(s.branch.forks[s.Epoch]) == 0 {
		t.waiting[s] = struct{}{}
	}
}

// apply installs the changes of an event. Both the live path and replay call it.
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

// forget removes the row of a point that is no longer needed.
func (t *catalog) forget(s *snapshot) {
	delete(t.snapshots, s.ID)
	delete(t.unnamedPoints, s)
	delete(t.waiting, s)
	if i, found := s.branch.search(s.Epoch); found {
		s.branch.points = slices.Delete(s.branch.points, i, i+1)
	}
	t.dirtySnapshots[s.ID] = struct{}{}
}

// forgetBranch removes the row of a branch that has neither a head nor points.
func (t *catalog) forgetBranch(b *branch) {
	delete(t.branches, b.ID)
	delete(t.orphaned, b)
	if b.origin != nil {
		t.unfork(b)
	}
	t.dirtyBranches[b.ID] = struct{}{}
}

// orphan takes a branch's volume away, in generation gen.
func (t *catalog) orphan(b *branch, gen uint64) {
	b.volume, b.count, b.orphaned = nil, nil, gen
	t.orphaned[b] = struct{}{}
}

// cut takes a branch's origin away, in generation gen: the branch itself has all that its head maps. The reaper leaves
// the origin's point alone until the table says so, too. Otherwise a replay would begin with a branch whose origin is
// not what it was.
func (t *catalog) cut(b *branch, gen uint64) {
	if p := b.origin.unnamedAt(b.OriginEpoch); p != nil {
		p.dropped = gen
	}
	t.unfork(b)
	b.leaves.Origin.Store(nil)
	b.origin, b.OriginBranch, b.OriginEpoch = nil, 0, 0
}

// fork notes that b begins at a point of its origin.
func (t *catalog) fork(b *branch) {
	o := b.origin
	if o.forks == nil {
		o.forks = forks{}
	}
	at := o.forks[b.OriginEpoch]
	b.forkAt = len(at)
	o.forks[b.OriginEpoch] = append(at, b)
	if p := o.unnamedAt(b.OriginEpoch); p != nil {
		delete(t.waiting, p)
	}
}

// unfork notes that b does not begin at a point of its origin any more.
func (t *catalog) unfork(b *branch) {
	o := b.origin
	at := o.forks[b.OriginEpoch]
	last := len(at) - 1
	at[last].forkAt = b.forkAt
	at[b.forkAt], at[last] = at[last], nil
	if last > 0 {
		o.forks[b.OriginEpoch] = at[:last]
		return
	}
	delete(o.forks, b.OriginEpoch)
	if p := o.unnamedAt(b.OriginEpoch); p != nil {
		t.waiting[p] = struct{}{}
	}
}

// unnamedAt returns the branch's point at an epoch if it has lost its name, and otherwise nil.
func (b *branch) unnamedAt(epoch uint32) *snapshot {
	if i, found := b.search(epoch); found && b.points[i].Volume == 0 {
		return b.points[i]
	}
	return nil
}

// search returns the index of the branch's first point at or after an epoch, and whether it is at that epoch.
func (b *branch) search(epoch uint32) (i int, found bool) {
	return slices.BinarySearchFunc(b.points, epoch, func(s *snapshot, epoch uint32) int { return cmp.Compare(s.Epoch, epoch) })
}
