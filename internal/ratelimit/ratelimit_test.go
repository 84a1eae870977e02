package ratelimit

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// clients are requests that ask again as soon as they have begun, in synctest's time.
type clients struct {
	wg    sync.WaitGroup
	begun [kinds]atomic.Int64
	end   chan struct{}
}

func (c *clients) run(l *Limiter, n int, write bool, bytes int64) {
	k := reads
	if write {
		k = writes
	}
	for range n {
		c.wg.Go(func() {
			for {
				if t := l.Admit(write, bytes); t != nil {
					select {
					case <-t.Ready():
					case <-c.end:
						t.Cancel()
						return
					}
				} else if !l.on.Load() {
					time.Sleep(time.Millisecond) // without a limit, time would not go on
				}
				select {
				case <-c.end:
					return
				default:
				}
				c.begun[k].Add(1)
			}
		})
	}
}

func (c *clients) stop() {
	close(c.end)
	c.wg.Wait()
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if got < 0.95*want || got > 1.05*want {
		t.Errorf("%s: %v, want %v within 5 %%", what, got, want)
	}
}

// TestLimitsHold checks each limit over 10 s of simulated time, for small, large and mixed requests.
func TestLimitsHold(t *testing.T) {
	for _, c := range []struct {
		name          string
		limits        Limits
		bytes         int64
		reads, writes float64 // requests in 10 s, or
		both          float64 // their sum, half of it each
	}{
		{"iops", Limits{Ops: [kinds]int64{all: 500}}, 4096, 0, 0, 5000},
		{"fast iops", Limits{Ops: [kinds]int64{all: 6000}}, 4096, 0, 0, 60_000},
		{"bps", Limits{Bytes: [kinds]int64{all: 10 << 20}}, 64 << 10, 0, 0, 1600},
		{"large requests", Limits{Bytes: [kinds]int64{all: 4 << 20}}, 1 << 20, 0, 0, 40},
		{"reads and writes", Limits{Ops: [kinds]int64{reads: 200}, Bytes: [kinds]int64{writes: 1 << 20}}, 4096, 2000, 2560, 0},
		{"both and reads", Limits{Ops: [kinds]int64{all: 500, reads: 100}}, 4096, 1000, 4000, 0},
		{"the stricter one", Limits{Ops: [kinds]int64{all: 500}, Bytes: [kinds]int64{all: 1 << 20}}, 4096, 0, 0, 2560},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l Limiter
				l.Set(c.limits)
				run := clients{end: make(chan struct{})}
				run.run(&l, 8, false, c.bytes)
				run.run(&l, 8, true, c.bytes)
				time.Sleep(10 * time.Second)
				run.stop()
				r, w := float64(run.begun[reads].Load()), float64(run.begun[writes].Load())
				if c.both > 0 {
					near(t, "reads and writes", r+w, c.both)
					if c.both > 100 { // of few requests, one more or less is much
						near(t, "reads beside writes", r, c.both/2)
					}
					return
				}
				near(t, "reads", r, c.reads)
				near(t, "writes", w, c.writes)
			})
		})
	}
}

// TestBurst checks that what was not used may be used at once, as far as the burst goes, and no further.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{all: 100}, Burst: 5 * time.Second})
		at := func() (n int) {
			for l.Admit(true, 4096) == nil {
				n++
			}
			return n
		}
		if n := at(); n > 1 {
			t.Errorf("%d requests begin as soon as there is a limit", n)
		}
		time.Sleep(time.Hour)
		near(t, "requests at once after an hour", float64(at()), 500)
		time.Sleep(2 * time.Second)
		near(t, "requests at once after two seconds", float64(at()), 200)
	})
}

// TestChangeWhileRequestsWait changes a limit while requests wait: they go on at the new rate.
func TestChangeWhileRequestsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{all: 1}})
		run := clients{end: make(chan struct{})}
		run.run(&l, 64, true, 4096)
		time.Sleep(10*time.Second + 100*time.Millisecond) // long before the timer comes
		if n := run.begun[writes].Load(); n < 9 || n > 11 {
			t.Errorf("%d requests in 10 s, want 10", n)
		}
		before := run.begun[writes].Load()
		l.Set(Limits{Ops: [kinds]int64{all: 1000}})
		time.Sleep(10 * time.Second)
		near(t, "requests after the change", float64(run.begun[writes].Load()-before), 10_000)
		before = run.begun[writes].Load()
		l.Set(Limits{Ops: [kinds]int64{all: 10}})
		time.Sleep(10 * time.Second)
		near(t, "requests after it was lowered", float64(run.begun[writes].Load()-before), 100)
		l.Set(Limits{})
		time.Sleep(time.Second)
		if l.first[writes] != nil {
			t.Error("requests wait without a limit")
		}
		run.stop()
	})
}

// TestOwedAtTheNewRate raises the limit while a request waits: it does not wait for as long as it would have before.
func TestOwedAtTheNewRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{all: 1}})
		if l.Admit(true, 4096) != nil {
			t.Fatal("the first request waits")
		}
		turn := l.Admit(true, 1)
		began := time.Now()
		l.Set(Limits{Ops: [kinds]int64{all: 10}})
		<-turn.Ready()
		near(t, "milliseconds", float64(time.Since(began).Milliseconds()), 100)
	})
}

// TestLongRequestHoldsNobodyUp reads much at once, beside small writes. These wait for a part of the read, and the read
// waits until all of it is counted. It counts as one request.
func TestLongRequestHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{reads: 1}, Bytes: [kinds]int64{all: 1 << 20}})
		began := time.Now()
		read := l.Admit(false, 32<<20)
		if read == nil {
			t.Fatal("a long read begins at once")
		}
		for range 10 {
			asked := time.Now()
			if turn := l.Admit(true, 4096); turn != nil {
				<-turn.Ready()
			}
			if took := time.Since(asked); took > 105*time.Millisecond { // a part, and the write before
				t.Fatalf("a write waits for %v", took)
			}
		}
		<-read.Ready()
		near(t, "seconds of the read", time.Since(began).Seconds(), 32)
		if turn := l.Admit(true, 4096); turn != nil {
			<-turn.Ready()
		}
		near(t, "seconds of both", time.Since(began).Seconds(), 32)
	})
}

// TestCancelTakesNothing cancels requests that wait, the first, the last and one between. The others do not wait longer.
func TestCancelTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{all: 1}})
		if l.Admit(true, 1) != nil {
			t.Fatal("the first request waits")
		}
		began := time.Now()
		var turns []*Turn
		for range 5 {
			turns = append(turns, l.Admit(true, 1))
		}
		for _, i := range []int{4, 2, 0} {
			turns[i].Cancel()
		}
		turns = append(turns, l.Admit(true, 1)) // behind the last of those that are left
		for i, n := range []int{1, 3, 5} {
			<-turns[n].Ready()
			if took := time.Since(began); took != time.Duration(i+1)*time.Second {
				t.Errorf("request %d began after %v", n, took)
			}
		}
	})
}

// TestReadsDoNotWaitForWrites checks that the limit of writes holds no reads up.
func TestReadsDoNotWaitForWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Limiter
		l.Set(Limits{Ops: [kinds]int64{writes: 1}})
		for range 10 {
			l.Admit(true, 1)
		}
		if l.Admit(false, 1) != nil {
			t.Error("a read waits for writes")
		}
	})
}

// TestOf parses the properties of a volume.
func TestOf(t *testing.T) {
	for _, c := range []struct {
		key, value string
		want       Limits
	}{
		{"limit.iops", "500", Limits{Ops: [kinds]int64{all: 500}}},
		{"limit.iops-read", "1", Limits{Ops: [kinds]int64{reads: 1}}},
		{"limit.bps-write", "20M", Limits{Bytes: [kinds]int64{writes: 20 << 20}}},
		{"limit.burst", "1m30s", Limits{Burst: 90 * time.Second}},
		{"other", "anything", Limits{}},
	} {
		if known, err := CheckProperty(c.key, c.value); err != nil || known != strings.HasPrefix(c.key, Prefix) {
			t.Errorf("%s=%s: %v, %v", c.key, c.value, known, err)
		}
		if got := Of(map[string]string{c.key: c.value}); got != c.want {
			t.Errorf("%s=%s: %+v, want %+v", c.key, c.value, got, c.want)
		}
	}
	for _, c := range [][2]string{
		{"limit.iops", "0"},
		{"limit.iops", "1K"},
		{"limit.iops", "-5"},
		{"limit.bps", "100"},
		{"limit.bps", "1MB"},
		{"limit.bps", "2048T"},
		{"limit.burst", "5"},
		{"limit.burst", "1ms"},
		{"limit.burst", "2h"},
	} {
		if known, err := CheckProperty(c[0], c[1]); err == nil || !known {
			t.Errorf("%s=%s: %v, %v", c[0], c[1], known, err)
		}
		if got := Of(map[string]string{c[0]: c[1]}); got != (Limits{}) {
			t.Errorf("%s=%s limits: %+v", c[0], c[1], got)
		}
	}
}

// TestAdmitDoesNotAllocate checks both ways on which a request begins at once.
func TestAdmitDoesNotAllocate(t *testing.T) {
	var l Limiter
	for _, limits := range []Limits{{}, {Ops: [kinds]int64{all: mostOps}, Burst: time.Hour}} {
		l.Set(limits)
		if n := testing.AllocsPerRun(1000, func() { l.Admit(true, 0) }); n != 0 {
			t.Errorf("%+v: %v allocations", limits, n)
		}
	}
}

func BenchmarkAdmit(b *testing.B) {
	for name, limits := range map[string]Limits{"none": {}, "limited": {Ops: [kinds]int64{all: mostOps}, Burst: time.Hour}} {
		b.Run(name, func(b *testing.B) {
			var l Limiter
			l.Set(limits)
			for b.Loop() {
				l.Admit(true, 4096)
			}
		})
	}
}
