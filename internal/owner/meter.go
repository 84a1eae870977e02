package owner

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/nbd"
	"github.com/vdisk/vdisk/ublk"
)

// meters counts what clients ask of volumes and snapshots: docs/metrics.md. A meter lives as long as its volume or
// snapshot, whether that is open or not, so that its counters only rise.
type meters struct {
	exists func(cow.Ref) bool

	// mu guards the fields below, and meter.past and target.counted. No other lock than the engine's is taken under it.
	mu    sync.Mutex
	byRef map[cow.Ref]*meter
	most  int // how many there may be before those are dropped whose volume or snapshot is gone
}

func newMeters(exists func(cow.Ref) bool) *meters {
	return &meters{exists: exists, byRef: map[cow.Ref]*meter{}, most: 64}
}

// meter counts the requests for one volume or snapshot.
type meter struct {
	ops    [len(metrics.Operations)]opMeter // of NBD clients
	errors [len(metrics.Kinds)]atomic.Uint64
	past   *ublk.QueueStats // of block devices that have ended; nil: none has
}

type opMeter struct {
	bytes, errors, sum atomic.Uint64
	latency            atomic.Pointer[latencies] // nil before the first answer
}

// latencies are the counts of a ublk.Histogram.
type latencies [len(ublk.Histogram{}.Counts)]atomic.Uint64

// of returns the meter of a volume or snapshot that is being opened.
func (x *meters) of(r cow.Ref) *meter {
	x.mu.Lock()
	defer x.mu.Unlock()
	m := x.byRef[r]
	if m == nil {
		if len(x.byRef) >= x.most {
			x.prune()
			x.most = max(x.most, 2*len(x.byRef))
		}
		m = new(meter)
		x.byRef[r] = m
	}
	return m
}

// prune drops meters of what is gone. The caller holds mu.
func (x *meters) prune() {
	for r := range x.byRef {
		if !x.exists(r) {
			delete(x.byRef, r)
		}
	}
}

// renamed follows a rename of a volume, with its snapshots, or of a snapshot.
func (x *meters) renamed(from, to cow.Ref) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for r, m := range x.byRef {
		if within(r, from) {
			delete(x.byRef, r)
			now := to
			if from.Snapshot == "" {
				now.Snapshot = r.Snapshot
			}
			x.byRef[now] = m
		}
	}
}

// observe counts a request of an NBD client.
func (m *meter) observe(op nbd.Op, length int64, took time.Duration, err error) {
	o := &m.ops[op]
	latency := o.latency.Load()
	if latency == nil {
		o.latency.CompareAndSwap(nil, new(latencies))
		latency = o.latency.Load()
	}
	latency[ublk.BucketOf(took)].Add(1)
	o.sum.Add(uint64(took))
	if err != nil {
		o.errors.Add(1)
		m.failed(err)
	} else if length > 0 {
		o.bytes.Add(uint64(length))
	}
}

// failed counts a failed request by the kind of its error.
func (m *meter) failed(err error) { m.errors[metrics.KindOf(err)].Add(1) }

// addTo adds what was counted to s.
func (o *opMeter) addTo(s *ublk.OpStats) {
	s.Bytes += o.bytes.Load()
	s.Errors += o.errors.Load()
	s.Latency.Sum += time.Duration(o.sum.Load())
	latency := o.latency.Load()
	if latency == nil {
		return
	}
	for i := range latency {
		n := latency[i].Load()
		s.Latency.Counts[i] += n
		s.Requests += n
	}
}

// ended adds the counters of a block device that has ended to its meter.
func (x *meters) ended(t *target, stats ublk.Stats) {
	total := stats.Total()
	x.mu.Lock()
	defer x.mu.Unlock()
	t.counted = true
	if t.meter.past == nil {
		t.meter.past = &total
		return
	}
	for op := range total.Ops {
		t.meter.past.Ops[op].Add(&total.Ops[op])
	}
}

// read returns the traffic of all that exists. served are the targets of block devices, with their counters.
func (x *meters) read(served map[*target]ublk.Stats) []metrics.Traffic {
	x.mu.Lock()
	defer x.mu.Unlock()
	live := map[*meter][]ublk.QueueStats{}
	for t, stats := range served {
		if !t.counted { // otherwise the device has ended since its counters were read
			live[t.meter] = append(live[t.meter], stats.Queues...)
		}
	}
	x.prune()
	list := make([]metrics.Traffic, 0, len(x.byRef))
	for r, m := range x.byRef {
		t := metrics.Traffic{Ref: r}
		for i, op := range metrics.Operations {
			var sum ublk.OpStats
			m.ops[i].addTo(&sum)
			if m.past != nil {
				sum.Add(&m.past.Ops[op])
			}
			for _, q := range live[m] {
				sum.Add(&q.Ops[op])
			}
			t.Ops[i] = metrics.OperationOf(&sum)
		}
		for i := range m.errors {
			t.Errors[i] = m.errors[i].Load()
		}
		list = append(list, t)
	}
	return list
}
