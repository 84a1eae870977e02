package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/ublk"
)

// TestStats: an interval shows the requests between two readings, even if the server changed meanwhile.
func TestStats(t *testing.T) {
	reading := func(n uint64) (s ublk.Stats) {
		s.Queues = make([]ublk.QueueStats, 2)
		for q := range s.Queues {
			w := &s.Queues[q].Ops[ublk.OpWrite]
			w.Requests, w.Bytes, w.Latency.Sum = n, n*4096, time.Duration(n)*time.Microsecond
			w.Latency.Counts[100] = n
		}
		return s
	}
	before, now := reading(10), reading(15)
	j := statsJSONOf(sample{DeviceStats: owner.DeviceStats{Device: owner.Device{Ref: cow.Ref{Volume: "v"}, Path: "/dev/ublkb0"}}}, minus(now, before), time.Second)
	if w := j.Ops[1]; w.Op != "write" || w.Requests != 10 || w.Bytes != 10*4096 || w.Mean != 1000 || len(w.Histogram) != 1 || w.Histogram[0][1] != 10 {
		t.Errorf("%+v", w)
	}
	if got := now.Queues[0].Ops[ublk.OpWrite].Requests; got != 15 {
		t.Errorf("the reading has become %d", got)
	}
	if w := minus(reading(3), now).Queues[0].Ops[ublk.OpWrite]; w.Requests != 3 {
		t.Errorf("a new server's counters became %d", w.Requests)
	}
	var out bytes.Buffer
	if err := (&app{stdout: &out}).printStats(j); err != nil || !strings.Contains(out.String(), "write               10  40KiB") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// TestStatsRepeat: statistics are printed as often as --count requires, or without it until the end.
func TestStatsRepeat(t *testing.T) {
	for count, want := range map[int]int{1: 1, 3: 3, 0: 5} {
		var out bytes.Buffer
		a := &app{stdout: &out, json: true}
		ctx, cancel := context.WithCancel(t.Context())
		readings := 0
		err := a.repeatStats(ctx, time.Millisecond, count, func() (sample, error) {
			if readings++; readings == 6 {
				cancel()
			}
			return sample{DeviceStats: owner.DeviceStats{Stats: ublk.Stats{Queues: make([]ublk.QueueStats, 1)}}}, nil
		})
		cancel()
		if got := strings.Count(out.String(), "\n"); got < want || count > 0 && got > want || (err != nil) != (count == 0) {
			t.Errorf("--count %d: %d intervals, %v", count, got, err)
		}
	}
}
