package cow

import (
	"context"
	"errors"
	"time"
)

// urgency is how much the cleaner is needed.
type urgency uint8

const (
	idle    urgency = iota
	tidy            // there is more dead data than there should be
	pressed         // there is little room
	hungry          // writers wait for room
)

// hungryTries is how many chunks are cleaned without a gain before writers hear that there is no room.
const hungryTries = 4

// cleanRoutine cleans when there is reason, until quit.
func (s *Store) cleanRoutine() {
	t := throttle{s: s}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer func() { // nobody waits for a cleaner that is gone
		s.pacer.set(0)
		s.mu.Lock()
		s.cleanerExhausted = true
		s.wal.space.Broadcast()
		s.mu.Unlock()
	}()
	for {
		select {
		case <-s.quit:
			return
		case <-s.cleanWork:
		case <-tick.C:
		}
		for u := s.urgency(); u > idle; u = s.urgency() {
			if more := s.cleanFor(u, &t); !more {
				break
			}
		}
		now, owed, _ := t.room()
		s.cleaningFailed(t.giveUp(now, owed))
		s.pacer.set(0)
	}
}

// cleanFor cleans one chunk, as fast as the urgency asks, and has the table give it up; false: that is all for now.
func (s *Store) cleanFor(u urgency, t *throttle) (more bool) {
	waste := worthwhile
	pause := func(took time.Duration) error { return t.batch(took, u == hungry) }
	if u == tidy {
		waste, pause = slack/(1+slack)/2, s.giveWay
	}
	before, start := s.used(false), time.Now()
	taken, failed := s.taken(), false
	r, err := s.cleanOne(context.Background(), waste, all, pause)
	gained := func() bool { return r.Moved < r.Freed || s.used(false) < before }
	// There may be more dead than the table knows, and chunks that it does not have all of. What one checkpoint brings
	// may be enough: to reap everything that was deleted can take very long. Where there is no more of that, a chunk that
	// was not given back whole, as somebody took a snapshot of it meanwhile, is no reason to give up either.
	for tries := 0; u == hungry && (err == nil || errors.Is(err, ErrNoSpace)) && !gained(); tries++ {
		if err = s.interrupted(context.Background()); err == nil {
			err = s.checkpoint()
		}
		if failed = err != nil; failed {
			break
		}
		more := s.reapsMore()
		r, err = s.cleanOne(context.Background(), waste, all, nil)
		if !more && (r.Chunks == 0 || err != nil || tries == hungryTries) {
			break
		}
	}
	switch {
	case u != hungry && r.Chunks == 0 && errors.Is(err, ErrNoSpace) && s.owes():
		err = s.checkpoint() // with what that gives back there may be room to clean in
	case err != nil || r.Chunks == 0:
	case u == pressed:
		t.chunk(r.Freed-r.Moved, time.Since(start))
	default:
		err = s.checkpoint()
	}
	gain := gained()
	s.cleaningFailed(err)
	s.mu.Lock()
	defer s.mu.Unlock()
	// Until a checkpoint or a writer changes something. One that found room meanwhile may have done so, and so may who
	// has deleted something since the reaper was asked.
	s.cleanerExhausted = u == hungry && (err != nil || !gain) && s.roomTaken == taken && (failed || !s.awaitsReaper())
	s.writersWaiting = false
	s.wal.space.Broadcast()
	return gain && err == nil
}

// reapsMore reports whether there is more to reap, now or after the next checkpoint.
func (s *Store) reapsMore() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.awaitsReaper()
}

// owes reports whether the next checkpoint gives chunks back.
func (s *Store) owes() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.slots.owed+s.pendingFree > 0
}

// taken counts the chunks that data was given.
func (s *Store) taken() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roomTaken
}

// cleaningFailed says what went wrong, but for want of room, of which the writers hear.
func (s *Store) cleaningFailed(err error) {
	if err != nil && !errors.Is(err, ErrNoSpace) && !errors.Is(err, ErrClosed) {
		s.log.Error("cleaning failed", "err", err)
	}
}

// used is what the chunk files take, with or without those that are kept for reuse.
func (s *Store) used(spares bool) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.slots.files
	if !spares {
		n -= s.wal.pool.bytes()
	}
	return n
}

// needRoom is called by writers that find no room, with mu held. It wakes the cleaner; false: that can give none.
func (s *Store) needRoom() bool {
	if s.cleanerExhausted || s.closed || s.opts.checkpointInterval < 0 {
		return false
	}
	s.writersWaiting = true
	poke(s.cleanWork)
	return true
}

// urgency looks at how much room and how much dead data there is.
func (s *Store) urgency() urgency {
	free, err := s.fs.Free()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.wal.err() != nil {
		return idle
	}
	if s.writersWaiting {
		return hungry
	}
	live := s.slots.dirtyLive
	dead := s.slots.dirtyEnds - live
	switch {
	case err == nil && s.room(free)+s.slots.owed+s.pendingFree < (ahead-1)*s.wal.chunkBytes+s.workRoom() && !s.cleanerExhausted && dead > 0:
		return pressed
	case float64(dead) > slack*float64(live)+slackBytes:
		return tidy
	}
	return idle
}

// giveWay lets others go first: where there is other work, twice as long as the last batch took. It fails when the
// store closes.
func (s *Store) giveWay(took time.Duration) error {
	s.mu.Lock()
	others := s.wal.appended - s.cleaned
	s.mu.Unlock()
	wait := took / 4
	if others != s.othersSeen {
		wait = 2 * took
	}
	s.othersSeen = others
	if s.urgency() == hungry {
		return nil
	}
	timer := time.NewTimer(min(wait, time.Second))
	defer timer.Stop()
	select {
	case <-s.quit:
		return ErrClosed
	case <-timer.C:
		return nil
	}
}
