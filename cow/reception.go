package cow

import (
	"fmt"
	"math"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// receivingSuffix ends the name of a volume that is being received.
const receivingSuffix = ".receiving"

// receivingName returns the name of the hidden volume for a target. It has no more than the 63 characters that a name
// may have.
func receivingName(target string) string {
	return target[:min(len(target), 63-len(receivingSuffix))] + receivingSuffix
}

// reception receives one stream into a hidden volume.
type reception struct {
	s      *Store
	h      *format.StreamHeader
	target Ref // with the name that the snapshot gets
	force  bool
	base   Ref     // the base here; of a resumed reception: unknown
	d      *Device // the hidden volume; nil: nothing is changed
}

// begin makes the hidden volume, or finds the one of a reception that was cut, and opens it.
func (rc *reception) begin() error {
	s := rc.s
	if err := s.transact(rc.beginning); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.catalog.receiving[rc.target.Volume]
	if v == nil {
		return fmt.Errorf("its reception was given up meanwhile: %w", ErrBusy)
	}
	if err := rc.resumes(v); err != nil { // somebody may have been faster
		return err
	}
	v.writer = true
	rc.d = &Device{s: s, ref: Ref{Volume: v.Name}, v: v, b: v.branch, asOf: head, block: v.LogicalBlock}
	return nil
}

// try finds out whether begin would succeed after the receptions before it.
func (rc *reception) try(before []Received) error {
	if n := len(before); n > 0 && before[n-1].GUID == rc.h.Base {
		return nil
	}
	s := rc.s
	s.mu.Lock()
	defer s.mu.Unlock()
	ids := s.catalog.nextID
	_, err := rc.beginning()
	s.catalog.nextID = ids
	return err
}

// close gives the hidden volume back, if it is still there.
func (rc *reception) close() {
	rc.s.mu.Lock()
	rc.d.v.writer = false
	rc.s.mu.Unlock()
}

// marked returns the last mark.
func (rc *reception) marked() uint64 {
	rc.s.mu.Lock()
	defer rc.s.mu.Unlock()
	if r := rc.d.v.Receiving; r != nil {
		return r.Block
	}
	return 0
}

// resumes returns an error if the stream cannot go on where the reception into the hidden volume v was cut. The caller
// holds mu.
func (rc *reception) resumes(v *volume) error {
	r := v.Receiving
	switch {
	case v.writer:
		return fmt.Errorf("another 'vdisk receive' is at work on it: %w", ErrBusy)
	case r.GUID != rc.h.GUID || r.Base != rc.h.Base || r.Snapshot != rc.target.Snapshot:
		return fmt.Errorf("%s@%s has been received in part, and this is another stream (%s@%s, guid %s): go on with that one, or give it up with 'vdisk receive --abort %s': %w",
			r.Volume, r.Snapshot, rc.h.Volume, rc.h.Snapshot, rc.h.GUID, r.Volume, ErrBusy)
	case rc.h.From > r.Block:
		return fmt.Errorf("the stream begins at block %d, and the snapshot has been received up to block %d: send it with --resume %d: %w", rc.h.From, r.Block, r.Block, ErrInvalid)
	}
	return nil
}

// beginning returns the event that makes the hidden volume, or nil if it is there. The caller holds mu.
//
// Of an incremental stream, the hidden volume takes the branch of the target, if the head of that is still as the base,
// and the target a new branch that begins at the base. In the end the target gets its branch back. So a volume that
// receives one stream after another keeps all its snapshots on one branch, and those that are deleted give back their
// space. If each reception had a branch of its own, it would begin at the snapshot before, and keep it for ever.
func (rc *reception) beginning() (*format.Event, error) {
	s, h := rc.s, rc.h
	if v := s.catalog.receiving[rc.target.Volume]; v != nil {
		return nil, rc.resumes(v)
	}
	if h.From > 0 {
		return nil, fmt.Errorf("the stream begins at block %d, and nothing of the snapshot is here: send it without --resume: %w", h.From, ErrInvalid)
	}
	name := receivingName(rc.target.Volume)
	if err := s.freeName(name); err != nil {
		return nil, fmt.Errorf("what is received of %s gets another name until it is whole, and that is taken: %w", rc.target.Volume, err)
	}
	target, base, err := rc.check()
	if err != nil {
		return nil, err
	}
	v := format.Volume{
		Name: name, Size: h.Size, Codec: h.Codec, Level: h.Level, LogicalBlock: h.LogicalBlock, Properties: h.Properties, Created: Now(),
		Receiving: &format.Receiving{Volume: rc.target.Volume, Snapshot: rc.target.Snapshot, GUID: h.GUID, Base: h.Base, Size: h.Size, Created: h.Created},
	}
	ev := &format.Event{Op: "receive"}
	b := format.Branch{ID: s.catalog.newID(), Epoch: 1}
	if base != nil {
		rc.base = Ref{s.catalog.volumes[base.Volume].Name, base.Name}
		b.OriginBranch, b.OriginEpoch = base.branch.ID, base.Epoch
		v.Size = max(v.Size, base.Size)
	}
	v.Branch = b.ID
	if target != nil {
		v.Codec, v.Level, v.LogicalBlock, v.Properties = target.Codec, target.Level, target.LogicalBlock, nil
		same, err := s.headIs(target, base)
		if err != nil {
			return nil, err
		}
		if same {
			row := target.Volume
			v.Branch, row.Branch = row.Branch, b.ID
			ev.Volumes = append(ev.Volumes, row)
		}
	}
	v.ID = s.catalog.newID()
	ev.Branches, ev.Volumes = []format.Branch{b}, append(ev.Volumes, v)
	return ev, nil
}

// check looks at the target, which is nil if there is none, and at the base of the stream, which is nil if the stream
// is full. It returns an error if they are not as they have to be. The caller holds mu.
func (rc *reception) check() (target *volume, base *snapshot, err error) {
	s, h := rc.s, rc.h
	target = s.catalog.byName[rc.target.Volume]
	if err := checkSize(h.Size, h.LogicalBlock); err != nil {
		return nil, nil, err
	}
	if target != nil {
		if err := s.canGet(target, rc.target.Snapshot, h.GUID); err != nil {
			return nil, nil, err
		}
	}
	switch {
	case h.Base.IsZero() && target != nil:
		return nil, nil, fmt.Errorf("volume %s: %w: a full stream makes a new volume", target.Name, ErrExists)
	case h.Base.IsZero():
		return nil, nil, nil
	}
	if base = s.findGUID(target, h.Base); base == nil {
		return nil, nil, fmt.Errorf("its base is not here: %s, guid %s: %w", h.BaseName, h.Base, ErrNotFound)
	}
	if target == nil {
		return nil, base, nil
	}
	if err := checkSize(h.Size, target.LogicalBlock); err != nil {
		return nil, nil, err
	}
	if target.writer || target.readers > s.openSnapshots(target) {
		return nil, nil, fmt.Errorf("volume %s is open; detach it first: %w", target.Name, ErrBusy)
	}
	if rc.force {
		return target, base, nil
	}
	same, err := s.headIs(target, base)
	if err == nil && !same {
		err = fmt.Errorf("volume %s is not as %s@%s any more; --force gives up what has changed: %w", target.Name, s.catalog.volumes[base.Volume].Name, base.Name, ErrBusy)
	}
	return target, base, err
}

// canGet returns an error if a volume cannot get a snapshot of that name and GUID: it is itself being received, it can
// have no more snapshots, or it has one of that name or GUID. The caller holds mu.
func (s *Store) canGet(v *volume, name string, guid format.GUID) error {
	if err := v.received(); err != nil {
		return err
	}
	if v.branch.Epoch >= lastEpoch {
		return fmt.Errorf("%s can have no more snapshots: %w", v.Name, ErrExhausted)
	}
	for _, sn := range v.snapshots {
		if s.guidOf(sn) == guid {
			return fmt.Errorf("%s@%s has that content: %w", v.Name, sn.Name, ErrExists)
		}
	}
	if v.snapshots[name] != nil {
		return fmt.Errorf("snapshot %s@%s: %w", v.Name, name, ErrExists)
	}
	return nil
}

// findGUID returns the snapshot with a GUID, one of v if that is not nil and has one, or nil. The caller holds mu.
func (s *Store) findGUID(v *volume, guid format.GUID) (found *snapshot) {
	for _, sn := range s.catalog.snapshots {
		if sn.Volume == 0 || s.guidOf(sn) != guid {
			continue
		}
		if v != nil && sn.Volume == v.ID {
			return sn
		}
		if found == nil || sn.ID < found.ID {
			found = sn
		}
	}
	return found
}

// headIs reports whether the head of a volume is known to hold what a snapshot holds, because nothing was written since.
// The caller holds mu, and nobody has the volume open to write.
func (s *Store) headIs(v *volume, sn *snapshot) (bool, error) {
	b := v.branch
	after, ok := v.since(sn)
	if !ok {
		return false, nil
	}
	// Memory is looked at before the table, because a leaf leaves memory only after the table has it.
	var l format.Leaf
	for _, index := range s.cache.InMemory(&b.leaves, 0, math.MaxUint32) {
		if s.cache.Version(&b.leaves, index, after+1, head, true, &l) != 0 {
			return false, nil
		}
	}
	same := true
	err := s.meta.View(func(tx *metadata.Tx) error {
		return tx.Changes(metadata.Version{Branch: b.ID, Epoch: after + 1}, head, func(v metadata.Version) bool {
			_, gone := s.changes.dropping[v]
			same = gone
			return gone
		})
	})
	return same, err
}

// mark notes that everything before a block has been received. It needs no sync: the log is one order, so a crash that
// leaves the mark leaves what was received before it.
func (rc *reception) mark(block uint64) error {
	if rc.d == nil {
		return nil
	}
	return rc.s.record(func() (*format.Event, error) {
		row := rc.d.v.Volume
		if block <= row.Receiving.Block {
			return nil, nil
		}
		r := *row.Receiving
		r.Block, row.Receiving = block, &r
		return &format.Event{Op: "mark", Volumes: []format.Volume{row}}, nil
	})
}

// end makes the snapshot. The hidden volume becomes the target, or gives its branch to it.
func (rc *reception) end() error {
	if rc.d == nil {
		return nil
	}
	if was, is := blocksOf(rc.d.Size()), rc.h.Blocks(); was > is { // nothing may come back when the volume grows
		if err := rc.d.punch(is, was); err != nil {
			return err
		}
	}
	err := rc.s.transact(func() (*format.Event, error) {
		hidden := rc.d.v
		target, _, err := rc.check()
		if err != nil {
			return nil, err
		}
		b, row, ev := hidden.branch.Branch, hidden.Volume, &format.Event{Op: "received"}
		if row.Name, row.Receiving = rc.target.Volume, nil; target != nil {
			row, ev.DropVolumes = target.Volume, []uint32{hidden.ID}
			row.Branch = b.ID
		}
		row.Size = rc.h.Size
		ev.Snapshots = []format.Snapshot{{
			ID: rc.s.catalog.newID(), Volume: row.ID, Name: rc.target.Snapshot, Branch: b.ID, Epoch: b.Epoch,
			Size: rc.h.Size, Created: rc.h.Created, GUID: rc.h.GUID,
		}}
		b.Epoch++
		ev.Branches, ev.Volumes = []format.Branch{b}, []format.Volume{row}
		return ev, nil
	})
	if err == nil {
		wal.Poke(rc.s.checkpoints.work) // the branch that the target had can go
	}
	return err
}

// received returns an error if the volume is being received, and so may not be used. The caller holds mu.
func (v *volume) received() error {
	if v.Receiving == nil {
		return nil
	}
	r := v.Receiving
	return fmt.Errorf("volume %s holds what has been received of %s@%s; 'vdisk receive --abort %s' gives it up: %w", v.Name, r.Volume, r.Snapshot, r.Volume, ErrBusy)
}

// receives returns an error if something is being received into a volume, whose name has to stay then. The caller holds
// mu.
func (s *Store) receives(name string) error {
	if s.catalog.receiving[name] == nil {
		return nil
	}
	return fmt.Errorf("%s is being received; 'vdisk receive --abort %s' gives that up: %w", name, name, ErrBusy)
}

// isBase returns an error if a snapshot is the base of what is being received. The caller holds mu.
func (s *Store) isBase(sn *snapshot) error {
	for name, v := range s.catalog.receiving {
		if v.Receiving.Base == s.guidOf(sn) {
			return fmt.Errorf("it is the base of what is being received into %s; 'vdisk receive --abort %s' gives that up: %w", name, name, ErrBusy)
		}
	}
	return nil
}

// needed returns an error if a volume may not be removed because of what is being received. The caller holds mu.
func (s *Store) needed(v *volume) error {
	if err := s.receives(v.Name); err != nil {
		return err
	}
	for _, sn := range v.snapshots {
		if err := s.isBase(sn); err != nil {
			return err
		}
	}
	return nil
}
