package cow

import (
	"errors"
	"time"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// What the head of a volume with a quota holds: docs/reclaim.md, How it is counted.

// headCount counts what the head of a branch holds. The state of the table as of a generation is counted in the
// background, and every change since is added, from where that generation began. Store.mu guards all but done.
type headCount struct {
	holding
	begun bool // changes are added
	reset bool // a snapshot was taken since, so nothing of the table's state is exclusive any more
	known bool // the table's state is added
	done  chan struct{}
}

// isKnown reports whether c says what the head holds. The caller holds mu.
func (c *headCount) isKnown() bool { return c != nil && c.known }

// begin begins to add changes. The table, as of this moment, is counted later.
func (c *headCount) begin() { c.holding, c.begun, c.reset = holding{}, true, false }

// change adds a change of blocks of the head.
func (c *headCount) change(was, now holding) {
	if c != nil && c.begun {
		c.add(was, -1)
		c.add(now, +1)
	}
}

// endEpoch notes that a snapshot was taken.
func (c *headCount) endEpoch() {
	if c != nil && c.begun {
		c.exclusive, c.reset = 0, true
	}
}

// held returns what n blocks of a head's leaf hold, unless nobody counts. The leaf is of the branch's present epoch.
func (c *headCount) held(l *format.Leaf, first, n int) (h holding) {
	if c == nil {
		return h
	}
	for i := first; i < first+n; i++ {
		if e := l.Entries[i]; !e.IsHole() {
			h.mapped += format.BlockSize
			if l.IsChanged(i) {
				h.exclusive += int64(e.Share())
			}
		}
	}
	return h
}

const (
	defaultCountWait = 2 * time.Second
	// countAgain is the pause after a count that has failed.
	countAgain = 10 * time.Second
)

// countQuota begins to count what a volume holds, if it has a quota, unless that has begun. It returns nil if nobody counts.
// The caller holds mu.
func (s *Store) countQuota(v *volume) *headCount {
	if v.quota == (quota{}) || s.closed || s.readOnly != nil {
		return nil
	}
	return s.count(v.branch)
}

// counted is countQuota, and waits for the count, at most for countWait.
func (s *Store) counted(v *volume) {
	s.mu.Lock()
	c := s.countQuota(v)
	s.mu.Unlock()
	if c == nil {
		return
	}
	timeout := time.NewTimer(s.opts.countWait)
	defer timeout.Stop()
	select {
	case <-c.done:
	case <-timeout.C:
	case <-s.quit:
	}
}

// count begins to count what the head of a branch holds, unless that has begun. The caller holds mu, and the store is
// open.
func (s *Store) count(b *branch) *headCount {
	if b.count == nil {
		c := &headCount{done: make(chan struct{})}
		b.count = c
		s.wg.Go(func() { s.countRoutine(b, c) })
	}
	return b.count
}

// countRoutine counts until that succeeds, or nobody wants it any more.
func (s *Store) countRoutine(b *branch, c *headCount) {
	defer close(c.done)
	for {
		err := s.countHead(b, c)
		if err == nil || errors.Is(err, ErrClosed) || errors.Is(err, ErrFailed) {
			return
		}
		s.log.Warn("a quota does not hold yet: the blocks of the volume cannot be counted", "branch", b.ID, "err", err)
		select {
		case <-s.quit:
			return
		case <-time.After(countAgain):
		}
	}
}

// countHead counts once.
func (s *Store) countHead(b *branch, c *headCount) error {
	tx, err := s.beginCount(b, c)
	if err != nil || tx == nil {
		return err
	}
	return s.countTable(tx, b, c)
}

// countTable counts what the table has of the head, and closes tx, which beginCount has returned.
func (s *Store) countTable(tx *metadata.Tx, b *branch, c *headCount) (err error) {
	defer func() { err = errors.Join(err, tx.Close()) }()
	var base holding
	err = metadata.Guard(func() (err error) {
		base.mapped, base.exclusive, err = audit.CountHead(tx, b.ID, func() error { return s.unwanted(b, c) })
		return err
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case b.count != c:
		return nil
	case err != nil:
		c.begun = false
		return err
	case c.reset:
		base.exclusive = 0
	}
	c.add(base, +1)
	c.known = true
	return nil
}

// beginCount returns the table as of the moment from which on changes are added to c, or nil if c is not wanted any more.
func (s *Store) beginCount(b *branch, c *headCount) (*metadata.Tx, error) {
	s.checkpoints.mu.Lock()
	defer s.checkpoints.mu.Unlock()
	s.mu.Lock()
	err, wanted, changed := s.usable(), b.count == c, s.changedNow()
	switch {
	case err != nil || !wanted:
	case changed:
		s.changes.counts = append(s.changes.counts, c)
	default:
		c.begin()
	}
	s.mu.Unlock()
	if err != nil || !wanted {
		return nil, err
	}
	if changed {
		if err := s.checkpointLocked(); err != nil {
			s.mu.Lock()
			c.begun = false
			s.mu.Unlock()
			return nil, err
		}
	}
	return s.meta.Begin()
}

// errUnwanted ends a count that nobody wants any more.
var errUnwanted = errors.New("it is not wanted any more")

// unwanted returns an error if a count should end.
func (s *Store) unwanted(b *branch, c *headCount) error {
	select {
	case <-s.quit:
		return ErrClosed
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.count != c {
		return errUnwanted
	}
	return nil
}
