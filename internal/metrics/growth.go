package metrics

import (
	"time"

	"github.com/vdisk/vdisk/ublk"
)

// Growth is what counters have grown by between two readings: of one volume or snapshot, or of several.
type Growth struct {
	Reads, Writes, Flushes ublk.OpStats // writes with discards and zeroes, whose bytes are not written
	Errors                 uint64
}

// Add adds what the counters of a volume or snapshot have grown by.
func (g *Growth) Add(now, was *Traffic) {
	for i, op := range Operations {
		s := grown(&now.Ops[i], &was.Ops[i])
		g.Errors += s.Errors
		switch op {
		case ublk.OpRead:
			g.Reads.Add(s)
		case ublk.OpFlush:
			g.Flushes.Add(s)
		case ublk.OpWrite:
			g.Writes.Add(s)
		default:
			s.Bytes = 0
			g.Writes.Add(s)
		}
	}
}

// Rates is a growth per second, and the latencies of its requests; 0: there were none.
type Rates struct {
	Reads, Writes, Flushes, Errors       float64
	ReadBytes, WriteBytes                float64
	ReadP50, ReadP99, WriteP50, WriteP99 time.Duration
}

// Rates returns what the growth is per second, if it took so many.
func (g *Growth) Rates(seconds float64) (r Rates) {
	per := func(n uint64) float64 {
		if seconds <= 0 {
			return 0
		}
		return float64(n) / seconds
	}
	r.Reads, r.Writes, r.Flushes, r.Errors = per(g.Reads.Requests), per(g.Writes.Requests), per(g.Flushes.Requests), per(g.Errors)
	r.ReadBytes, r.WriteBytes = per(g.Reads.Bytes), per(g.Writes.Bytes)
	r.ReadP50, r.ReadP99 = g.Reads.Latency.Quantile(0.5), g.Reads.Latency.Quantile(0.99)
	r.WriteP50, r.WriteP99 = g.Writes.Latency.Quantile(0.5), g.Writes.Latency.Quantile(0.99)
	return r
}

// grown returns what an operation's counters have grown by. Counters that are smaller than before come from a new
// owner.
func grown(now, was *Operation) *ublk.OpStats {
	s := now.Stats()
	if now.Requests < was.Requests {
		return s
	}
	past := was.Stats()
	s.Requests -= past.Requests
	s.Bytes = Since(s.Bytes, past.Bytes)
	s.Errors = Since(s.Errors, past.Errors)
	s.Latency.Sum -= past.Latency.Sum
	for i := range s.Latency.Counts {
		s.Latency.Counts[i] = Since(s.Latency.Counts[i], past.Latency.Counts[i])
	}
	return s
}

// Since returns how much a counter has grown. One that is smaller than before comes from a new owner.
func Since(now, before uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}
