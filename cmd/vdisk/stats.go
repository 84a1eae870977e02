package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/ublk"
)

func (a *app) statsCommand() *cli.Command {
	return a.command(arity{1, 1}, &cli.Command{
		Name:      "stats",
		Category:  groupAccess,
		Usage:     "show a block device's requests, bytes and latencies, and those of NBD clients",
		UsageText: "vdisk stats VOL[@SNAP]|/dev/ublkbN [--interval 1s [--count N]]",
		Description: "Without --interval: totals since the device was attached or recovered. With it: each interval. Latencies are the\n" +
			"server's, from a request's arrival to its answer. NBD clients have their totals since they connected.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Usage: "print again after each interval, until interrupted"},
			&cli.IntFlag{Name: "count", Usage: "print this many times"},
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
	return a.repeatStats(c.Context, interval, count, func() (sample, error) { return a.sample(c) })
}

// repeatStats prints the totals once. With an interval, it prints what each interval added: count times, or until ctx
// ends if count is 0.
func (a *app) repeatStats(ctx context.Context, interval time.Duration, count int, take func() (sample, error)) error {
	s, err := take()
	if err != nil {
		return err
	}
	if interval == 0 {
		j := statsJSONOf(s, s.Stats, 0)
		return a.print(j, func() error { return a.printStats(j) })
	}
	for n := 0; count == 0 || n < count; n++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(interval):
		}
		before := s.Stats
		if s, err = take(); err != nil {
			return err
		}
		j := statsJSONOf(s, minus(s.Stats, before), interval)
		if a.json {
			err = json.NewEncoder(a.stdout).Encode(j)
		} else {
			err = a.printStats(j)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sample is one reading of the counters of a device and of NBD clients. Without a device, its Device has only a name.
type sample struct {
	owner.DeviceStats
	clients []clientJSON
}

// sample reads the counters in a session of its own, so that nobody has to wait for this command to end.
func (a *app) sample(c *cli.Context) (s sample, err error) {
	err = a.look(c, func(store owner.Store) (err error) {
		what := c.Args().First()
		r, perr := cow.ParseRef(what)
		if perr == nil {
			if s.clients, err = clientsOf(c.Context, store, r); err != nil {
				return err
			}
		}
		s.DeviceStats, err = store.Stats(c.Context, what)
		err = notAttached(err)
		if errors.Is(err, cow.ErrNotFound) && len(s.clients) > 0 { // it is no block device
			s.Device.Ref, err = r, nil
		}
		return err
	})
	return s, err
}

// minus returns the difference of two readings. A counter that went down comes from a new server and is taken as it is.
func minus(now, before ublk.Stats) ublk.Stats {
	d := ublk.Stats{Queues: slices.Clone(now.Queues)}
	for q := range d.Queues {
		if q >= len(before.Queues) {
			continue
		}
		for op := range d.Queues[q].Ops {
			to, from := &d.Queues[q].Ops[op], &before.Queues[q].Ops[op]
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

// statsJSON is a device's counters in the JSON output.
type statsJSON struct {
	Name     string           `json:"name"`
	Path     string           `json:"path"`
	Seconds  float64          `json:"seconds,omitempty"` // length of the interval
	Underway int              `json:"underway"`          // requests not answered yet
	Ops      []opStatsJSON    `json:"operations"`        // of all queues together
	Queues   []queueStatsJSON `json:"queues"`
	Clients  []clientJSON     `json:"clients"` // NBD clients
}

type queueStatsJSON struct {
	Underway int           `json:"underway"`
	Ops      []opStatsJSON `json:"operations"`
}

// opStatsJSON is the counters of one operation. Latencies are in nanoseconds.
type opStatsJSON struct {
	Op        string      `json:"operation"`
	Requests  uint64      `json:"requests"`
	Bytes     uint64      `json:"bytes"`
	Errors    uint64      `json:"errors"`
	Mean      int64       `json:"mean_ns"`
	P50       int64       `json:"p50_ns"`
	P99       int64       `json:"p99_ns"`
	Histogram [][2]uint64 `json:"histogram"` // shortest latency and count of each bucket that is not empty
}

func statsJSONOf(of sample, s ublk.Stats, interval time.Duration) statsJSON {
	total := s.Total()
	j := statsJSON{
		Name: of.Device.Ref.String(), Path: of.Device.Path, Seconds: interval.Seconds(), Underway: total.Underway,
		Ops: opsJSON(&total), Queues: []queueStatsJSON{}, Clients: append([]clientJSON{}, of.clients...),
	}
	if j.Path == "" {
		j.Ops = []opStatsJSON{}
	}
	for i := range s.Queues {
		j.Queues = append(j.Queues, queueStatsJSON{s.Queues[i].Underway, opsJSON(&s.Queues[i])})
	}
	return j
}

// operations lists the operations that a server receives.
var operations = []ublk.Op{ublk.OpRead, ublk.OpWrite, ublk.OpFlush, ublk.OpDiscard, ublk.OpWriteZeroes}

func opsJSON(q *ublk.QueueStats) []opStatsJSON {
	list := []opStatsJSON{}
	for _, op := range operations {
		s := &q.Ops[op]
		j := opStatsJSON{
			Op: op.String(), Requests: s.Requests, Bytes: s.Bytes, Errors: s.Errors, Mean: int64(s.Latency.Mean()),
			P50: int64(s.Latency.Quantile(0.50)), P99: int64(s.Latency.Quantile(0.99)), Histogram: [][2]uint64{},
		}
		for i, n := range s.Latency.Counts {
			if n > 0 {
				j.Histogram = append(j.Histogram, [2]uint64{uint64(s.Latency.Bucket(i)), n})
			}
		}
		list = append(list, j)
	}
	return list
}

func (a *app) printStats(j statsJSON) error {
	header := append(headings("OPERATION"), numbers("REQUESTS", "BYTES", "ERRORS", "MEAN", "P50", "P99")...)
	var rows [][]string
	for _, o := range j.Ops {
		row := []string{o.Op, fmt.Sprint(o.Requests), a.size(int64(o.Bytes)), fmt.Sprint(o.Errors), "-", "-", "-"}
		if o.Requests > 0 {
			for i, ns := range []int64{o.Mean, o.P50, o.P99} {
				row[4+i] = time.Duration(ns).Round(100 * time.Nanosecond).String()
			}
		}
		rows = append(rows, row)
	}
	if j.Path != "" {
		if err := a.table(header, rows, false); err != nil {
			return err
		}
	}
	if len(j.Clients) > 0 {
		return a.printClients(j.Clients)
	}
	return nil
}
