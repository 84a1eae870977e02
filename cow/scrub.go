package cow

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow/internal/audit"
	"github.com/vdisk/vdisk/cow/internal/wal"
	"github.com/vdisk/vdisk/metadata"
)

// A scrub reads all live records from the disk, and verifies them: docs/operations.md, Scrubbing. It works in the
// background, at a low rate, and its progress outlives the process.

const (
	// scrubFile has the progress of the scrub, and the result of the last one.
	scrubFile = "scrub"
	// scrubRate is how many bytes of records a scrub reads in a second if it is not told otherwise.
	scrubRate = 32 << 20
	// scrubSaves is how often the progress is written to the file.
	scrubSaves = time.Minute
)

// ScrubOptions are the options of StartScrub.
type ScrubOptions struct {
	// Rate is how many bytes of records to read in a second at most; negative: no limit. If it is 0, it is 32 MiB, and
	// 1 MiB while others use the store.
	Rate int64
}

// ScrubRun is one scrub.
type ScrubRun struct {
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
	Leaves  int64     `json:"leaves"`       // versions of leaves that were gone over
	Total   int64     `json:"leaves_total"` // that there were when it began
	Bytes   int64     `json:"bytes"`        // of records that were read and verified
	// Damaged is how many records do not verify, and Unreadable how many could not be read.
	Damaged    int `json:"damaged"`
	Unreadable int `json:"unreadable"`
}

// ScrubStatus is what is known of scrubs.
type ScrubStatus struct {
	Now    *ScrubRun `json:"now,omitempty"`    // under way, or paused; nil: none
	Paused bool      `json:"paused,omitempty"` // it goes on when it is started again
	Active bool      `json:"active,omitempty"` // this process works on it
	Last   *ScrubRun `json:"last,omitempty"`   // the last that came to its end; nil: none
	Next   time.Time `json:"next,omitzero"`    // when the owner begins one by itself; zero: never
}

// scrubState is the content of scrubFile.
type scrubState struct {
	ScrubStatus
	Rate   int64  `json:"rate,omitempty"`
	Branch uint32 `json:"branch"` // the version of a leaf to go on with
	Leaf   uint32 `json:"leaf"`
	Epoch  uint32 `json:"epoch"`
}

func (s *scrubState) at() metadata.Version {
	return metadata.Version{Branch: s.Branch, Leaf: s.Leaf, Epoch: s.Epoch}
}

func (s *scrubState) goOnAt(v metadata.Version) {
	s.Branch, s.Leaf, s.Epoch = v.Branch, v.Leaf, v.Epoch
}

// scrubber is the scrub of a store.
type scrubber struct {
	saving  sync.Mutex // one writes the file at a time; mu is taken under it
	mu      sync.Mutex // guards what follows; no other lock is taken under it
	state   scrubState
	started bool          // its goroutine runs; guarded by Store.mu
	err     error         // why the scrub was paused; nil: it was asked for
	changed chan struct{} // closed and replaced when a scrub begins, pauses or ends
	work    chan struct{} // wakes the goroutine
}

// notify wakes those who wait for a change. The caller holds mu.
func (c *scrubber) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
	wal.Poke(c.work)
}

// loadScrub reads what earlier owners have noted. Without that, the next scrub only begins earlier, so that an error is
// none of the store.
func (s *Store) loadScrub() {
	c := &s.scrub
	c.changed, c.work = make(chan struct{}), make(chan struct{}, 1)
	b, err := s.in.Read(scrubFile)
	if err == nil {
		err = json.Unmarshal(b, &c.state)
	}
	if err != nil {
		c.state = scrubState{}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("the progress of the scrub cannot be read", "file", s.in.Join(scrubFile), "err", err)
	}
	c.state.Active, c.state.Next = false, time.Time{}
}

// saveScrub writes the progress to the file.
func (s *Store) saveScrub() {
	c := &s.scrub
	c.saving.Lock()
	defer c.saving.Unlock()
	c.mu.Lock()
	st := c.state
	st.Active, st.Next = false, time.Time{}
	b, err := json.Marshal(&st)
	c.mu.Unlock()
	if err == nil {
		err = s.in.Replace(scrubFile, b, true)
	}
	if err != nil {
		s.log.Warn("the progress of the scrub cannot be written", "file", s.in.Join(scrubFile), "err", err)
	}
}

// StartScrub begins a scrub, or goes on with the one that was paused or that an earlier owner did not end. If one is
// under way, only its rate changes.
func (s *Store) StartScrub(o ScrubOptions) error {
	_, err := s.startScrub(o)
	return wrapIf(err, "scrub")
}

func (s *Store) startScrub(o ScrubOptions) (*ScrubRun, error) {
	if err := s.beginTask(); err != nil {
		return nil, err
	}
	defer s.tasks.Done()
	if err := cmp.Or(s.readOnly, s.live()); err != nil {
		return nil, err
	}
	c := &s.scrub
	c.mu.Lock()
	goesOn := c.state.Now != nil
	c.mu.Unlock()
	total := int64(0)
	if !goesOn {
		if err := s.Checkpoint(); err != nil && !errors.Is(err, ErrNoSpace) { // then the table has what there is
			return nil, err
		}
		err := s.meta.View(func(tx *metadata.Tx) error {
			n, _, err := tx.Counts()
			total = int64(n)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	if err := s.routineForScrub(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	if c.state.Now == nil {
		c.state.Now = &ScrubRun{Started: time.Now().UTC().Truncate(time.Second), Total: total}
		c.state.goOnAt(audit.FirstVersion())
	}
	c.state.Paused, c.state.Active, c.state.Rate, c.err = false, true, o.Rate, nil
	run := c.state.Now
	c.notify()
	c.mu.Unlock()
	s.saveScrub() // so that the next owner goes on if this one is killed
	return run, nil
}

// routineForScrub makes sure that the scrub's goroutine runs.
func (s *Store) routineForScrub() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if !s.scrub.started {
		s.scrub.started = true
		s.wg.Go(s.scrubRoutine)
	}
	return nil
}

// PauseScrub lets a scrub rest until it is started again, also by the next owner. StopScrub gives it up. Without a scrub
// they return ErrNotFound.
func (s *Store) PauseScrub() error { return wrapIf(s.endScrub(false), "scrub") }

// StopScrub gives a scrub up.
func (s *Store) StopScrub() error { return wrapIf(s.endScrub(true), "scrub") }

func (s *Store) endScrub(drop bool) error {
	if err := s.beginTask(); err != nil {
		return err
	}
	defer s.tasks.Done()
	if s.readOnly != nil {
		return s.readOnly
	}
	c := &s.scrub
	c.mu.Lock()
	if c.state.Now == nil {
		c.mu.Unlock()
		return fmt.Errorf("no scrub is under way: %w", ErrNotFound)
	}
	c.state.Paused, c.state.Active = true, false
	if drop {
		c.state.Now, c.state.Paused = nil, false
	}
	c.notify()
	c.mu.Unlock()
	s.saveScrub()
	return nil
}

// ScrubStatus returns what is known of scrubs.
func (s *Store) ScrubStatus() ScrubStatus {
	c := &s.scrub
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.state.ScrubStatus
	st.Next = s.nextScrub()
	if st.Now != nil {
		now := *st.Now // the goroutine goes on with it
		st.Now = &now
	}
	return st
}

// nextScrub returns when a scrub begins by itself. The caller holds scrub.mu.
func (s *Store) nextScrub() time.Time {
	switch c := &s.scrub; {
	case s.opts.ScrubEvery <= 0 || c.state.Now != nil || s.readOnly != nil:
		return time.Time{}
	case c.state.Last != nil:
		return c.state.Last.Started.Add(s.opts.ScrubEvery)
	}
	return s.info.Created.Add(s.opts.ScrubEvery)
}

// Scrub begins a scrub, or goes on with one, and waits for its end. It returns ErrBusy if the scrub is paused or given
// up meanwhile. If ctx ends, the scrub goes on.
func (s *Store) Scrub(ctx context.Context, o ScrubOptions) (ScrubRun, error) {
	run, err := s.startScrub(o)
	if err == nil {
		err = s.waitScrub(ctx, run)
	}
	if err != nil {
		return ScrubRun{}, fmt.Errorf("scrub: %w", err)
	}
	return *run, nil
}

// waitScrub waits for the end of a run, which nothing changes any more after that.
func (s *Store) waitScrub(ctx context.Context, run *ScrubRun) error {
	c := &s.scrub
	for {
		c.mu.Lock()
		now, last, paused, changed, err := c.state.Now, c.state.Last, c.state.Paused, c.changed, c.err
		c.mu.Unlock()
		switch {
		case last == run:
			return nil
		case now != run || paused:
			return cmp.Or(err, fmt.Errorf("it was stopped: %w", ErrBusy))
		}
		select {
		case <-changed:
		case <-s.quit:
			return ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
