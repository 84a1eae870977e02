package cow

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// paceGrain is after how many bytes of the log one writer waits for all: of many small writes few do.
	paceGrain = 512 << 10
	// paceMost is the longest that a write waits for its pace.
	paceMost = 100 * time.Millisecond
)

// pacer has writers append no more than so many bytes a second. Whoever comes to the end of a grain waits until it is
// due, behind those who wait for grains before it; the others go on. Who writes more comes to more ends, so all get
// the same.
type pacer struct {
	on atomic.Bool

	mu   sync.Mutex
	rate float64   // bytes a second
	sum  float64   // bytes of this grain
	due  time.Time // when the last grain is, or was
}

// set changes the pace; 0: as fast as they can.
func (p *pacer) set(rate float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.on.Load() {
		p.sum, p.due = 0, time.Now()
	}
	p.rate = rate
	p.on.Store(rate > 0)
}

// Paced reports whether writes may have to wait, since there is little room and the cleaner is about making some. Who
// also has something else to do lets others write.
func (d *Device) Paced() bool { return d.s.pacer.on.Load() }

// wait is called before n bytes are appended. No lock is held.
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
	case wait < 0: // the writers are slower than the pace, and do not save up for later
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
	// level is for how many chunks there is room when others go as fast as the cleaner makes room.
	level = 6
	// unpaced is from where on they go as they like, and the cleaner rests.
	unpaced = 7
	// leastPace bounds how far they fall behind what the cleaner gains, with no room at all.
	leastPace = 0.2
	// giveUpAt is for how many chunks there is room when the table has to give up those that were cleaned, and
	// waitAt, when the cleaner, which takes room before it gives any, waits for that.
	giveUpAt = 2
	waitAt   = 0.5
)

// throttle is how a pressed cleaner fits its own work, and the pace of those who write, to the room that there is,
// which it counts in chunks. Only the cleaner's goroutine uses it.
type throttle struct {
	s      *Store
	gained float64 // bytes, and the seconds that it took, of the last chunks
	worked float64
	rested time.Duration
	asked  uint64 // the generation of the last checkpoint that it asked for, or later
}

// batch comes after each batch of a chunk. The less room there is, the less the cleaner rests; where it does not rest
// any more, others may write as fast as it makes room. What has been gone through of the chunk, and chunks that the
// table has not given up yet, are room to come, and count, or the pace would go up and down with every chunk.
func (t *throttle) batch(took time.Duration, urgent bool) error {
	now, owed, lent := t.room()
	room := now + owed - lent + min(1, float64(t.s.mover.r.off)/float64(t.s.wal.chunkBytes))
	if t.gained > 0 && room < unpaced {
		t.s.pacer.set(t.gained / t.worked * max(min(1+(room-level)/2, now), leastPace))
	} else {
		t.s.pacer.set(0)
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

// chunk comes after a chunk was cleaned.
func (t *throttle) chunk(gain int64, took time.Duration) {
	const keep = 0.9
	t.gained = keep*t.gained + float64(gain)
	t.worked = keep*t.worked + (took - t.rested).Seconds()
	t.rested = 0
}

// giveUp has the checkpointer make a checkpoint if there is little room without those chunks that it brings. With
// next to none it waits until there is.
func (t *throttle) giveUp(now, owed float64) error {
	if owed == 0 || now >= giveUpAt {
		return nil
	}
	s := t.s
	s.mu.Lock()
	gen := s.gen // of the checkpoint that brings them
	if s.pendingFree > 0 {
		gen-- // under way; what has died since is the next one's
		t.asked = max(t.asked, gen)
	}
	s.mu.Unlock()
	if now < waitAt {
		return s.checkpointOf(gen)
	}
	if t.asked < gen {
		t.asked = gen
		poke(s.ckptWork)
	}
	return nil
}

// room is for how many chunks data has room now, and owed, how many a checkpoint gives back, the one under way or the
// next. As many as lent of these the cleaner needs by then, and data need not leave them now.
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
	if l.current != nil {
		room += int64(l.current.size - l.current.end)
	}
	if l.next != nil && !l.next.reserved {
		room += int64(l.next.size)
	}
	back := s.slots.owed + s.pendingFree
	chunks := func(n int64) float64 { return float64(n) / float64(l.chunkBytes) }
	return chunks(room), chunks(back), chunks(min(back, s.workBeyond()))
}

// room is how much more the chunk files can take, of so many free bytes. mu is held.
func (s *Store) room(free int64) int64 {
	room := min(free, free+s.kept()-spare)
	if s.wal.limit > 0 {
		room = min(room, s.wal.limit-s.slots.files)
	}
	return room + s.wal.pool.bytes()
}
