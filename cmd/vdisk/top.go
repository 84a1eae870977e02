package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) topCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "top",
		Category:  groupMaintenance,
		Usage:     "show live what the store and its volumes do",
		UsageText: "vdisk top [--interval 1s] [--sort iops|bytes|p99|name] [--all] [--batch [--count N]]",
		Description: "A line a volume: requests a second, throughput, latencies (half of the requests, and 99 % of them, took no longer),\n" +
			"how well its data compresses, failed requests. Above are the store's fill, log, flushes, cleaner and caches.\n\n" +
			"Keys: q quits; i, b, p and n sort by requests, bytes, latency and name; a shows volumes that are not in use, too; the\n" +
			"arrows scroll; space reads again at once. --batch prints instead, and so does output that is no terminal.",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Aliases: []string{"d"}, Usage: "read again after each interval", Value: time.Second},
			&cli.StringFlag{Name: "sort", Usage: "sort by iops, bytes, p99 or name", Value: "iops"},
			&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "show volumes that are not in use, too"},
			&cli.BoolFlag{Name: "batch", Aliases: []string{"b"}, Usage: "print what each interval had, until interrupted"},
			&cli.IntFlag{Name: "count", Aliases: []string{"n"}, Usage: "end after this many intervals"},
		},
	}, a.top)
}

// leastInterval bounds how often top reads.
const leastInterval = 10 * time.Millisecond

func (a *app) top(c *cli.Context) error {
	v := topView{order: c.String("sort"), all: c.Bool("all"), interval: c.Duration("interval"), count: c.Int("count")}
	switch {
	case v.interval < leastInterval:
		return usageError{c, fmt.Errorf("--interval %v: at least %v is needed", v.interval, leastInterval)}
	case c.IsSet("count") && v.count < 1:
		return usageError{c, fmt.Errorf("--count %d: at least 1 is needed", v.count)}
	case topOrders[v.order] == nil:
		return usageError{c, fmt.Errorf("--sort %s: there are iops, bytes, p99 and name", v.order)}
	}
	read := a.topReader(c)
	if a.json || c.Bool("batch") || terminalWidth(a.stdout) == 0 || os.Getenv("TERM") == "dumb" {
		return a.topBatch(c.Context, v, read)
	}
	return a.topScreen(c.Context, v, read)
}

// topReader returns a function that reads what the store does. As for stats, each reading is a session of its own. A store
// without an owner is opened only once, since opening may change it: nothing is done in it until it has one.
func (a *app) topReader(c *cli.Context) readFunc {
	var idle *metrics.Reading // nil: the store had an owner the last time
	begun := false
	return func(ctx context.Context) (r metrics.Reading, err error) {
		if idle != nil {
			err = use(func(s owner.Store) error { r, err = s.Reading(ctx); return err })(owner.OpenOwned(ctx, a.dir, a.options(c)))
			if errors.Is(err, owner.ErrNoOwner) {
				idle.At = time.Now()
				return *idle, nil
			}
			idle = nil
			return r, err
		}
		err = a.look(c, func(s owner.Store) error {
			r, err = s.Reading(ctx)
			if _, ours := s.(*owner.Owner); ours {
				now := r
				idle = &now
				if !begun { // later it would be written over the screen
					a.note("nobody has the store open, so nothing is done in it; what the next owner does will be shown")
				}
			}
			begun = true
			return err
		})
		return r, err
	}
}

// topView is what of the store top shows, and how.
type topView struct {
	order    string // a key of topOrders
	all      bool
	interval time.Duration
	count    int // how many intervals; 0: no limit
	first    int // the first line of the list that is shown
}

type readFunc func(context.Context) (metrics.Reading, error)

// topBatch prints what each interval had.
func (a *app) topBatch(ctx context.Context, v topView, read readFunc) error {
	before, err := read(ctx)
	for n := 0; err == nil && (v.count == 0 || n < v.count); n++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(v.interval):
		}
		var now metrics.Reading
		if now, err = read(ctx); err != nil {
			break
		}
		j := topOf(before, now, v)
		before = now
		if a.json {
			err = json.NewEncoder(a.stdout).Encode(j)
			continue
		}
		var text strings.Builder
		for _, line := range append(a.topHead(j), a.topTable(j, 0)...) {
			fmt.Fprintln(&text, line)
		}
		_, err = io.WriteString(a.stdout, text.String()+"\n")
	}
	return err
}

// topJSON is what a store did in an interval, in the JSON output.
type topJSON struct {
	Store   string    `json:"store"`
	Time    time.Time `json:"time"`    // the end of the interval
	Seconds float64   `json:"seconds"` // its length

	Fill      float64 `json:"fill"` // part of the room for data that is taken, 0 to 1
	RoomBytes int64   `json:"room_bytes"`
	Ratio     float64 `json:"ratio"` // of compression, since the owner began; 0: nothing was written
	MapHits   float64 `json:"map_hits"`
	UnitHits  float64 `json:"unit_hits"`

	Appended  float64 `json:"appended_bytes_per_second"`
	Syncs     float64 `json:"syncs_per_second"`
	SyncNs    int64   `json:"sync_ns"` // mean
	Moved     float64 `json:"moved_bytes_per_second"`
	Reclaimed float64 `json:"reclaimed_bytes_per_second"`
	Cleaning  bool    `json:"cleaning"`
	Paced     bool    `json:"writers_paced"`
	Failed    bool    `json:"failed"`
	Damaged   int     `json:"damaged_places"`
	Clients   int     `json:"clients"`
	Devices   int     `json:"devices"`
	Waiting   int     `json:"waiting_devices"`

	Volumes []topVolumeJSON `json:"volumes"`
}

// topVolumeJSON is what a volume or snapshot did. All but the latencies and the ratio are for a second.
type topVolumeJSON struct {
	Name       string  `json:"name"`
	Reads      float64 `json:"reads_per_second"`
	Writes     float64 `json:"writes_per_second"` // with discards and zeros
	Flushes    float64 `json:"flushes_per_second"`
	Errors     float64 `json:"errors_per_second"`
	ReadBytes  float64 `json:"read_bytes_per_second"`
	WriteBytes float64 `json:"written_bytes_per_second"`
	ReadP50    int64   `json:"read_p50_ns"` // 0: there were none
	ReadP99    int64   `json:"read_p99_ns"`
	WriteP50   int64   `json:"write_p50_ns"`
	WriteP99   int64   `json:"write_p99_ns"`
	Ratio      float64 `json:"ratio"` // of compression, since the owner began; 0: nothing was written, or a snapshot
}

// topOrders are the orders of the list, by name. Those that are alike are in the order of their names.
var topOrders = map[string]func(a, b topVolumeJSON) int{
	"iops": func(a, b topVolumeJSON) int {
		return cmp.Compare(b.Reads+b.Writes+b.Flushes, a.Reads+a.Writes+a.Flushes)
	},
	"bytes": func(a, b topVolumeJSON) int { return cmp.Compare(b.ReadBytes+b.WriteBytes, a.ReadBytes+a.WriteBytes) },
	"p99": func(a, b topVolumeJSON) int {
		return cmp.Compare(max(b.ReadP99, b.WriteP99), max(a.ReadP99, a.WriteP99))
	},
	"name": func(a, b topVolumeJSON) int { return 0 },
}

// part returns a/b, or 0 if b is not above 0.
func part[T uint64 | int64 | float64](a, b T) float64 {
	if b <= 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// topOf returns what happened between two readings.
func topOf(before, now metrics.Reading, v topView) topJSON {
	seconds := now.At.Sub(before.At).Seconds()
	rate := func(now, before uint64) float64 { return part(float64(metrics.Since(now, before)), seconds) }
	n, was := &now.Counters, &before.Counters
	hits := func(all, misses uint64) float64 { return part(all-min(misses, all), all) }
	j := topJSON{
		Store: now.Store, Time: now.At.UTC(), Seconds: seconds, Fill: part(n.FileBytes, n.FileBytes+n.RoomBytes), RoomBytes: n.RoomBytes,
		Ratio:    part(n.WrittenBytes, n.CompressedBytes),
		MapHits:  hits(metrics.Since(n.MapLookups, was.MapLookups), metrics.Since(n.MapLoads, was.MapLoads)),
		UnitHits: hits(metrics.Since(n.UnitHits+n.UnitMisses, was.UnitHits+was.UnitMisses), metrics.Since(n.UnitMisses, was.UnitMisses)),
		Appended: rate(n.AppendedBytes, was.AppendedBytes), Syncs: rate(n.Syncs, was.Syncs),
		SyncNs: int64(part(metrics.Since(uint64(n.SyncTime), uint64(was.SyncTime)), metrics.Since(n.Syncs, was.Syncs))),
		Moved:  rate(n.MovedBytes, was.MovedBytes), Reclaimed: rate(n.ReclaimedBytes, was.ReclaimedBytes), Cleaning: n.Cleaning, Paced: n.Paced,
		Failed: n.Failed, Damaged: n.DamagedPlaces, Clients: now.Clients, Devices: now.Served + now.Waiting, Waiting: now.Waiting,
		Volumes: topVolumes(before, now, v.all),
	}
	slices.SortStableFunc(j.Volumes, func(a, b topVolumeJSON) int { return cmp.Or(topOrders[v.order](a, b), cmp.Compare(a.Name, b.Name)) })
	return j
}

// topVolumes returns what each volume and snapshot did that is in use, or was; with all, each volume.
func topVolumes(before, now metrics.Reading, all bool) []topVolumeJSON {
	past := map[string]*metrics.Traffic{}
	for i := range before.Traffic {
		past[before.Traffic[i].Ref.String()] = &before.Traffic[i]
	}
	ratios := map[string]float64{}
	for _, v := range now.Counters.Volumes {
		ratios[v.Name] = part(v.WrittenBytes, v.CompressedBytes)
	}
	seconds, list := now.At.Sub(before.At).Seconds(), []topVolumeJSON{}
	for i := range now.Traffic {
		t := &now.Traffic[i]
		was := past[t.Ref.String()]
		if was == nil {
			was = new(metrics.Traffic)
		}
		v := topVolumeOf(t, was, seconds)
		v.Ratio = ratios[v.Name]
		delete(ratios, v.Name)
		list = append(list, v)
	}
	for name, ratio := range ratios {
		if all {
			list = append(list, topVolumeJSON{Name: name, Ratio: ratio})
		}
	}
	return list
}
