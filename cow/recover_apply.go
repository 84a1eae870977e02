package cow

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vdisk/vdisk/cow/internal/leafcache"
	"github.com/vdisk/vdisk/format"
)

// A replay applies millions of records. It collects them in batches and applies a batch leaf by leaf, on all
// processors. Within a batch, the order of records of different leaves does not matter.

const (
	batchParts = 64      // parts that processors take one after the other; a leaf is in one part
	batchMost  = 2 << 20 // default number of changes in a batch: 32 MiB
	groupCount = 4096    // groups into which the leaves of a part fall
)

// heldChange is the change that a record makes to a leaf.
type heldChange struct {
	e     format.Entry // of the first block; 0: a hole
	index uint32       // index of the leaf
	b     uint16       // index in batch.branches
	first uint8        // first block within the leaf
	last  uint8
}

// batch holds the changes that are not applied yet, by part, each part in the order of the log.
type batch struct {
	s        *Store
	parts    [batchParts][]heldChange
	held     int
	branches []*branch

	// mu guards what the appliers share: the store's lists of dirty things, and the accounting of moved blocks.
	mu sync.Mutex
	// moved says, by slot, whether blocks of the chunk may have been moved elsewhere. Appending does not change that,
	// so it stays the same within a batch.
	moved []bool
}

// hold adds a change of n blocks of a leaf, from block first on. If the batch is full, it applies the batch first.
func (t *batch) hold(b *branch, index uint32, first, n int, e format.Entry) error {
	if t.held == t.s.opts.replayBatch || len(t.branches) == 1<<16 {
		if err := t.apply(); err != nil {
			return err
		}
	}
	if n := len(t.branches); n == 0 || t.branches[n-1] != b { // a branch may be listed twice
		t.branches = append(t.branches, b)
	}
	p := &t.parts[leafHash(b, index)%batchParts]
	*p = append(*p, heldChange{e, index, uint16(len(t.branches) - 1), uint8(first), uint8(first + n - 1)})
	t.held++
	return nil
}

// leafHash spreads the leaves over parts and groups.
func leafHash(b *branch, index uint32) uint32 {
	return uint32((uint64(b.ID)<<32 | uint64(index)) * 0x9e3779b97f4a7c15 >> 40)
}

// apply applies all held changes, and empties the batch.
func (t *batch) apply() error {
	if t.held == 0 {
		return nil
	}
	var next atomic.Int32
	var wg sync.WaitGroup
	t.moved = slices.Grow(t.moved[:0], int(t.s.slots.end()))[:t.s.slots.end()]
	clear(t.moved)
	t.s.slots.each(func(c *chunk) { t.moved[c.Slot] = c.moved > 0 })
	workers := make([]applier, runtime.GOMAXPROCS(0))
	for i := range workers {
		a := &workers[i]
		a.t, a.live = t, make([]int64, len(t.moved))
		wg.Go(func() {
			for n := next.Add(1); n <= batchParts && a.err == nil; n = next.Add(1) {
				a.err = a.apply(t.parts[n-1])
			}
		})
	}
	wg.Wait()
	var errs []error
	for i := range workers {
		errs = append(errs, workers[i].err)
		workers[i].merge()
	}
	for i := range t.parts {
		t.parts[i] = t.parts[i][:0]
	}
	t.held, t.branches = 0, t.branches[:0]
	return errors.Join(errs...)
}

// applier applies parts of a batch, one after the other, in parallel with other appliers.
type applier struct {
	t       *batch
	live    []int64 // by slot: change of the chunk's live bytes
	grouped []heldChange
	err     error
}

// apply applies a part: all changes of one leaf, then those of the next.
func (a *applier) apply(part []heldChange) error {
	part = a.group(part)
	for len(part) > 0 {
		first := part[0]
		b := a.t.branches[first.b]
		n := 1
		for n < len(part) && part[n].index == first.index && a.t.branches[part[n].b] == b {
			n++
		}
		if err := a.applyLeaf(b, first.index, part[:n]); err != nil {
			return err
		}
		part = part[n:]
	}
	return nil
}

// group sorts the changes so that those of one leaf are together, in their order. It is a counting sort by hash.
func (a *applier) group(part []heldChange) []heldChange {
	var next [groupCount]uint32
	group := func(h *heldChange) uint32 { return leafHash(a.t.branches[h.b], h.index) / batchParts % groupCount }
	for i := range part {
		next[group(&part[i])]++
	}
	at := uint32(0)
	for i, n := range next {
		next[i] = at
		at += n
	}
	if cap(a.grouped) < len(part) {
		a.grouped = make([]heldChange, len(part)+len(part)/4)
	}
	out := a.grouped[:len(part)]
	for i := range part {
		g := group(&part[i])
		out[next[g]] = part[i]
		next[g]++
	}
	return out
}

func (a *applier) applyLeaf(b *branch, index uint32, changes []heldChange) error {
	l, content, err := a.own(b, index)
	if err != nil {
		return err
	}
	defer l.Unlock()
	for _, h := range changes {
		e := h.e
		for i := int(h.first); i <= int(h.last); i++ {
			if h.e != 0 {
				e = h.e.WithIndex(i - int(h.first))
			}
			a.account(mapBlock(content, i, e), -1)
			a.account(e, +1)
		}
	}
	return nil
}

// own returns a leaf that is writable, locked, and its content. A log changes no more leaves than fitted into the cache
// of the owner that wrote it. If that cache was larger than this one, this one grows, until the checkpoint with which
// Open then ends. A checkpoint in the middle of the log is impossible: at its replay position, a batch would be half
// applied.
func (a *applier) own(b *branch, index uint32) (l leafcache.Locked, content *leafcache.Content, err error) {
	s := a.t.s
	k := b.leaf(index, head)
	for {
		l, err = s.cache.LockLoaded(k)
		if err == nil {
			a.t.mu.Lock()
			content, err = l.MakeWritable(b.Epoch)
			b.written = b.Epoch
			a.t.mu.Unlock()
			if err == nil {
				return l, content, nil
			}
			l.Unlock()
		}
		if !errors.Is(err, errFull) {
			return l, nil, err
		}
		if err := s.cache.Grow(k); err != nil {
			return l, nil, err
		}
	}
}

func (a *applier) account(e format.Entry, sign int64) {
	slot := e.Slot()
	switch {
	case e.IsHole() || int(slot) >= len(a.live):
	case a.t.moved[slot]:
		a.t.mu.Lock()
		a.t.s.account(e, int(sign))
		a.t.mu.Unlock()
	default:
		a.live[slot] += sign * int64(e.Share())
	}
}

// merge adds the counted changes to the live bytes of the chunks.
func (a *applier) merge() {
	s := a.t.s
	for slot, n := range a.live {
		if c := s.slots.get(uint32(slot)); n != 0 && c != nil {
			c.live = uint32(int64(c.live) + n)
			s.markRow(c)
		}
	}
}
