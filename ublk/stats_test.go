package ublk

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"
)

func TestHistogramBuckets(t *testing.T) {
	var h Histogram
	for i := range histogramSize {
		if low := h.Bucket(i); BucketOf(low) != i || i > 0 && BucketOf(low-1) != i-1 {
			t.Errorf("bucket %d begins at %d, which is in %d; the one before is in %d", i, low, BucketOf(low), BucketOf(low-1))
		}
	}
	for _, d := range []time.Duration{math.MinInt64, -1, 0} {
		if BucketOf(d) != 0 {
			t.Errorf("%d is in bucket %d", d, BucketOf(d))
		}
	}
	for _, d := range []time.Duration{1 << maxBits, math.MaxInt64} {
		if BucketOf(d) != histogramSize-1 {
			t.Errorf("%d is in bucket %d", d, BucketOf(d))
		}
	}
}

func TestHistogramQuantiles(t *testing.T) {
	var h Histogram
	if h.Quantile(0.5) != 0 || h.Mean() != 0 {
		t.Error("an empty histogram has a median or a mean")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var all []time.Duration
	for range 20000 {
		d := time.Duration(math.Exp(rng.Float64() * 25))
		all = append(all, d)
		h.Counts[BucketOf(d)]++
		h.Sum += d
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999, 1} {
		want := all[max(int(math.Ceil(q*float64(len(all)))), 1)-1]
		if got := h.Quantile(q); math.Abs(float64(got-want)) > 0.032*float64(want)+1 {
			t.Errorf("quantile %v is %v, want %v within 3.2 %%", q, got, want)
		}
	}
	if h.Mean() != h.Sum/20000 {
		t.Errorf("mean %v", h.Mean())
	}
}

func TestStats(t *testing.T) { inEachMode(t, testStats) }

func testStats(t *testing.T, mode CopyMode) {
	hold := make(chan *Request, 1)
	q := runFake(t, mode, 4, handlerFunc(func(r *Request) error {
		switch {
		case r.Op == OpDiscard:
			hold <- r
			return ErrAsync
		case r.Op == OpWrite && r.Offset == 0:
			return syscall.ENOSPC
		case r.Op == OpRead:
			time.Sleep(2 * time.Millisecond)
		}
		return nil
	}), nil)
	for i := range 30 {
		q.do(t, desc(OpWrite, 0, int64(i%3)*4096, 4096))
	}
	for range 5 {
		q.do(t, desc(OpRead, 0, 0, 8192))
	}
	q.do(t, desc(OpFlush, 0, 0, 0))
	q.kernel.dispatch(desc(OpDiscard, 0, 0, 4096))
	r := <-hold
	d := &Device{queues: []*queueThread{{queue: q.queue}, {}}} // the second did not come to be
	wait := func(ok func(QueueStats) bool) QueueStats {
		for range 1000 {
			if s := d.Stats().Total(); ok(s) {
				return s
			}
			time.Sleep(time.Millisecond)
		}
		t.Fatalf("after a while: %+v", d.Stats().Queues[0].Ops[OpWrite].Requests)
		return QueueStats{}
	}
	s := wait(func(s QueueStats) bool { return s.Underway == 1 })
	for op, want := range map[Op]OpStats{
		OpWrite: {Requests: 30, Bytes: 20 * 4096, Errors: 10}, OpRead: {Requests: 5, Bytes: 5 * 8192},
		OpFlush: {Requests: 1}, OpDiscard: {},
	} {
		got := &s.Ops[op]
		if got.Requests != want.Requests || got.Bytes != want.Bytes || got.Errors != want.Errors || got.Latency.Count() != want.Requests {
			t.Errorf("%v: %d requests, %d bytes, %d errors, want %+v", op, got.Requests, got.Bytes, got.Errors, want)
		}
	}
	if l := &s.Ops[OpRead].Latency; l.Quantile(0) < 1900*time.Microsecond || l.Mean() < 2*time.Millisecond {
		t.Errorf("reads that take 2 ms took at least %v, in the mean %v", l.Quantile(0), l.Mean())
	}
	r.Complete(nil)
	<-q.kernel.results
	wait(func(s QueueStats) bool { return s.Underway == 0 && s.Ops[OpDiscard].Requests == 1 })
}

// BenchmarkCounters measures the cost of counting a request, in turns of one and of 32 requests.
func BenchmarkCounters(b *testing.B) {
	for _, n := range []int{1, 32} {
		b.Run(fmt.Sprintf("turn of %d", n), func(b *testing.B) {
			c := newQueueCounters(32)
			for range b.N / n {
				now := c.now()
				for range n {
					c.note(answer{arrived: now, op: OpRead, bytes: 4096})
				}
				c.publish(n)
			}
		})
	}
}
