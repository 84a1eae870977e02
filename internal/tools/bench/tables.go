package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// inverse turns a figure round if less is better, since a table takes the largest for the best.
func inverse(f figure) figure { return figure{1 / f.median, 1 / f.most, 1 / f.least, f.rounds} }

func cpuCell(r run, test, peer string) (figure, string) {
	f := r.of(test, peer, func(x result) float64 { return x.CPU })
	return inverse(f), withSpread(f, micros)
}

func spaceCell(r run, test, peer string) (figure, string) {
	f := r.of(test, peer, func(x result) float64 { return x.Space })
	if !f.known() {
		return f, "–"
	}
	return inverse(f), fmt.Sprintf("%.2f", f.median)
}

// A latencyRow is a test, and what of it is looked at.
type latencyRow struct{ test, kind string }

var latencyRows = []latencyRow{
	{"randread-1", "reads"},
	{"randread-32", "reads"},
	{"randread-cold", "reads"},
	{"randwrite-1", "writes"},
	{"randwrite-32", "writes"},
	{"fsync", "writes"},
	{"fsync", "flushes"},
	{"database", "reads"},
	{"database", "writes"},
	{"machine", "reads"},
	{"machine", "writes"},
}

func (l latencyRow) String() string {
	if strings.HasPrefix(l.test, "rand") {
		return title(l.test)
	}
	return title(l.test) + ": the " + l.kind
}

// latencyTable has the median, the 99th and the 99.9th percentile of each peer; and how many times the best other's p99 vdisk's is.
func latencyTable(r run, peers []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| p50 · p99 · p99.9 | %s | p99: vdisk / best other |\n|---|%s---:|\n", strings.Join(peers, " | "), strings.Repeat("---:|", len(peers)))
	for _, l := range latencyRows {
		row, best := "| "+l.String(), figureOf(nil)
		for _, p := range peers {
			at := func(q float64) figure { return r.latency(l.test, p, l.kind, q) }
			row += fmt.Sprintf(" | %s · %s · %s", micros(at(50).median), micros(at(99).median), micros(at(99.9).median))
			if f := at(99); p != "vdisk" && f.known() && (!best.known() || f.median < best.median) {
				best = f
			}
		}
		ours := r.latency(l.test, "vdisk", l.kind, 99)
		last := "–"
		if ours.known() && best.known() {
			last = fmt.Sprintf("%.2f", ours.median/best.median)
			if ours.median > best.median*1.005 {
				last = "**" + last + "**"
			}
		}
		fmt.Fprintf(&b, "%s | %s |\n", row, last)
	}
	return b.String()
}

// comparisons of vdisk with all others, in all tests that both have.
func comparisons(r run, tests, peers []string) []comparison {
	var all []comparison
	for _, t := range tests {
		for _, p := range peers {
			if c, is := compare(t, p, r.rate(t, "vdisk"), r.rate(t, p)); is && p != "vdisk" {
				all = append(all, c)
			}
		}
	}
	return all
}

// ratioTable has what vdisk is of each other: ▲ where all its rounds were faster, ▼ where all were slower.
func ratioTable(r run, tests, peers []string) string {
	others := slices.DeleteFunc(slices.Clone(peers), func(p string) bool { return p == "vdisk" })
	var b strings.Builder
	fmt.Fprintf(&b, "| vdisk, of | %s |\n|---|%s\n", strings.Join(others, " | "), strings.Repeat("---:|", len(others)))
	for _, t := range tests {
		row := "| " + title(t)
		for _, p := range others {
			c, is := compare(t, p, r.rate(t, "vdisk"), r.rate(t, p))
			row += " | " + ratioCell(c, is)
		}
		fmt.Fprintf(&b, "%s |\n", row)
	}
	return b.String()
}

func ratioCell(c comparison, is bool) string {
	switch {
	case !is:
		return "–"
	case c.clear && c.ratio < 1:
		return fmt.Sprintf("**%.2f** ▼", c.ratio)
	case c.clear:
		return fmt.Sprintf("%.2f ▲", c.ratio)
	}
	return fmt.Sprintf("%.2f", c.ratio)
}

// verdict says how often vdisk was faster and slower, and where most.
func verdict(r run, tests, peers []string) string {
	all := comparisons(r, tests, peers)
	if len(all) == 0 {
		return "There is nothing to compare."
	}
	var faster, slower int
	for _, c := range all {
		switch {
		case c.clear && c.ratio > 1:
			faster++
		case c.clear:
			slower++
		}
	}
	best := slices.MaxFunc(all, func(a, b comparison) int { return cmp.Compare(a.ratio, b.ratio) })
	worst := slices.MinFunc(all, func(a, b comparison) int { return cmp.Compare(a.ratio, b.ratio) })
	return fmt.Sprintf("Of %d comparisons, vdisk is clearly faster in %d and clearly slower in %d; in %d the rounds overlap. Best: %s. Worst: %s.",
		len(all), faster, slower, len(all)-faster-slower, best, worst)
}

func (c comparison) String() string {
	return fmt.Sprintf("%.2f × %s (%s)", c.ratio, c.peer, title(c.test))
}

// losses lists all comparisons in which vdisk is behind, the worst first.
func losses(r run, tests, peers []string) string {
	all := slices.DeleteFunc(comparisons(r, tests, peers), func(c comparison) bool { return c.ratio > 0.995 })
	if len(all) == 0 {
		return "- In no comparison of this run.\n"
	}
	slices.SortStableFunc(all, func(a, b comparison) int { return cmp.Compare(a.ratio, b.ratio) })
	var b strings.Builder
	for _, c := range all {
		fmt.Fprintf(&b, "- %s", c)
		if !c.clear {
			b.WriteString(", but the rounds overlap")
		}
		b.WriteString("\n")
	}
	return b.String()
}

// fullTable has vdisk's writes to a store that is full to several parts.
func fullTable(r run) string {
	var b strings.Builder
	b.WriteString("| the volume takes | first, requests/s | steady, requests/s | steady / first | p99, first | p99, steady |\n|---|---:|---:|---:|---:|---:|\n")
	for _, percent := range fills {
		first, steady := fmt.Sprint("full-first-", percent), fmt.Sprint("full-steady-", percent)
		f, s := r.rate(first, "vdisk"), r.rate(steady, "vdisk")
		fmt.Fprintf(&b, "| %d %% | %s | %s | %s | %s | %s |\n", percent, withSpread(f, count), withSpread(s, count), ratio(s, f),
			micros(r.latency(first, "vdisk", "writes", 99).median), micros(r.latency(steady, "vdisk", "writes", 99).median))
	}
	return b.String()
}

// changes has, for each peer, what a test is of the one that stands before it.
func changes(r run, before, after string, peers []string) string {
	var all []string
	for _, p := range peers {
		if x := ratio(r.rate(after, p), r.rate(before, p)); x != "–" {
			all = append(all, p+" "+x+" ×")
		}
	}
	return strings.Join(all, ", ")
}

// guestChanges has, for each device in the guest, what random writes after a snapshot are of those right before it.
func guestChanges(r run, peers []string) string {
	var all []string
	for _, p := range peers {
		before := r.rate("3-randwrite-4k-overwritten", p)
		if !before.known() {
			before = r.rate("3-randwrite-4k", p)
		}
		if x := ratio(r.rate("4-randwrite-4k-after-snapshot", p), before); x != "–" {
			all = append(all, p+" "+x+" ×")
		}
	}
	return strings.Join(all, ", ")
}

// growth is what vdisk takes in a test of space, of what a peer takes.
func growth(r run, test, peer string) string {
	space := func(x result) float64 { return x.Space }
	return ratio(r.of(test, "vdisk", space), r.of(test, peer, space))
}
