package wal

import (
	"sync/atomic"
	"time"
)

// Timing counts how often something was done, and how long it took in all. Its methods may be called concurrently.
type Timing struct{ n, sum atomic.Uint64 }

// Since counts what began at start and ends now.
func (t *Timing) Since(start time.Time) {
	t.sum.Add(uint64(time.Since(start)))
	t.n.Add(1)
}

// Get returns the count and the sum.
func (t *Timing) Get() (n uint64, sum time.Duration) { return t.n.Load(), time.Duration(t.sum.Load()) }
