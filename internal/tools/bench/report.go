package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
)

const guestFile = "docs/bench/guest.jsonl"

// titles of tests, as rows and sentences name them.
var titles = map[string]string{
	"fill":             "fill, 1 MiB",
	"read-cold":        "read 1 MiB, cold",
	"read-overwritten": "read 1 MiB, overwritten by 4 KiB, cold",
	"read-packed":      "the same after `vdisk gc --cold`",
	"randread-cold":    "random read 4 KiB, cold",
	"fsync":            "random write 4 KiB, a flush after each",
	"overwrite":        "random write 4 KiB, every block once",
	"database":         "database: 8 KiB, 70 % reads",
	"machine":          "machine: 4 to 256 KiB, 60 % reads",
	"half":             "half and half: 4 KiB",
	"before-write":     "random write, before",
	"before-read":      "random read, before",
	"after-write":      "random write, after a snapshot",
	"after-read":       "random read, after a snapshot",
	"child-write":      "random write, in a clone or an overlay",
	"child-read":       "random read, in a clone or an overlay",
	"chain-none":       "no snapshot",
	"chain-snapshots":  "below all snapshots",
	"chain-clones":     "at the end of the chain",

	"space-filled":         "filled by 1 MiB",
	"space-overwritten":    "after all tests of writing, and every block once by 4 KiB",
	"space-packed":         "the same after `vdisk gc --cold`",
	"space-after-snapshot": "a byte that is written by 4 KiB after a snapshot",

	"2-randread-4k":                 "random read 4 KiB",
	"3-randwrite-4k":                "random write 4 KiB",
	"4-randwrite-4k-after-snapshot": "random write 4 KiB, after a snapshot",
	"1-fill-1M":                     "fill, 1 MiB",
	"2-randread-4k-overwritten":     "random read 4 KiB, of what was overwritten by 4 KiB",
	"3-randwrite-4k-overwritten":    "random write 4 KiB, over what was overwritten by 4 KiB",
}

func title(test string) string {
	if t, is := titles[test]; is {
		return t
	}
	for prefix, text := range map[string]string{
		"randread-": "random read 4 KiB, depth ", "randwrite-": "random write 4 KiB, depth ",
		"full-first-": "first, %", "full-steady-": "steady, %",
	} {
		if rest, is := strings.CutPrefix(test, prefix); is {
			return text + rest
		}
	}
	return test
}

//go:embed report.md.tmpl
var reportText string

// report writes bench.md and its plots into the folder dir, from the results in its folder bench.
func report(ctx context.Context, dir string) error {
	nbd, err := readRunFile(filepath.Join(dir, "bench", filepath.Base(nbdFile)))
	if err != nil {
		return fmt.Errorf("%w (`make bench` measures)", err)
	}
	guest, err := readRunFile(filepath.Join(dir, "bench", filepath.Base(guestFile)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := render(nbd, guest)
	if err != nil {
		return err
	}
	for _, c := range charts(nbd, guest) {
		if err := c.draw(ctx, filepath.Join(dir, "bench", c.name+".svg")); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "bench.md"), []byte(text), 0o666)
}

// render makes the text of the report. A run in the guest without results is left out.
func render(nbd, guest run) (string, error) {
	t, err := template.New("report").Funcs(template.FuncMap{
		"tests":   func(t ...string) []string { return t },
		"depths":  depthTests,
		"all":     func() []string { return comparable },
		"rates":   func(r run, tests, peers []string) string { return r.table(tests, peers, false, rateCell) },
		"mibs":    func(r run, tests, peers []string) string { return r.table(tests, peers, false, mibCell) },
		"cpus":    func(r run, tests, peers []string) string { return r.table(tests, peers, true, cpuCell) },
		"spaces":  func(r run, tests, peers []string) string { return r.table(tests, peers, true, spaceCell) },
		"lats":    latencyTable,
		"ratios":  ratioTable,
		"verdict": verdict,
		"losses":  losses,
		"queues":  queuesTable,
		"full":    fullTable,
		"changes": changes,
		"of": func(r run, test, peer, than, beside string) string {
			return times(r.rate(test, peer), r.rate(than, beside))
		},
		"growth":       growth,
		"guestChanges": guestChanges,
	}).Parse(reportText)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	err = t.Execute(&out, map[string]any{
		"NBD": nbd, "Guest": guest, "HasGuest": len(guest.Results) > 0, "Peers": []string{"vdisk", "qcow2", "raw", "nbdkit"},
		"COW": []string{"vdisk", "qcow2"}, "GuestPeers": guest.peers(guestTests), "Rounds": nbd.rounds(), "Short": nbd.short(),
		"GuestRounds": guest.rounds(), "GuestShort": guest.short(), "GuestTests": guestTests, "Fills": fills, "Limit": fullLimitMiB,
	})
	return out.String(), err
}

// comparable are the tests that all peers have, in the order of the report.
var comparable = slices.Concat([]string{"fill", "read-cold", "read-overwritten", "randread-cold"}, depthTests("randread"),
	depthTests("randwrite"), []string{"overwrite", "fsync", "database", "machine", "half"})

var guestTests = []string{"1-fill-1M", "2-randread-4k", "3-randwrite-4k", "2-randread-4k-overwritten", "3-randwrite-4k-overwritten", "4-randwrite-4k-after-snapshot"}

func depthTests(job string) []string {
	var all []string
	for _, d := range depths {
		all = append(all, fmt.Sprint(job, "-", d))
	}
	return all
}

// rounds is how many the run has; the time may not have been enough for all.
func (r run) rounds() int {
	n := 0
	for _, x := range r.Results {
		if x.Unit != "chain" {
			n = max(n, x.Round)
		}
	}
	return n
}

// short reports whether the run was only one to try the benchmark.
func (r run) short() bool {
	return r.rounds() < 3 || r.Machine.Parameters.Seconds < 2 || r.Machine.Parameters.SizeMiB < 256
}

// peers that have results of some tests, vdisk first.
func (r run) peers(tests []string) []string {
	var all []string
	for _, x := range r.Results {
		if slices.Contains(tests, x.Test) && !slices.Contains(all, x.Peer) {
			all = append(all, x.Peer)
		}
	}
	slices.SortStableFunc(all, func(a, b string) int {
		return rank(a) - rank(b)
	})
	return all
}

func rank(peer string) int {
	if peer == "vdisk" {
		return -1
	}
	return 0
}

// table has a row for each test that somebody has, and a column for each peer. The last is how vdisk stands to the best; where
// less is better, it is the other way round.
func (r run) table(tests, peers []string, less bool, cell func(run, string, string) (figure, string)) string {
	var b strings.Builder
	last := "vdisk / best other"
	if less {
		last = "best other / vdisk"
	}
	fmt.Fprintf(&b, "| | %s | %s |\n|---|%s---:|\n", strings.Join(peers, " | "), last, strings.Repeat("---:|", len(peers)))
	for _, test := range tests {
		ours, _ := cell(r, test, "vdisk")
		row, best, some := "| "+title(test), figureOf(nil), false
		for _, p := range peers {
			f, text := cell(r, test, p)
			row += " | " + text
			some = some || f.known()
			if p != "vdisk" && f.known() && (!best.known() || f.median > best.median) {
				best = f
			}
		}
		if some {
			fmt.Fprintf(&b, "%s | %s |\n", row, times(ours, best))
		}
	}
	return b.String()
}

// ratio prints one of two figures.
func ratio(ours, theirs figure) string {
	if !ours.known() || !theirs.known() || theirs.median == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", ours.median/theirs.median)
}

// times is a ratio as a table has it: in bold where the first is less.
func times(ours, theirs figure) string {
	text := ratio(ours, theirs)
	if text != "–" && ours.median < theirs.median*0.995 {
		return "**" + text + "**"
	}
	return text
}

func rateCell(r run, test, peer string) (figure, string) {
	f := r.rate(test, peer)
	return f, withSpread(f, count)
}

func mibCell(r run, test, peer string) (figure, string) {
	f := r.of(test, peer, func(x result) float64 { return x.MiB })
	return f, withSpread(f, count)
}

func withSpread(f figure, print func(float64) string) string {
	if !f.known() {
		return "–"
	}
	return fmt.Sprintf("%s ±%.0f %%", print(f.median), f.spread())
}

// count prints three digits of a number.
func count(x float64) string {
	switch {
	case x >= 99950:
		return fmt.Sprintf("%.0f K", x/1000)
	case x >= 9995:
		return fmt.Sprintf("%.1f K", x/1000)
	case x >= 995:
		return fmt.Sprintf("%.2f K", x/1000)
	case x >= 99.95:
		return fmt.Sprintf("%.0f", x)
	}
	return fmt.Sprintf("%.3g", x)
}

// micros prints a time that is in µs.
func micros(x float64) string {
	switch {
	case math.IsNaN(x):
		return "–"
	case x >= 999500:
		return fmt.Sprintf("%.3g s", x/1e6)
	case x >= 999.5:
		return fmt.Sprintf("%.3g ms", x/1e3)
	}
	return fmt.Sprintf("%.3g µs", x)
}
