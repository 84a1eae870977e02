package cow

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"

	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// damageFile has the known damage for the next owner: docs/format.md, Known damage.
const damageFile = "damage"

// savedDamage is the content of damageFile.
type savedDamage struct {
	Places []savedPlace `json:"places"`
}

// savedPlace is a badPlace in damageFile. That of a record has a ChunkSeq, and that of a leaf a Branch.
type savedPlace struct {
	ChunkSeq uint64 `json:"chunk_seq,omitempty"`
	Slot     uint32 `json:"slot,omitempty"`
	Offset   uint32 `json:"offset,omitempty"`
	Size     int    `json:"size,omitempty"`
	Blocks   int    `json:"blocks,omitempty"`
	Block    uint64 `json:"block,omitempty"` // the first of the unit

	Branch uint32 `json:"branch,omitempty"`
	Leaf   uint32 `json:"leaf,omitempty"`
	Epoch  uint32 `json:"epoch,omitempty"`

	Why string `json:"why"`
}

// place returns the place that p is about. ok is false if there can be no such place.
func (p *savedPlace) place() (at badPlace, ok bool) {
	if p.ChunkSeq == 0 {
		return badPlace{leaf: metadata.Version{Branch: p.Branch, Leaf: p.Leaf, Epoch: p.Epoch}}, p.Branch != 0
	}
	e := format.MakeEntry(p.Slot, p.Offset, p.Size, p.Blocks, 0)
	return badPlace{record: unitKey{p.ChunkSeq, e, p.Block}}, e.Valid() && p.Block < MaxVolume/format.BlockSize
}

// saved returns what damageFile says of a place. ok is false if it is a leaf whose version is not known.
func (p badPlace) saved(why error) (s savedPlace, ok bool) {
	if k := p.record; k.chunk != 0 {
		return savedPlace{ChunkSeq: k.chunk, Slot: k.e.Slot(), Offset: k.e.Offset(), Size: k.e.Size(), Blocks: k.e.Blocks(), Block: k.first, Why: why.Error()}, true
	}
	return savedPlace{Branch: p.leaf.Branch, Leaf: p.leaf.Leaf, Epoch: p.leaf.Epoch, Why: why.Error()}, p.leaf.Branch != 0
}

// loadDamage makes known what earlier owners knew to be damaged. Without that, damage is only met again, so that an
// error is none of the store.
func (s *Store) loadDamage() {
	b, err := s.in.Read(damageFile)
	var saved savedDamage
	if err == nil {
		err = json.Unmarshal(b, &saved)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		s.log.Warn("what earlier owners knew to be damaged cannot be read", "file", s.in.Join(damageFile), "err", err)
		saved = savedDamage{}
	}
	r := &s.damage
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inFile = true
	for i := range saved.Places {
		if p, ok := saved.Places[i].place(); ok && len(r.known) < mostDamage {
			r.known[p], r.before[p] = errors.New(saved.Places[i].Why), struct{}{}
		}
	}
	r.changed(len(r.before) != len(saved.Places) || len(r.known) == 0)
	if n := len(r.known); n > 0 {
		s.goOnLooking()
		s.log.Log(context.Background(), s.damageLevel(), "damage is known from before; 'vdisk info VOL' says what it takes", "places", n)
	}
}

// saveDamage writes what is known to the file, if it has changed. A command that only looks at the store leaves the file
// as it is.
func (s *Store) saveDamage() {
	if s.readOnly != nil || s.opts.Look {
		return
	}
	r := &s.damage
	r.saving.Lock()
	defer r.saving.Unlock()
	list, changed, inFile := r.toSave()
	if !changed {
		return
	}
	err := s.replaceDamage(list, inFile)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.dirty = true
		s.log.Warn("what is damaged cannot be noted for the next owner", "file", s.in.Join(damageFile), "err", err)
		return
	}
	r.inFile = len(list) > 0
}

func (s *Store) replaceDamage(list []savedPlace, inFile bool) error {
	switch {
	case len(list) == 0 && !inFile:
		return nil
	case len(list) == 0:
		if err := s.in.Remove(damageFile); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(savedDamage{list})
	if err != nil {
		return err
	}
	return s.in.Replace(damageFile, b, true)
}

// toSave returns what the file has to have, in a fixed order, and whether that has changed since the last call.
func (r *damageRegister) toSave() (list []savedPlace, changed, inFile bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.dirty {
		return nil, false, r.inFile
	}
	r.dirty = false
	for _, p := range sortedPlaces(r.known) {
		if s, ok := p.saved(r.known[p]); ok {
			list = append(list, s)
		}
	}
	return list, true, r.inFile
}

// lookAgain reads some of the places again that an earlier owner knew, and forgets those that are whole by now.
func (s *Store) lookAgain(ctx context.Context) error {
	r := &s.damage
	for _, p := range r.someBefore() {
		if err := s.interrupted(ctx); err != nil {
			return err
		}
		switch why, sure := s.look(p); {
		case why != nil || !sure:
			r.lookedAt(p)
		default:
			r.drop(p)
		}
	}
	return nil
}

// dropUnnamed forgets the places that no volume and no snapshot has any more. An owner does that once, with what earlier
// owners knew, as it has to look at all names.
func (s *Store) dropUnnamed() {
	if len(s.points()) > damagePoints {
		return
	}
	if _, _, err := s.KnownDamage(context.Background()); err != nil && !errors.Is(err, ErrClosed) {
		s.log.Error("what is damaged cannot be looked at", "err", err)
	}
}

// goOnLooking wakes the damage prover. A command that only looks at the store ends soon: it looks at places when it is
// asked for damage, and at no others.
func (s *Store) goOnLooking() {
	if !s.opts.Look {
		wal.Poke(s.damage.work)
	}
}

// someBefore returns up to damageLines places that were known before this owner and were not looked at.
func (r *damageRegister) someBefore() []badPlace {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := sortedPlaces(r.before)
	return list[:min(len(list), damageLines)]
}

func (r *damageRegister) lookedAt(p badPlace) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.before, p)
}

// lookAtLeaf reads a version of a leaf in the table, and returns why that fails. It returns nil if the version is whole,
// or is not there any more.
func (s *Store) lookAtLeaf(v metadata.Version) error {
	var lf format.Leaf
	err := s.meta.View(func(tx *metadata.Tx) error { _, err := tx.Leaf(v, &lf); return err })
	if d := (*metadata.LeafDamage)(nil); errors.As(err, &d) && d.Version == v {
		return err
	}
	return nil
}
