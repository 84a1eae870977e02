package cow

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

var cleanerLimit = flag.Float64("cleaner.limit", 1, "GiB that the store may take in BenchmarkCleaner")

// BenchmarkCleaner overwrites random blocks of 4 KiB in a store whose limit leaves little room. It measures once the
// cleaner works at the writers' pace. For comparison it also reports how the same writers filled the volume, in the
// same store when it was empty.
func BenchmarkCleaner(b *testing.B) {
	for _, c := range []struct {
		use     float64
		writers int
	}{{0.7, 1}, {0.7, 4}, {0.86, 1}} {
		b.Run(fmt.Sprintf("use=%v/writers=%d", c.use, c.writers), func(b *testing.B) {
			l := newCleanerLoad(b, c.use, c.writers)
			empty := l.run(b, l.blocks, l.nextBlock)
			l.run(b, l.blocks*3/2, l.anyBlock)
			b.Run("steady", func(b *testing.B) {
				wrote, moved := l.appended()
				b.ResetTimer()
				r := l.run(b, int64(b.N), l.anyBlock)
				b.StopTimer()
				all, by := l.appended()
				b.ReportMetric(float64(all-wrote)/float64(all-wrote-(by-moved)), "WA")
				empty.report(b, "empty-")
				r.report(b, "")
				b.ReportMetric(r.unfair, "slowest-writer")
				b.ReportMetric(r.rate/empty.rate, "of-empty")
				b.ReportMetric(float64(r.quantile(0.99))/float64(empty.quantile(0.99)), "p99-of-empty")
			})
		})
	}
}

// cleanerLoad is a set of writers to a volume that takes up a part of its limited store.
type cleanerLoad struct {
	d       *Device
	blocks  int64
	writers []*rand.Rand
	data    []byte
	next    int64 // counts the calls of nextBlock by all writers; guarded by mu
	mu      sync.Mutex
}

func newCleanerLoad(b *testing.B, use float64, writers int) *cleanerLoad {
	limit := *cleanerLimit * (1 << 30)
	l := &cleanerLoad{data: make([]byte, 1<<20), blocks: int64(use * limit / (halfBlock + format.SummaryEntrySize))}
	for w := range writers {
		l.writers = append(l.writers, rand.New(rand.NewPCG(1, uint64(w))))
	}
	workload.HalfCompressible(l.writers[0], l.data)
	l.d = benchDeviceOf(b, Options{MaxBytes: int64(limit)}, format.S2, l.blocks*format.BlockSize)
	return l
}

// halfBlock is the space of a half-compressible block in the log, in bytes.
const halfBlock = 2112

// nextBlock returns every block once, in an order that looks random.
func (l *cleanerLoad) nextBlock(*rand.Rand) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	return int64(uint64(l.next) * 2654435761 % uint64(l.blocks))
}

func (l *cleanerLoad) anyBlock(r *rand.Rand) int64 { return r.Int64N(l.blocks) }

func (l *cleanerLoad) appended() (all, cleaned uint64) {
	s := l.d.s
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wal.Appended(), s.cleaner.moved
}

// latencies are the latencies of a run, sorted.
type latencies struct {
	took   []time.Duration
	rate   float64 // per second
	unfair float64 // the time of the slowest writer, divided by the mean of all
}

func (l *cleanerLoad) run(b *testing.B, n int64, block func(*rand.Rand) int64) latencies {
	took := make([][]time.Duration, len(l.writers))
	ends := make([]time.Duration, len(l.writers))
	errs := make([]error, len(l.writers))
	start := time.Now()
	var wg sync.WaitGroup
	for w, r := range l.writers {
		wg.Go(func() {
			took[w] = make([]time.Duration, 0, n)
			for range (n + int64(w)) / int64(len(l.writers)) {
				at, to := r.Int64N(256)*format.BlockSize, block(r)*format.BlockSize
				t0 := time.Now()
				_, err := l.d.WriteAt(l.data[at:at+format.BlockSize], to)
				took[w] = append(took[w], time.Since(t0))
				if err != nil {
					errs[w] = err
					return
				}
			}
			ends[w] = time.Since(start)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
	var sum time.Duration
	for _, e := range ends {
		sum += e
	}
	r := latencies{took: slices.Concat(took...), rate: float64(n) / slices.Max(ends).Seconds()}
	r.unfair = float64(slices.Max(ends)) * float64(len(ends)) / float64(sum)
	slices.Sort(r.took)
	return r
}

func (r latencies) quantile(q float64) time.Duration { return r.took[int(q*float64(len(r.took)-1))] }

func (r latencies) report(b *testing.B, of string) {
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	b.ReportMetric(r.rate, of+"blocks/s")
	b.ReportMetric(us(r.quantile(0.5)), of+"p50-µs")
	b.ReportMetric(us(r.quantile(0.99)), of+"p99-µs")
	b.ReportMetric(us(r.quantile(0.999)), of+"p99.9-µs")
	b.ReportMetric(us(r.quantile(1)), of+"max-µs")
}
