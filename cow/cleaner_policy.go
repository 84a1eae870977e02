package cow

import (
	"context"
	"errors"
	"time"
)

// urgency is how urgently the cleaner is needed.
type urgency uint8

const (
	idle    urgency = iota
	tidy            // there is more dead data than there should be
	pressed         // room is short
	hungry          // writers wait for room
)

// hungryTries is how many chunks the cleaner cleans without a gain before waiting writers get ENOSPC.
const hungryTries = 4

// cleanRoutine cleans whenever there is reason to, until the store closes (quit).
func (s *Store) cleanRoutine() {
	t := throttle{s: s}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer func() { // no writer may wait for a cleaner that has ended
		s.cleaner.pacer.set(0)
		s.mu.Lock()
		s.cleaner.exhausted = true
		s.wal.RoomMade()
		s.mu.Unlock()
	}()
	for {
		select {
		case <-s.quit:
			return
		case <-s.cleaner.work:
		case <-tick.C:
		}
		for u := s.urgency(); u > idle; u = s.urgency() {
			if more := s.cleanFor(u, &t); !more {
				break
			}
		}
		now, owed, _ := t.room()
		s.cleaningFailed(t.giveUp(now, owed))
		s.cleaner.pacer.set(0)
	}
}

// cleanFor cleans one chunk at the speed that the urgency allows, and starts the checkpoint that gives the chunk's
// space back (if pressed, throttle.giveUp starts it). It reports whether cleaning should go on now.
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
	// More may be dead than the table knows, and some chunks may not lie before the replay position yet. One checkpoint
	// may be enough to change that. Do not wait until everything deleted is reaped: that can take very long. Nor is it
	// a reason to give up if a cleaned chunk was not given back whole, because a snapshot was taken meanwhile, and the
	// reaper has nothing left.
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
		err = s.checkpoint() // what it gives back may be room to clean in
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
	// exhausted holds until a checkpoint or a writer changes something. Do not set it if a writer found room meanwhile
	// (roomTaken), or if something was deleted since the reaper was last asked (awaitsReaper): the cleaner may have
	// something to gain again.
	s.cleaner.exhausted = u == hungry && (err != nil || !gain) && s.cleaner.roomTaken == taken && (failed || !s.awaitsReaper())
	s.cleaner.writersWaiting = false
	s.wal.RoomMade()
	return gain && err == nil
}

// reapsMore reports whether there is more to reap, now or after the next checkpoint.
func (s *Store) reapsMore() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.awaitsReaper()
}

// owes reports whether the checkpoint under way or the next one gives chunks back.
func (s *Store) owes() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.slots.owed+s.checkpoints.pendingFree > 0
}

// taken returns how many chunks have been made for data.
func (s *Store) taken() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cleaner.roomTaken
}

// cleaningFailed logs an error of the cleaner. It does not log ErrNoSpace, which writers get instead, or ErrClosed.
func (s *Store) cleaningFailed(err error) {
	if err != nil && !errors.Is(err, ErrNoSpace) && !errors.Is(err, ErrClosed) {
		s.log.Error("cleaning failed", "err", err)
	}
}

// used returns the bytes that the chunk files take, with or without the files that the pool keeps for reuse.
func (s *Store) used(spares bool) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.slots.files
	if !spares {
		n -= s.wal.Pool.Bytes()
	}
	return n
}

// urgency decides how urgently the cleaner is needed, from the room left and the amount of dead data.
func (s *Store) urgency() urgency {
	free, err := s.fs.Free()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.wal.Err() != nil {
		return idle
	}
	if s.cleaner.writersWaiting {
		return hungry
	}
	live := s.slots.dirtyLive
	dead := s.slots.dirtyEnds - live
	switch {
	case err == nil && s.room(free)+s.slots.owed+s.checkpoints.pendingFree < (ahead-1)*s.wal.ChunkBytes+s.workRoom() && !s.cleaner.exhausted && dead > 0:
		return pressed
	case float64(dead) > slack*float64(live)+slackBytes:
		return tidy
	}
	return idle
}

// giveWay waits after a batch that took so long, so that other work goes first: twice as long if others appended since
// the last call, else a quarter as long, and at most a second. It does not wait if writers are waiting for room. It
// returns ErrClosed when the store closes.
func (s *Store) giveWay(took time.Duration) error {
	s.mu.Lock()
	others := s.wal.Appended() - s.cleaner.moved
	s.mu.Unlock()
	wait := took / 4
	if others != s.cleaner.othersSeen {
		wait = 2 * took
	}
	s.cleaner.othersSeen = others
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
