package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/cow/internal/fault"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// badPlace names something that can be damaged: a record, or else a version of a leaf.
type badPlace struct {
	record unitKey // where it is now: its copy, if it was moved
	leaf   metadata.Version
}

// leafIndex returns the index of the leaf that maps what is at the place.
func (p badPlace) leafIndex() uint32 {
	if p.record.chunk == 0 {
		return p.leaf.Leaf
	}
	return uint32(p.record.first / format.LeafBlocks)
}

func (p badPlace) compare(q badPlace) int {
	return cmp.Or(cmp.Compare(p.record.chunk, q.record.chunk), cmp.Compare(p.record.e.Offset(), q.record.e.Offset()), cmp.Compare(p.record.first, q.record.first),
		cmp.Compare(p.leaf.Branch, q.leaf.Branch), cmp.Compare(p.leaf.Leaf, q.leaf.Leaf), cmp.Compare(p.leaf.Epoch, q.leaf.Epoch))
}

func (p badPlace) String() string {
	if p.record.chunk == 0 {
		return fmt.Sprintf("branch %d leaf %d epoch %d", p.leaf.Branch, p.leaf.Leaf, p.leaf.Epoch)
	}
	return fmt.Sprintf("chunk %s offset %d", wal.ChunkName(p.record.e.Slot()), p.record.e.Offset())
}

// damageRegister has what of the store cannot be read: docs/engine.md, Known damage.
type damageRegister struct {
	work    chan struct{} // there are new places
	proving sync.Mutex    // one prove at a time

	saving sync.Mutex // one writes the file at a time; mu is taken under it

	mu     sync.Mutex // taken while holding any lock of the engine, and no lock is taken under it
	met    map[badPlace]error
	known  map[badPlace]error
	before map[badPlace]struct{} // of known: from the file, and not looked at by this owner
	more   int                   // places for which there was no room
	told   int                   // of these, what was logged
	dirty  bool                  // known differs from the file
	inFile bool                  // there is a file

	some atomic.Bool // known is not empty
}

const (
	// mostDamage bounds the places that are known, and those that are to be proved.
	mostDamage = 1 << 14
	// damageLines is how many places are logged at a time, and damagePause the time between two times.
	damageLines = 32
	damagePause = 10 * time.Second
	// damageNames is how many ranges a line of the log names.
	damageNames = 8
	// damagePoints is for how many volumes and snapshots they are looked for.
	damagePoints = 10000
)

func newDamageRegister() damageRegister {
	return damageRegister{work: make(chan struct{}, 1), met: map[badPlace]error{}, known: map[badPlace]error{}, before: map[badPlace]struct{}{}}
}

// note notes a place that may be damaged. It waits for nothing, and may be called while holding locks.
func (r *damageRegister) note(p badPlace, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known[p] != nil || r.met[p] != nil {
		return
	}
	if len(r.met)+len(r.known) < mostDamage {
		r.met[p] = why
	} else {
		r.more++
	}
	wal.Poke(r.work)
}

// sound forgets a place that has proved to be whole.
func (r *damageRegister) sound(p badPlace) {
	if r.some.Load() {
		r.drop(p)
	}
}

func (r *damageRegister) drop(p badPlace) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.known[p] != nil
	delete(r.known, p)
	delete(r.before, p)
	r.changed(was)
}

// changed notes that known is another one now, if so. The caller holds mu.
func (r *damageRegister) changed(so bool) {
	r.some.Store(len(r.known) > 0)
	if so {
		r.dirty = true
		wal.Poke(r.work)
	}
}

// proved makes a place that was met known if why is not nil, and otherwise forgets it.
func (r *damageRegister) proved(p badPlace, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.met, p)
	if why != nil {
		r.known[p] = why
		r.changed(true)
	}
}

// toProve returns the places that were met and are not proved, in a fixed order.
func (r *damageRegister) toProve() []badPlace {
	r.mu.Lock()
	defer r.mu.Unlock()
	return sortedPlaces(r.met)
}

func sortedPlaces[V any](m map[badPlace]V) []badPlace {
	return slices.SortedFunc(maps.Keys(m), badPlace.compare)
}

// untold returns how many more places than are known have been met since the last call.
func (r *damageRegister) untold() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.more - r.told
	r.told = r.more
	return n
}

// all returns a copy of what is known. complete is false if there was no room for more.
func (r *damageRegister) all() (known map[badPlace]error, complete bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.known), r.more == 0
}

// metRecords notes the records of a read whose fetches the disk could not do. Some of them may be whole.
func (pl *ReadPlan) metRecords(why error) {
	for i := range pl.records {
		if r := &pl.records[i]; !r.done {
			pl.d.s.damage.note(badPlace{record: r.key()}, why)
		}
	}
}

// metLeaf notes a version of a leaf that could not be loaded.
func (s *Store) metLeaf(index uint32, err error) {
	if errors.Is(err, ErrCorrupt) {
		s.damage.note(leafPlace(index, err), err)
	}
}

// leafPlace returns the place of a leaf that could not be loaded. If the table does not say which version it is, all
// that cannot be loaded have the same place.
func leafPlace(index uint32, err error) badPlace {
	var d *metadata.LeafDamage
	if errors.As(err, &d) {
		return badPlace{leaf: d.Version}
	}
	return badPlace{leaf: metadata.Version{Leaf: index}}
}

// metProblem notes what a check or a scrub has found, and returns its place, which is zero if it is about none.
func (s *Store) metProblem(p audit.Problem) badPlace {
	at := badPlace{unitKey{p.Record.Chunk, p.Record.Entry, p.Record.First}, p.Version}
	if at != (badPlace{}) {
		s.damage.note(at, errors.New(p.What))
	}
	return at
}

// metAt notes the record at an offset of a chunk. If its header does not verify, the chunk's summary says what it is.
func (s *Store) metAt(c *chunk, off uint32, why error) {
	note := func(block uint64, size, blocks int) {
		e := format.MakeEntry(c.Slot, off, size, blocks, 0)
		s.damage.note(badPlace{record: unitKey{c.Seq, e, block}}, why)
	}
	var head [format.RecordHeaderSize]byte
	if s.readRecord(c, off, head[:]) == nil {
		if h, err := format.DecodeRecordHeader(head[:], c.Seq, off); err == nil {
			note(h.Block, h.Size(), h.Blocks)
			return
		}
	}
	sum, err := c.SummaryInFile()
	if err != nil || sum == nil {
		return
	}
	_ = sum.Each(func(_ uint64, at uint32, e *format.SummaryEntry) bool { // a summary that is wrong names nothing
		if at == off && (e.Kind == format.KindData || e.Kind == format.KindMoved) {
			note(e.Block, e.Size, e.Blocks)
		}
		return at < off
	})
}

// damageRoutine proves and logs damage as it is met.
func (s *Store) damageRoutine() {
	named := len(s.damage.someBefore()) == 0 // whether it was looked for those that have what earlier owners knew
	for {
		select {
		case <-s.quit:
			return
		case <-s.damage.work:
		}
		if err := s.proveDamage(context.Background()); err != nil && !errors.Is(err, ErrClosed) {
			s.log.Error("what is damaged cannot be looked at", "err", err)
		}
		if len(s.damage.someBefore()) > 0 {
			s.goOnLooking()
		} else if !named {
			named = true
			s.dropUnnamed()
		}
		s.saveDamage()
		select {
		case <-s.quit:
			return
		case <-time.After(damagePause):
		}
	}
}

// proveDamage reads the places again that were met, and makes those known that are damaged. It logs them.
func (s *Store) proveDamage(ctx context.Context) error {
	r := &s.damage
	r.proving.Lock()
	defer r.proving.Unlock()
	s.dropGone()
	var list []badPlace
	for _, p := range r.toProve() {
		if err := s.interrupted(ctx); err != nil {
			return err
		}
		if why := s.failure(p); why != nil {
			list = append(list, p)
			r.proved(p, why)
		} else {
			r.proved(p, nil)
		}
	}
	err := s.lookAgain(ctx)
	more := r.untold() + max(0, len(list)-damageLines)
	err = cmp.Or(err, s.logDamage(ctx, list[:min(len(list), damageLines)]))
	if more > 0 {
		s.log.Log(ctx, s.damageLevel(), "more is damaged; 'vdisk check --read-data' lists all", "places", more)
	}
	return err
}

func (s *Store) damageLevel() slog.Level {
	if s.opts.Brief {
		return slog.LevelInfo
	}
	return slog.LevelError
}

// logDamage logs places that have become known.
func (s *Store) logDamage(ctx context.Context, list []badPlace) error {
	if len(list) == 0 {
		return nil
	}
	bad := map[badPlace]*[]Lost{}
	for _, p := range list {
		bad[p] = new([]Lost)
	}
	points := s.points()
	some := points[:min(len(points), damagePoints)]
	err := s.lostTo(ctx, bad, some)
	known, _ := s.damage.all()
	for _, p := range list {
		s.log.Log(ctx, s.damageLevel(), "data is damaged and cannot be read", "where", p.String(), "err", known[p], "lost", lostText(*bad[p], len(some) < len(points)))
		s.opts.Notice(Notice{Kind: NoticeDamage, Where: p.String(), Lost: *bad[p], Err: known[p]})
	}
	return err
}

// dropGone forgets the records whose chunks are gone.
func (s *Store) dropGone() {
	known, _ := s.damage.all()
	for p := range known {
		if c := s.slots.get(p.record.e.Slot()); p.record.chunk != 0 && (c == nil || c.Seq != p.record.chunk) {
			s.damage.drop(p)
		}
	}
}

// lostText is what a line of the log says of ranges.
func lostText(lost []Lost, more bool) string {
	var parts []string
	for _, l := range lost[:min(len(lost), damageNames)] {
		parts = append(parts, l.String())
	}
	switch n := len(lost) - len(parts); {
	case n > 0:
		parts = append(parts, fmt.Sprintf("and %d more", n))
	case more:
		parts = append(parts, "and maybe more")
	case len(parts) == 0:
		return "nothing as of now"
	}
	return strings.Join(parts, ", ")
}

// failure reads what is at a place that was met, and returns why that fails. It returns nil if it can be read or is not
// there any more, and if the error says nothing of what the disk has. A leaf is not read: its checksum is of what is in
// memory.
func (s *Store) failure(p badPlace) error {
	if p.record.chunk == 0 {
		s.damage.mu.Lock()
		defer s.damage.mu.Unlock()
		return s.damage.met[p]
	}
	why, _ := s.look(p)
	return why
}

// look reads what is at a place. why is nil if it can be read or is not there any more, and if the error says nothing of
// what the disk has; sure is false then.
func (s *Store) look(p badPlace) (why error, sure bool) {
	k := p.record
	if k.chunk == 0 {
		return s.lookAtLeaf(p.leaf), true
	}
	c := s.slots.get(k.e.Slot())
	if c == nil || c.Seq != k.chunk || !c.TryAcquire() {
		return nil, true
	}
	defer c.Release()
	stored := make([]byte, k.e.Size())
	err := s.readRecord(c, k.e.Offset(), stored)
	if err == nil {
		err = k.verify(stored)
	}
	if fault.OutOfReach(err) || s.slots.get(k.e.Slot()) != c {
		return nil, !fault.OutOfReach(err)
	}
	return err, true
}

// verify verifies and decompresses a record as stored.
func (k unitKey) verify(stored []byte) error {
	payload, codec, err := format.VerifyRecord(stored, k.chunk, k.e, k.first)
	if err != nil {
		return err
	}
	return format.Decompress(codec, make([]byte, k.e.Blocks()*format.BlockSize), payload)
}

// Damage is a part of the store that cannot be read.
type Damage struct {
	Where string `json:"where"` // a record, as "chunk 00000003 offset 8192", or a version of a leaf
	Why   string `json:"why"`
	Lost  []Lost `json:"lost"`          // by name, in the order of the offsets
	Map   bool   `json:"map,omitempty"` // it is a version of a leaf, so it is not known what was there
}

// KnownDamage returns the damage that was met since the store was opened, as far as it takes something of the volumes
// and snapshots in refs; without refs, of any. Only those are listed in Lost. complete is false if more damage was met
// than is remembered.
func (s *Store) KnownDamage(ctx context.Context, refs ...Ref) (list []Damage, complete bool, err error) {
	if err := s.beginTask(); err != nil {
		return nil, false, fmt.Errorf("known damage: %w", err)
	}
	defer s.tasks.Done()
	if err := s.proveDamage(ctx); err != nil {
		return nil, false, fmt.Errorf("known damage: %w", err)
	}
	known, complete := s.damage.all()
	if len(known) == 0 {
		return nil, complete, nil
	}
	bad := map[badPlace]*[]Lost{}
	for p := range known {
		bad[p] = new([]Lost)
	}
	points := s.points()
	if len(refs) > 0 {
		points = slices.DeleteFunc(points, func(p namedPoint) bool { return !slices.Contains(refs, p.ref) })
	}
	if err := s.lostTo(ctx, bad, points); err != nil {
		return nil, false, fmt.Errorf("known damage: %w", err)
	}
	for p, lost := range bad {
		if len(*lost) > 0 {
			list = append(list, Damage{p.String(), known[p].Error(), *lost, p.record.chunk == 0})
		} else if len(refs) == 0 {
			s.damage.drop(p) // nobody refers to it
		}
	}
	slices.SortFunc(list, func(a, b Damage) int {
		return cmp.Or(a.Lost[0].compare(b.Lost[0]), strings.Compare(a.Where, b.Where))
	})
	return list, complete, nil
}
