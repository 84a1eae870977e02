package cow

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestPacer: writers together keep to the pace, each gets as much as the others, none waits for long, and all go on
// when there is no pace any more.
func TestPacer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, size, writers = 100 << 20, 2112, 3
		var p pacer
		p.wait(1 << 30) // no pace: it returns
		p.set(rate)
		start := time.Now()
		var longest [writers]time.Duration
		var written [writers]int
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for time.Since(start) < 10*time.Second {
					t0 := time.Now()
					p.wait(size)
					longest[w] = max(longest[w], time.Since(t0))
					written[w] += size
					time.Sleep(time.Microsecond)
				}
			})
		}
		wg.Wait()
		sum := 0
		for w, n := range written {
			sum += n
			if mean := rate * 10 / writers; n < mean*9/10 || n > mean*11/10 {
				t.Errorf("writer %d wrote %d MiB in 10 s, of %d", w, n>>20, rate*10>>20)
			}
			if longest[w] > writers*paceGrain*time.Second*11/10/rate {
				t.Errorf("writer %d waited %v", w, longest[w])
			}
		}
		if sum < rate*10*95/100 || sum > rate*10*105/100 {
			t.Errorf("all wrote %d MiB in 10 s at a pace of %d MiB/s", sum>>20, rate>>20)
		}
		p.set(0)
		t0 := time.Now()
		if p.wait(1 << 30); time.Since(t0) > 0 {
			t.Errorf("without a pace a writer waited %v", time.Since(t0))
		}
		p.set(rate)
		time.Sleep(time.Second) // who did not write cannot save up for later
		t0 = time.Now()
		for range 10 {
			p.wait(paceGrain)
		}
		if d := time.Since(t0); d < 9*paceGrain*time.Second/rate {
			t.Errorf("10 grains took %v", d)
		}
		t0 = time.Now()
		p.set(1) // as slow as can be: nobody waits for ever
		if p.wait(1 << 30); time.Since(t0) > paceMost {
			t.Errorf("a writer waited %v", time.Since(t0))
		}
	})
}

// TestGiveUpAsksOnce: while a checkpoint is under way that removes chunks, and has not been asked for here, no other is
// asked for.
func TestGiveUpAsksOnce(t *testing.T) {
	s := &Store{changes: changes{gen: 8}, checkpoints: checkpoints{pendingFree: 1, work: make(chan struct{}, 1)}}
	th := throttle{s: s}
	for _, c := range []struct {
		leaving int64
		gen     uint64
		asked   int
	}{{1, 8, 0}, {0, 8, 1}, {0, 8, 0}, {1, 9, 0}, {0, 9, 1}} {
		s.checkpoints.pendingFree, s.changes.gen = c.leaving, c.gen
		must(t, th.giveUp(1, 1))
		if n := len(s.checkpoints.work); n != c.asked {
			t.Errorf("%+v: asked for %d", c, n)
		}
		for len(s.checkpoints.work) > 0 {
			<-s.checkpoints.work
		}
	}
}
