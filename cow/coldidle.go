package cow

import (
	"context"
	"errors"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
)

const (
	// coldOthers is how many reads and 4 KiB writes others may make in a second for the store to count as idle.
	coldOthers = 100
	// coldRate is how many bytes of volumes the pass goes over in a second at most.
	coldRate = 64 << 20
	// coldWaste is the part of a chunk that must be dead for the end of a pass to clean it.
	coldWaste = 0.25
	// coldShare is how many times as long as a pass took the next one waits before it begins.
	coldShare = 20
)

// coldClock knows where the log ended some time ago.
type coldClock struct {
	after   time.Duration
	samples []coldSample // oldest first; only the first may be older than after
}

type coldSample struct {
	at  time.Time
	end place
}

func (c *coldClock) sample(now time.Time, end place) {
	if n := len(c.samples); n == 0 || now.Sub(c.samples[n-1].at) >= c.after/16 {
		c.samples = append(c.samples, coldSample{now, end})
	}
	for len(c.samples) > 1 && now.Sub(c.samples[1].at) >= c.after {
		c.samples = c.samples[1:]
	}
}

// horizon returns a place such that everything younger than after lies behind it in the log. It is the zero place while
// the samples do not go back that far.
func (c *coldClock) horizon(now time.Time) (p place) {
	if len(c.samples) > 0 && now.Sub(c.samples[0].at) >= c.after {
		p = c.samples[0].end
	}
	return p
}

// coldWorker makes cold passes in idle time. Only its own goroutine uses it.
type coldWorker struct {
	s        *Store
	clock    coldClock
	pass     *coldPass     // nil if none is under way
	passed   bool          // the pass has come to its end; only cleaning is left
	worked   time.Duration // time worked on this pass
	next     time.Time     // when the next pass may begin
	activity uint64        // at the last tick
}

// coldRoutine makes cold passes in idle time, until the store closes (quit).
func (s *Store) coldRoutine() {
	w := coldWorker{s: s, clock: coldClock{after: s.opts.ColdAfter}}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-s.quit:
			return
		case now := <-tick.C:
			w.clock.sample(now, s.end())
			if err := w.tick(now); err != nil {
				w.pass, w.next = nil, now.Add(w.clock.after)
				if !errors.Is(err, ErrClosed) && !errors.Is(err, ErrFailed) {
					s.log.Error("the cold pass has ended early", "err", err)
				}
			}
		}
	}
}

// tick works for about a second, as long as nothing else does.
func (w *coldWorker) tick(now time.Time) (err error) {
	idle := w.idle()
	if w.activity = w.s.activity(); !idle {
		return nil
	}
	if w.pass == nil {
		if !w.due(now) {
			return nil
		}
		to := w.clock.horizon(now)
		if w.pass, err = w.s.newColdPass(w.s.marked(), to); err != nil {
			return err
		}
		w.passed, w.worked = false, 0
	}
	for w.pass != nil && w.idle() && time.Since(now) < time.Second {
		if err := w.work(); errors.Is(err, errBusy) {
			wal.Poke(w.s.checkpoints.work)
			return nil
		} else if err != nil && !errors.Is(err, ErrNoSpace) {
			return err
		} else if err != nil {
			return nil // the cleaner may make room
		}
	}
	return nil
}

// idle reports whether others have done little since the last tick, and the cleaner has no reason to work.
func (w *coldWorker) idle() bool {
	return w.s.activity()-w.activity <= coldOthers && w.s.urgency() == idle
}

// due reports whether a pass may begin and has anything to look at.
func (w *coldWorker) due(now time.Time) bool {
	return !now.Before(w.next) && before(w.s.marked(), w.clock.horizon(now))
}

// work does a small part of the pass, and rests.
func (w *coldWorker) work() error {
	start := time.Now()
	if w.passed {
		return w.clean()
	}
	leaf := len(w.pass.due) > 0
	more, err := w.pass.step()
	if err != nil {
		return err
	}
	if !more {
		w.s.coldDone(w.pass.to)
		w.passed = true
	}
	took := time.Since(start)
	w.worked += took
	if leaf {
		took = max(took, leafSize*time.Second/coldRate-took)
	}
	w.rest(took)
	return nil
}

// clean gives back the space of a chunk that is dead in good part, through this pass or otherwise. If there is no such
// chunk, the pass is over.
func (w *coldWorker) clean() error {
	s := w.s
	r, err := s.cleanOne(context.Background(), coldWaste, w.pass.to.ChunkSeq, s.giveWay)
	if err == nil && r.Chunks > 0 {
		return s.checkpoint()
	}
	if rep := w.pass.report; rep.Leaves > 0 {
		s.log.Info("made a cold pass", "leaves", rep.Leaves, "before", rep.Before, "after", rep.Written)
	}
	w.pass, w.next = nil, time.Now().Add(max(w.clock.after, coldShare*w.worked))
	return err
}

func (w *coldWorker) rest(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-w.s.quit:
	case <-timer.C:
	}
}

// activity counts what others than the cleaner and the cold pass do: reads, and 4 KiB units appended to the log.
func (s *Store) activity() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reads.Load() + (s.wal.Appended()-s.cleaner.moved)/4096
}

func (s *Store) marked() place {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cold.mark
}

// roomy reports whether there is room for what a pass leaves dead until a checkpoint removes it.
func (s *Store) roomy() bool {
	free, err := s.fs.Free()
	s.mu.Lock()
	defer s.mu.Unlock()
	return err == nil && s.room(free) >= (2*ahead-1)*s.wal.ChunkBytes+s.workRoom()
}
