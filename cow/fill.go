package cow

import (
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
)

// How full a store is: docs/reclaim.md, How full it is.

// Fill is how full a store is: how many bytes are stored, and from how many on new data is refused.
type Fill struct {
	Bytes  int64 `json:"bytes"`
	FullAt int64 `json:"full_at"`
}

// Percent returns the fill in percent, rounded down, at most 100.
func (f Fill) Percent() int {
	if f.Bytes >= f.FullAt {
		return 100
	}
	return int(f.Bytes / max(1, f.FullAt/100))
}

// reaches reports whether the fill is at a level or above, in percent.
func (f Fill) reaches(level int) bool { return f.Bytes >= f.at(level) }

// at returns from how many bytes on a level is reached.
func (f Fill) at(level int) int64 { return int64(float64(f.FullAt) * float64(level) / 100) }

// FillChange is a crossing of a level of WatchFill.
type FillChange struct {
	Fill
	Level int
	Above bool // the level was reached; otherwise, the fill is below it again
}

const (
	// fillSlack is how many percent the fill has to fall below a level before that is told, and before it is told again
	// that the level is reached.
	fillSlack = 2
	fillLook  = 5 * time.Second
)

// fillWatch tells when a level of fill is reached. Only its goroutine uses crossed and reached.
type fillWatch struct {
	crossed func(FillChange)
	reached int           // how many of the levels
	work    chan struct{} // gets a value when due is reached
	levels  []int         // guarded by Store.mu
	due     int64         // the bytes at which to look again; guarded by Store.mu
}

// WatchFill logs when the store is filled to a level, in percent, and when it is less full again, and calls crossed, until
// the store is closed. The levels rise, as CheckFillLevels says. It is called once.
func (s *Store) WatchFill(levels []int, crossed func(FillChange)) error {
	if err := CheckFillLevels(levels); err != nil || len(levels) == 0 || s.readOnly != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.fill.levels, s.fill.crossed = levels, crossed
	s.wg.Go(s.fillRoutine)
	return nil
}

// Fill returns how full the store is now. What is dead and not yet cleaned does not count. Of a store that can only be
// read it is not known.
func (s *Store) Fill() (Fill, error) {
	if s.readOnly != nil {
		return Fill{}, s.readOnly
	}
	free, err := s.fs.Free()
	if err != nil {
		return Fill{}, fmt.Errorf("free space of the store: %w", err)
	}
	kept := s.kept()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wal.NoteCapacity(free, kept, s.slots.files)
	return Fill{s.liveNow(), s.mostNew(newParts)}, nil
}

// liveNow returns the live bytes of all chunks. The caller holds mu.
func (s *Store) liveNow() int64 {
	live := s.slots.live
	if c := s.wal.Current(); c != nil {
		live += int64(s.slots.get(c.Slot).live)
	}
	return live
}

// mostNew returns from how many live bytes on new mappings are refused that leave parts of 64 to overwrites. The caller
// holds mu.
func (s *Store) mostNew(parts int64) int64 { return max(0, s.mostNamed(parts)-s.opts.Reserve) }

// mostNamed is mostNew for new names, which may take the reserve of the options. The caller holds mu.
func (s *Store) mostNamed(parts int64) int64 {
	capacity := s.wal.Capacity()
	return max(0, capacity-capacity*parts/64-endChunks*s.wal.ChunkBytes-s.workRoom())
}

// lookAtFill wakes the watch if so many live bytes may reach the next level. The caller holds mu.
func (s *Store) lookAtFill(live int64) {
	if live >= s.fill.due {
		s.fill.due = math.MaxInt64
		wal.Poke(s.fill.work)
	}
}

// fillRoutine watches the fill until quit is closed.
func (s *Store) fillRoutine() {
	tick := time.NewTicker(fillLook)
	defer tick.Stop()
	for {
		if err := s.watchFill(); err != nil {
			s.log.Warn("it is not known how full the store is", "err", err)
		}
		select {
		case <-s.quit:
			return
		case <-s.fill.work:
		case <-tick.C:
		}
	}
}

// watchFill tells of the levels that were crossed since the last call, each once, in their order.
func (s *Store) watchFill() error {
	f, err := s.Fill()
	if err != nil {
		return err
	}
	w := &s.fill
	s.mu.Lock()
	levels := w.levels
	s.mu.Unlock()
	for w.reached < len(levels) && f.reaches(levels[w.reached]) {
		s.fillCrossed(FillChange{f, levels[w.reached], true})
		w.reached++
	}
	for w.reached > 0 && !f.reaches(levels[w.reached-1]-fillSlack) {
		w.reached--
		s.fillCrossed(FillChange{f, levels[w.reached], false})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fill.due = math.MaxInt64; w.reached < len(levels) {
		s.fill.due = f.at(levels[w.reached])
	}
	return nil
}

func (s *Store) fillCrossed(c FillChange) {
	if c.Above {
		s.log.Warn("the store is filling up: when it is full, new data is refused", "percent", c.Percent(), "level", c.Level,
			"bytes", c.Bytes, "fullAt", c.FullAt)
	} else {
		s.log.Info("the store is less full again", "percent", c.Percent(), "level", c.Level, "bytes", c.Bytes, "fullAt", c.FullAt)
	}
	s.fill.crossed(c)
}

// CheckFillLevels returns ErrInvalid if these cannot be Options.FillLevels.
func CheckFillLevels(levels []int) error {
	for i, l := range levels {
		if l < 1 || l > 100 || slices.Contains(levels[:i], l) || !slices.IsSorted(levels) {
			return fmt.Errorf("levels of fill %v: they are percentages from 1 to 100 that rise: %w", levels, ErrInvalid)
		}
	}
	return nil
}
