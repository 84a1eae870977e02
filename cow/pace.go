package cow

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow/internal/wal"
)

const (
	// paceGrain is how many bytes are appended to the log before one writer waits for all of them. So of many small
	// writes, few wait.
	paceGrain = 512 << 10
	// paceMost is the longest time that a write waits for the pace.
	paceMost = 100 * time.Millisecond
)

// pacer limits the bytes that writers append in a second. The writer that fills a grain sleeps until the grain is due,
// after the grains before it; the others go on. Heavier writers fill more grains and so sleep more often, which keeps
// it fair.
type pacer struct {
	on atomic.Bool

	mu   sync.Mutex
	rate float64   // bytes a second
	sum  float64   // bytes of the present grain
	due  time.Time // when the last full grain is, or was, due
}

// set changes the pace to rate bytes a second; 0 means no limit.
func (p *pacer) set(rate float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.on.Load() {
		p.sum, p.due = 0, time.Now()
	}
	p.rate = rate
	p.on.Store(rate > 0)
}

// Paced reports whether writes may have to wait for the pace, because room is short and the cleaner is making some. A
// caller that has other work to do should then leave writes to another goroutine.
func (d *Device) Paced() bool { return d.s.cleaner.pacer.on.Load() }

// wait sleeps as long as the pace asks before n bytes are appended. The caller holds no lock.
func (p *pacer) wait(n int) {
	if p.on.Load() {
		time.Sleep(p.take(n))
	}
}

func (p *pacer) take(n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sum += float64(n); p.sum < paceGrain || p.rate == 0 {
		return 0
	}
	now, grain := time.Now(), time.Duration(min(p.sum/p.rate, paceMost.Seconds())*float64(time.Second))
	p.sum = 0
	p.due = p.due.Add(grain)
	switch wait := p.due.Sub(now); {
	case wait < 0: // the writers are slower than the pace; they cannot save that up for later
		p.due = now
		return 0
	case wait > paceMost:
		p.due = now.Add(paceMost)
		return paceMost
	default:
		return wait
	}
}

const (
	// level is for how many chunks there is room when others write just as fast as the cleaner makes room.
	level = 6
	// unpaced is for how many chunks there must be room for writers not to be held back, and for the cleaner to rest.
	unpaced = 7
	// leastPace is the part of the cleaner's rate at which writers may always append, even with no room at all.
	leastPace = 0.2
	// giveUpAt is for how many chunks there is room when a checkpoint is begun just to remove the chunks that were
	// cleaned. At waitAt the cleaner waits for that checkpoint, because cleaning takes room before it gives any.
	giveUpAt = 2
	waitAt   = 0.5
)

// throttle fits the speed of a pressed cleaner, and the pace of the writers, to the room that is left. It counts room
// in chunks. Only the cleaner's goroutine uses it.
type throttle struct {
	s      *Store
	gained float64 // bytes gained by cleaning the last chunks; worked is the seconds that it took
	worked float64
	rested time.Duration
	asked  uint64 // generation of the last checkpoint that it asked for, or of a later one that ran
}

// batch adjusts speed and pace after each batch of a chunk. The less room there is, the less the cleaner rests. When it
// does not rest any more, others may write as fast as it makes room. The part of the chunk that it has gone through,
// and chunks that are cleaned and not removed yet, count as room that is about to come back. Otherwise the pace would
// go up and down with every chunk.
func (t *throttle) batch(took time.Duration, urgent bool) error {
	now, owed, lent := t.room()
	room := now + owed - lent + min(1, float64(t.s.cleaner.mover.r.Off)/float64(t.s.wal.ChunkBytes))
	if t.gained > 0 && room < unpaced {
		t.s.cleaner.pacer.set(t.gained / t.worked * max(min(1+(room-level)/2, now), leastPace))
	} else {
		t.s.cleaner.pacer.set(0)
	}
	if rest := min(1, room-unpaced); rest > 0 && !urgent {
		start := time.Now()
		err := t.s.giveWay(time.Duration(rest * float64(took)))
		if t.rested += time.Since(start); err != nil {
			return err
		}
	}
	return t.giveUp(now, owed)
}

// chunk notes what cleaning a chunk gained, and how long it took.
func (t *throttle) chunk(gain int64, took time.Duration) {
	const keep = 0.9
	t.gained = keep*t.gained + float64(gain)
	t.worked = keep*t.worked + (took - t.rested).Seconds()
	t.rested = 0
}

// giveUp asks the checkpointer for a checkpoint if there is little room without the chunks that the checkpoint gives
// back. With next to no room it waits until the checkpoint is made.
func (t *throttle) giveUp(now, owed float64) error {
	if owed == 0 || now >= giveUpAt {
		return nil
	}
	s := t.s
	s.mu.Lock()
	gen := s.changes.gen // generation of the checkpoint that gives them back
	if s.checkpoints.pendingFree > 0 {
		gen-- // that one is under way; it does not cover chunks that have died since
		t.asked = max(t.asked, gen)
	}
	s.mu.Unlock()
	if now < waitAt {
		return s.checkpointOf(gen)
	}
	if t.asked < gen {
		t.asked = gen
		wal.Poke(s.checkpoints.work)
	}
	return nil
}

// room returns for how many chunks data has room now, and how many chunks (owed) the checkpoint under way and the next
// one give back. lent is how many of the owed chunks the cleaner's room will need; data does not have to leave these
// free now.
func (t *throttle) room() (now, owed, lent float64) {
	s := t.s
	free, err := s.fs.Free()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		free = 0
	}
	l := s.wal
	room := s.room(free) - s.workKept()
	if l.Current() != nil {
		room += int64(l.Current().Size - l.Current().End)
	}
	if l.Next() != nil && !l.Next().Reserved {
		room += int64(l.Next().Size)
	}
	back := s.slots.owed + s.checkpoints.pendingFree
	chunks := func(n int64) float64 { return float64(n) / float64(l.ChunkBytes) }
	return chunks(room), chunks(back), chunks(min(back, s.workBeyond()))
}

// room returns how many more bytes the chunk files can take if the file system has free bytes free. The caller holds
// mu.
func (s *Store) room(free int64) int64 {
	room := min(free, free+s.kept()-wal.Spare)
	if s.wal.Limit > 0 {
		room = min(room, s.wal.Limit-s.slots.files)
	}
	return room + s.wal.Pool.Bytes()
}
