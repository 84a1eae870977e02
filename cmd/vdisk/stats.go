package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/ublk"
)

func (a *app) statsCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "stats",
		Category:  groupAccess,
		Usage:     "show what a block device does: requests, bytes, latencies",
		UsageText: "vdisk stats VOL[@SNAP]|/dev/ublkbN [--interval 1s [--count N]]",
		Description: "Without --interval the sums since the device was attached or recovered; with it, what each interval brought. Latencies are\n" +
			"those of the server: the time from a request's arrival to its answer.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Usage: "print again after so long, until interrupted"},
			&cli.IntFlag{Name: "count", Usage: "how many times"},
		},
	}, a.stats)
}

func (a *app) stats(c *cli.Context) error {
	interval, count := c.Duration("interval"), c.Int("count")
	switch {
	case interval < 0 || c.IsSet("interval") && interval == 0:
		return usageError{c, fmt.Errorf("--interval %v: more than zero is needed", interval)}
	case c.IsSet("count") && (count < 1 || interval == 0):
		return usageError{c, fmt.Errorf("--count %d: at least 1 is needed, and --interval", count)}
	}
	var before ublk.Stats
	for n := 1; ; n++ {
		s, err := a.sample(c)
		if err != nil {
			return err
		}
		if interval == 0 {
			return a.print(statsJSONOf(s.Device, s.Stats, 0), func() error { return a.printStats(statsJSONOf(s.Device, s.Stats, 0)) })
		}
		if n > 1 {
			j := statsJSONOf(s.Device, minus(s.Stats, before), interval)
			if a.json {
				err = json.NewEncoder(a.stdout).Encode(j)
			} else {
				err = a.printStats(j)
			}
		}
		if err != nil || n == count+1 {
			return err
		}
		before = s.Stats
		select {
		case <-c.Context.Done():
			return c.Context.Err()
		case <-time.After(interval):
		}
	}
}

// sample reads the counters in a session of its own, so that nobody has to wait for this command to end.
func (a *app) sample(c *cli.Context) (s owner.DeviceStats, err error) {
	return s, a.with(c, func(store owner.Store) error {
		s, err = store.Stats(c.Context, c.Args().First())
		return err
	})
}

// minus is what came between two readings. Counters that went back are those of a new server.
func minus(now, before ublk.Stats) ublk.Stats {
	d := ublk.Stats{Queues: make([]ublk.QueueStats, len(now.Queues))}
	for q := range now.Queues {
		d.Queues[q] = now.Queues[q]
		if q >= len(before.Queues) {
			continue
		}
		for op := range d.Queues[q].Ops {
			to, from := &d.Queues[q].Ops[op], before.Queues[q].Ops[op]
			if to.Requests < from.Requests {
				continue
			}
			to.Requests -= from.Requests
			to.Bytes -= from.Bytes
			to.Errors -= from.Errors
			to.Latency.Sum -= from.Latency.Sum
			for i := range to.Latency.Counts {
				to.Latency.Counts[i] -= from.Latency.Counts[i]
			}
		}
	}
	return d
}

// statsJSON is a device's counters in the output for programs.
type statsJSON struct {
	Name    string          `json:"name"`
	Path    string          `json:"path"`
	Seconds float64         `json:"seconds,omitempty"` // of the interval
	Ops     []opStatsJSON   `json:"operations"`        // of all queues
	Queues  [][]opStatsJSON `json:"queues"`            // each
}

type opStatsJSON struct {
	Op        string  `json:"operation"`
	Requests  uint64  `json:"requests"`
	Bytes     uint64  `json:"bytes"`
	Errors    uint64  `json:"errors"`
	MeanNS    int64   `json:"mean_ns"`
	P50US     float64 `json:"p50_us"` // upper ends of the histogram's buckets
	P99US     float64 `json:"p99_us"`
	Histogram []int64 `json:"histogram"` // bucket i: below 2^i microseconds, and not below 2^(i-1)
}

func statsJSONOf(d owner.Device, s ublk.Stats, interval time.Duration) statsJSON {
	j := statsJSON{Name: d.Ref.String(), Path: d.Path, Seconds: interval.Seconds(), Queues: [][]opStatsJSON{}}
	var sum ublk.QueueStats
	for _, q := range s.Queues {
		j.Queues = append(j.Queues, opsJSON(q))
		for op := range q.Ops {
			to, from := &sum.Ops[op], q.Ops[op]
			to.Requests += from.Requests
			to.Bytes += from.Bytes
			to.Errors += from.Errors
			to.Latency.Sum += from.Latency.Sum
			for i, n := range from.Latency.Counts {
				to.Latency.Counts[i] += n
			}
		}
	}
	j.Ops = opsJSON(sum)
	return j
}

// operations are those that a server sees.
var operations = []ublk.Op{ublk.OpRead, ublk.OpWrite, ublk.OpFlush, ublk.OpDiscard, ublk.OpWriteZeroes}

func opsJSON(q ublk.QueueStats) []opStatsJSON {
	list := []opStatsJSON{}
	for _, op := range operations {
		s := q.Ops[op]
		j := opStatsJSON{Op: op.String(), Requests: s.Requests, Bytes: s.Bytes, Errors: s.Errors,
			P50US: quantile(s.Latency, 0.50), P99US: quantile(s.Latency, 0.99), Histogram: []int64{}}
		if s.Requests > 0 {
			j.MeanNS = int64(s.Latency.Sum) / int64(s.Requests)
		}
		for _, n := range s.Latency.Counts {
			j.Histogram = append(j.Histogram, int64(n))
		}
		list = append(list, j)
	}
	return list
}

// quantile is the upper end in microseconds of the bucket that the quantile p is in.
func quantile(h ublk.Histogram, p float64) float64 {
	var total, seen uint64
	for _, n := range h.Counts {
		total += n
	}
	for i, n := range h.Counts {
		seen += n
		if n > 0 && float64(seen) >= p*float64(total) {
			return float64(uint64(1) << i)
		}
	}
	return 0
}

func (a *app) printStats(j statsJSON) error {
	header := []string{"OPERATION", "REQUESTS", "BYTES", "ERRORS", "MEAN", "P50 <", "P99 <"}
	var rows [][]string
	for _, o := range j.Ops {
		row := []string{o.Op, fmt.Sprint(o.Requests), a.size(int64(o.Bytes)), fmt.Sprint(o.Errors), "-", "-", "-"}
		if o.Requests > 0 {
			row[4] = time.Duration(o.MeanNS).Round(100 * time.Nanosecond).String()
			row[5], row[6] = fmt.Sprintf("%.0fµs", o.P50US), fmt.Sprintf("%.0fµs", o.P99US)
		}
		rows = append(rows, row)
	}
	return a.table(header, rows, false)
}
