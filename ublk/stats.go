package ublk

import (
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

// Stats are the counters of a device since this process began to serve it.
type Stats struct {
	Queues []QueueStats // by queue
}

// QueueStats are the counters of one queue, by operation. The index is the Op.
type QueueStats struct {
	Ops      [OpWriteZeroes + 1]OpStats
	Underway int // requests that the handler has, or that wait for it
}

// OpStats are the counters of one operation of one queue.
type OpStats struct {
	Requests uint64    // answered
	Bytes    uint64    // of those that succeeded
	Errors   uint64    // answered with an error
	Latency  Histogram // time from a request's arrival in the queue's loop until its answer goes to the driver
}

// Total returns the sum over the queues.
func (s Stats) Total() QueueStats {
	var t QueueStats
	for i := range s.Queues {
		q := &s.Queues[i]
		t.Underway += q.Underway
		for op := range q.Ops {
			t.Ops[op].Add(&q.Ops[op])
		}
	}
	return t
}

// Add adds the counters of p.
func (o *OpStats) Add(p *OpStats) {
	o.Requests += p.Requests
	o.Bytes += p.Bytes
	o.Errors += p.Errors
	o.Latency.Sum += p.Latency.Sum
	for i, n := range p.Latency.Counts {
		o.Latency.Counts[i] += n
	}
}

const (
	// Every power of two of nanoseconds has 2^subBits buckets of the same width, so a bucket's middle is off by at most
	// 1/2^(subBits+1) of what it counts: 3.2 %.
	subBits = 4
	// maxBits bounds the durations that have buckets of their own: 2^maxBits ns are 18 minutes.
	maxBits = 40
	// Durations below 2^subBits have a bucket each.
	histogramSize = (maxBits - subBits + 1) << subBits
)

// Histogram counts durations. Bucket i holds those from Bucket(i) to below Bucket(i+1); the last bucket also holds all
// longer ones. A quantile is off by at most 3.2 %.
type Histogram struct {
	Counts [histogramSize]uint64
	Sum    time.Duration
}

// BucketOf returns the bucket of a Histogram that counts d: its highest bits, and the power of two that they belong to.
func BucketOf(d time.Duration) int {
	ns := uint64(max(d, 0))
	if ns < 1<<subBits {
		return int(ns)
	}
	shift := bits.Len64(ns) - 1 - subBits
	return min(shift<<subBits+int(ns>>shift), histogramSize-1)
}

// Bucket returns the shortest duration that bucket i counts.
func (h *Histogram) Bucket(i int) time.Duration {
	if i < 2<<subBits {
		return time.Duration(i)
	}
	shift := i>>subBits - 1
	return time.Duration(uint64(i&(1<<subBits-1)|1<<subBits) << shift)
}

// Add counts a duration. It must not run at the same time as another method.
func (h *Histogram) Add(d time.Duration) {
	h.Counts[BucketOf(d)]++
	h.Sum += d
}

// Count returns the number of durations.
func (h *Histogram) Count() uint64 {
	var n uint64
	for _, c := range h.Counts {
		n += c
	}
	return n
}

// Mean returns the average duration, or 0 if there is none.
func (h *Histogram) Mean() time.Duration {
	n := h.Count()
	if n == 0 {
		return 0
	}
	return h.Sum / time.Duration(n)
}

// Quantile returns the duration that a part q (0 to 1) of all durations does not exceed: 0.5 gives the median. It
// returns 0 if there is no duration.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := max(uint64(math.Ceil(q*float64(h.Count()))), 1)
	var seen uint64
	last := 0
	for i, c := range h.Counts {
		if c == 0 {
			continue
		}
		last = i
		if seen += c; seen >= rank {
			break
		}
	}
	if h.Counts[last] == 0 {
		return 0
	}
	return (h.Bucket(last) + h.Bucket(last+1)) / 2
}

// Stats returns the counters of the device. It may be called at any time, even after the end. Requests, Bytes, Errors
// and Latency are each exact, but they are read one after another while the queues go on.
func (d *Device) Stats() Stats {
	s := Stats{Queues: make([]QueueStats, len(d.queues))}
	for i, t := range d.queues {
		if t.queue != nil {
			t.stats.read(&s.Queues[i])
		}
	}
	return s
}

// counter is written by one goroutine and read by any.
type counter struct{ v atomic.Uint64 }

func (c *counter) add(n uint64) { c.v.Store(c.v.Load() + n) }

// queueCounters are the live numbers of a queue. Only its thread writes them, once a turn: the requests of a turn begin
// together when its system call returns, and their answers go out together with the next one.
type queueCounters struct {
	ops      [OpWriteZeroes + 1]opCounters
	underway atomic.Int64

	// Used by the queue's thread only.
	answered []answer // since the last turn
	base     time.Time
}

type opCounters struct {
	bytes, errors, sum counter
	latency            atomic.Pointer[[histogramSize]counter] // nil before the first answer: most devices see few operations
}

// answer is one request that was answered.
type answer struct {
	arrived time.Duration
	bytes   int32
	op      Op
	failed  bool
}

func newQueueCounters(depth int) *queueCounters {
	return &queueCounters{answered: make([]answer, 0, depth), base: time.Now()}
}

// now returns the time on the queue's clock, which Request.arrived is measured with.
func (c *queueCounters) now() time.Duration { return time.Since(c.base) }

// note remembers an answer until publish.
func (c *queueCounters) note(a answer) {
	if len(c.answered) == cap(c.answered) {
		c.publish(0)
	}
	c.answered = append(c.answered, a)
}

// publish counts what was answered since the last time. Answers that are alike, which is the rule when the handler
// answers at once, are counted together.
func (c *queueCounters) publish(underway int) {
	if c.underway.Load() != int64(underway) {
		c.underway.Store(int64(underway))
	}
	if len(c.answered) == 0 {
		return
	}
	now := c.now()
	for i := 0; i < len(c.answered); {
		i += c.publishRun(c.answered[i:], now)
	}
	c.answered = c.answered[:0]
}

// publishRun counts the answers at the head of as that have one operation and arrival, and returns how many.
func (c *queueCounters) publishRun(as []answer, now time.Duration) int {
	first := as[0]
	var n, failed int
	var bytes uint64
	for n < len(as) && as[n].op == first.op && as[n].arrived == first.arrived {
		if as[n].failed {
			failed++
		}
		bytes += uint64(as[n].bytes)
		n++
	}
	took := now - first.arrived
	o := &c.ops[first.op]
	latency := o.latency.Load()
	if latency == nil {
		latency = new([histogramSize]counter)
		o.latency.Store(latency)
	}
	latency[BucketOf(took)].add(uint64(n))
	o.sum.add(uint64(took) * uint64(n))
	if bytes > 0 {
		o.bytes.add(bytes)
	}
	if failed > 0 {
		o.errors.add(uint64(failed))
	}
	return n
}

func (c *queueCounters) read(s *QueueStats) {
	s.Underway = int(c.underway.Load())
	for op := range c.ops {
		from, to := &c.ops[op], &s.Ops[op]
		to.Bytes, to.Errors = from.bytes.v.Load(), from.errors.v.Load()
		to.Latency.Sum = time.Duration(from.sum.v.Load())
		latency := from.latency.Load()
		if latency == nil {
			continue
		}
		for i := range latency {
			n := latency[i].v.Load()
			to.Latency.Counts[i] = n
			to.Requests += n
		}
	}
}
