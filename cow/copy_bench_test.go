package cow

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/internal/workload"
)

// BenchmarkCopyOfTheTable compares random writes of 4 KiB over a volume of 64 GiB with and without the copy of the table.
// Two stores take turns, so that both meet the same machine. An operation is 200,000 writes with the checkpoints that
// they call for, and one behind them, on each store. Before that, as many have given both a map. The metric ratio is the
// median, over the turns, of the time with the copy over the time without, and cpu-ratio that of the processor's time.
func BenchmarkCopyOfTheTable(b *testing.B) {
	const size, turn = 64 << 30, 200_000
	var devs [2]*Device
	var rngs [2]*rand.Rand
	for i := range devs {
		devs[i] = benchDeviceOf(b, Options{noCopy: i == 1, ColdAfter: -1}, format.S2, size)
		rngs[i] = rand.New(rand.NewPCG(3, 4))
	}
	buf := make([]byte, 1<<20)
	workload.HalfCompressible(rand.New(rand.NewPCG(1, 2)), buf)
	write := func(i int) (took, cpu time.Duration) {
		begun, was, r := time.Now(), cpuTime(), rngs[i]
		for range turn {
			at := r.Int64N(256) * 4096
			if _, err := devs[i].WriteAt(buf[at:at+4096], r.Int64N(size/4096)*4096); err != nil {
				b.Fatal(err)
			}
		}
		if err := devs[i].s.Checkpoint(); err != nil {
			b.Fatal(err)
		}
		return time.Since(begun), cpuTime() - was
	}
	write(0)
	write(1)
	var ratios, cpus []float64
	var total time.Duration
	was := devs[0].s.meta.CopyState()
	b.ResetTimer()
	for n := range b.N {
		var took, cpu [2]time.Duration
		for _, i := range []int{n % 2, 1 - n%2} {
			took[i], cpu[i] = write(i)
		}
		total += took[1]
		ratios = append(ratios, took[0].Seconds()/took[1].Seconds())
		cpus = append(cpus, cpu[0].Seconds()/cpu[1].Seconds())
	}
	slices.Sort(ratios)
	slices.Sort(cpus)
	now := devs[0].s.meta.CopyState()
	b.ReportMetric(ratios[len(ratios)/2], "ratio")
	b.ReportMetric(cpus[len(cpus)/2], "cpu-ratio")
	b.ReportMetric(float64(b.N)*turn/total.Seconds(), "writes/s-without")
	b.ReportMetric(float64(now.Bytes-was.Bytes)/float64(b.N*turn), "copy-B/write")
}
