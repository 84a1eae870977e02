package main

import (
	"context"
	"sync"
	"syscall"
	"time"
)

// throttle keeps the processor time of the soak, its server and its commands below a share. While they
// have used too much, goroutines that are about to cause work wait here.
type throttle struct {
	cores float64

	mu    sync.Mutex
	pid   int // of the server; 0: none
	at    time.Time
	used  time.Duration // as of at
	spare time.Duration // what may be used; less than 0: too much was
}

func (t *throttle) serves(pid int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pid = pid
}

// total returns the processor time of this process, of the children that have ended, and of the server.
func (t *throttle) total() (sum time.Duration) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	if t.pid != 0 {
		sum += cpu(t.pid)
	}
	return sum
}

func (t *throttle) over() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if t.at.IsZero() {
		t.at, t.used = now, t.total()
	}
	if d := now.Sub(t.at); d > 50*time.Millisecond {
		used := t.total()
		t.spare += time.Duration(float64(d)*t.cores) - max(0, used-t.used)
		t.spare = min(max(t.spare, -10*time.Second), time.Second) // neither save up nor pay back for long
		t.at, t.used = now, used
	}
	return t.spare < 0
}

func (t *throttle) wait(ctx context.Context) {
	for t.over() && ctx.Err() == nil {
		sleep(ctx, 60*time.Millisecond)
	}
}
