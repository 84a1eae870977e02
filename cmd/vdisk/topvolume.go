package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/vdisk/vdisk/internal/metrics"
	"github.com/vdisk/vdisk/internal/size"
)

// topVolumeOf returns what a volume or snapshot did between two readings.
func topVolumeOf(now, was *metrics.Traffic, seconds float64) topVolumeJSON {
	var g metrics.Growth
	g.Add(now, was)
	r := g.Rates(seconds)
	return topVolumeJSON{
		Name: now.Ref.String(), Reads: r.Reads, Writes: r.Writes, Flushes: r.Flushes, Errors: r.Errors, ReadBytes: r.ReadBytes, WriteBytes: r.WriteBytes,
		ReadP50: int64(r.ReadP50), ReadP99: int64(r.ReadP99), WriteP50: int64(r.WriteP50), WriteP99: int64(r.WriteP99),
	}
}

// topHead returns the lines about the store.
func (a *app) topHead(j topJSON) []string {
	percent := func(f float64) string {
		if f == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f%%", 100*f)
	}
	cleaner := "idle"
	switch {
	case j.Paced:
		cleaner = "writers wait for it"
	case j.Cleaning:
		cleaner = "at work"
	}
	lines := []string{
		fmt.Sprintf("%s  %s", cell(j.Store), j.Time.Local().Format(time.TimeOnly)),
		fmt.Sprintf("fill %s, room %s   compressed %s   cache hits: map %s, units %s", percent(j.Fill), a.short(float64(j.RoomBytes)), times(j.Ratio), percent(j.MapHits), percent(j.UnitHits)),
		fmt.Sprintf("log %s/s   flushes to disk %s/s, %s each   clients %d   devices %d", a.short(j.Appended), perSecond(j.Syncs), latency(j.SyncNs), j.Clients, j.Devices),
		fmt.Sprintf("cleaner %s, moves %s/s, gives back %s/s", cleaner, a.short(j.Moved), a.short(j.Reclaimed)),
	}
	if j.Waiting > 0 {
		lines = append(lines, fmt.Sprintf("%d DEVICES WAIT for a server: 'vdisk recover'", j.Waiting))
	}
	if j.Failed {
		lines = append(lines, "WRITING HAS FAILED: the store can only be read until it is opened again")
	}
	if j.Damaged > 0 {
		lines = append(lines, fmt.Sprintf("%d DAMAGED PLACES: 'vdisk check --read-data'", j.Damaged))
	}
	return append(lines, "")
}

// topColumns are the columns of the list. If the terminal is narrow, those with the highest number go first.
var topColumns = []struct {
	heading
	goes int
	text func(*app, *topVolumeJSON) string
}{
	{heading{text: "VOLUME", free: true}, 0, func(_ *app, v *topVolumeJSON) string { return cell(v.Name) }},
	{heading{text: "R/s", right: true}, 0, func(_ *app, v *topVolumeJSON) string { return perSecond(v.Reads) }},
	{heading{text: "W/s", right: true}, 0, func(_ *app, v *topVolumeJSON) string { return perSecond(v.Writes) }},
	{heading{text: "F/s", right: true}, 4, func(_ *app, v *topVolumeJSON) string { return perSecond(v.Flushes) }},
	{heading{text: "READ/s", right: true}, 0, func(a *app, v *topVolumeJSON) string { return a.short(v.ReadBytes) }},
	{heading{text: "WRITE/s", right: true}, 0, func(a *app, v *topVolumeJSON) string { return a.short(v.WriteBytes) }},
	{heading{text: "R-P50", right: true}, 3, func(_ *app, v *topVolumeJSON) string { return latency(v.ReadP50) }},
	{heading{text: "R-P99", right: true}, 1, func(_ *app, v *topVolumeJSON) string { return latency(v.ReadP99) }},
	{heading{text: "W-P50", right: true}, 3, func(_ *app, v *topVolumeJSON) string { return latency(v.WriteP50) }},
	{heading{text: "W-P99", right: true}, 1, func(_ *app, v *topVolumeJSON) string { return latency(v.WriteP99) }},
	{heading{text: "RATIO", right: true}, 2, func(_ *app, v *topVolumeJSON) string { return times(v.Ratio) }},
	{heading{text: "ERR/s", right: true}, 5, func(_ *app, v *topVolumeJSON) string { return perSecond(v.Errors) }},
}

// topTable returns the list, with its head as the first line. most is the width of the terminal; 0: no limit.
func (a *app) topTable(j topJSON, most int) (lines []string) {
	for left := 6; ; left-- { // columns with a lower number stay
		var header []heading
		rows := make([][]string, len(j.Volumes)+1)
		for _, c := range topColumns {
			if c.goes >= left {
				continue
			}
			header, rows[0] = append(header, c.heading), append(rows[0], c.heading.text)
			for i := range j.Volumes {
				rows[i+1] = append(rows[i+1], c.text(a, &j.Volumes[i]))
			}
		}
		widths := widthsOf(header, rows, 0)
		total := len(gap)*(len(widths)-1) - max(0, widths[0]-shortName)
		for _, w := range widths {
			total += w
		}
		if most > 0 && total > most && left > 1 {
			continue
		}
		widths = widthsOf(header, rows, most)
		for _, row := range rows {
			lines = append(lines, lineOf(header, widths, row))
		}
		return lines
	}
}

// shortName is how much of a name is shown before columns go to make room for more.
const shortName = 16

// short formats a number of bytes with about three digits.
func (a *app) short(n float64) string {
	if a.bytes {
		return fmt.Sprintf("%.0f", n)
	}
	if n < 1024 {
		return fmt.Sprintf("%.0fB", n)
	}
	unit := 0
	for n /= 1024; n >= 1024 && unit < len(size.Prefixes)-1; unit++ {
		n /= 1024
	}
	return digits(n) + strings.ToUpper(size.Prefixes[unit:unit+1]) + "iB"
}

// times formats a ratio of compression.
func times(ratio float64) string {
	if ratio == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", ratio)
}

// perSecond formats a rate.
func perSecond(rate float64) string {
	if rate > 0 && rate < 10 {
		return fmt.Sprintf("%.1f", rate)
	}
	return fmt.Sprintf("%.0f", rate)
}

// latency formats nanoseconds with about three digits.
func latency(ns int64) string {
	switch {
	case ns == 0:
		return "-"
	case ns < 1e6:
		return digits(float64(ns)/1e3) + "µs"
	case ns < 1e9:
		return digits(float64(ns)/1e6) + "ms"
	default:
		return digits(float64(ns)/1e9) + "s"
	}
}

// digits formats a number with about three digits.
func digits(f float64) string {
	switch {
	case f < 10:
		return fmt.Sprintf("%.2f", f)
	case f < 100:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.0f", f)
}
