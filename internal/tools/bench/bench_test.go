package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

var update = flag.Bool("update", false, "write testdata/report.md")

func sample(t *testing.T) run {
	t.Helper()
	r, err := readRunFile("testdata/nbd.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func sampleGuest(t *testing.T) run {
	t.Helper()
	data, err := os.ReadFile("testdata/guest.txt")
	if err != nil {
		t.Fatal(err)
	}
	m, results, err := readGuest(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return run{m, results}
}

func TestFigures(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   figure
		spread float64
	}{
		{[]float64{3}, figure{3, 3, 3, 1}, 0},
		{[]float64{9, 1, 5}, figure{5, 1, 9, 3}, 80},
		{[]float64{8, 1, 4, 2}, figure{3, 1, 8, 4}, 350. / 3},
	} {
		if got := figureOf(c.values); got != c.want || got.spread() != c.spread {
			t.Errorf("%v: %v, spread %v; want %v, %v", c.values, got, got.spread(), c.want, c.spread)
		}
	}
	r := sample(t)
	if f := r.latency("fsync", "vdisk", "flushes", 99); f.median != 2400 || f.rounds != 3 {
		t.Errorf("latency: %v", f)
	}
	last := &r.Results[len(r.Results)-1] // nbdkit's third round
	last.Flush[8] = 0
	if f := r.latency("fsync", "nbdkit", "flushes", 99); f.known() {
		t.Errorf("a latency that one round does not know is %v", f)
	}
	if f := figureOf(nil); f.known() {
		t.Errorf("no rounds have the figure %v", f)
	}
}

// TestComparisons checks which losses are reported, in what order, and which of them are clear.
func TestComparisons(t *testing.T) {
	r := sample(t)
	all := []string{"read-overwritten", "randwrite-32"}
	want := "- 0.50 × raw (read 1 MiB, overwritten by 4 KiB, cold)\n" +
		"- 0.95 × nbdkit (random write 4 KiB, depth 32), but the rounds overlap\n"
	if got := losses(r, all, r.peers(all)); got != want {
		t.Errorf("losses:\n%s\nwant\n%s", got, want)
	}
	want = "Of 5 comparisons, vdisk is clearly faster in 2 and clearly slower in 1; in 2 the rounds overlap. " +
		"Best: 3.00 × qcow2 (random write 4 KiB, depth 32). Worst: 0.50 × raw (read 1 MiB, overwritten by 4 KiB, cold)."
	if got := verdict(r, all, r.peers(all)); got != want {
		t.Errorf("verdict:\n%s\nwant\n%s", got, want)
	}
	one := figureOf([]float64{2})
	if c, _ := compare("x", "y", one, figureOf([]float64{1})); c.clear || c.ratio != 2 {
		t.Errorf("of one round each: %+v", c)
	}
	if got := losses(r, []string{"before-write"}, r.peers(all)); !strings.Contains(got, "In no comparison") {
		t.Errorf("no losses: %s", got)
	}
}

// TestReport compares the whole text with one that was read (-update writes it anew).
func TestReport(t *testing.T) {
	const golden = "testdata/report.md"
	got, err := render(sample(t), sampleGuest(t))
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		a, b := strings.Split(got, "\n"), strings.Split(string(want), "\n")
		for i := range min(len(a), len(b)) {
			if a[i] != b[i] {
				t.Fatalf("line %d:\n%s\nwant\n%s", i+1, a[i], b[i])
			}
		}
		t.Fatalf("%d lines, want %d", len(a), len(b))
	}
	short := sample(t)
	short.Machine.Parameters.Seconds = 1
	if got, err := render(short, run{}); err != nil || !strings.Contains(got, "This was a short run") || strings.Contains(got, "in a guest") {
		t.Errorf("a short run without a guest, %v:\n%s", err, got)
	}
}

// TestChartScripts checks what gnuplot is given. It draws nothing, as it need not be installed.
func TestChartScripts(t *testing.T) {
	var names []string
	for _, c := range charts(sample(t), sampleGuest(t)) {
		s := c.script(c.name + ".svg")
		names = append(names, c.name)
		if strings.Contains(s, "NaN") || strings.Count(s, "\nplot ") != len(c.panels) || strings.Count(s, "EOD\n") != 2*len(c.panels) {
			t.Errorf("%s:\n%s", c.name, s)
		}
		if c.name == "snapshot" && !strings.Contains(s, `"after a\nsnapshot" 84000 75600 92400 2000 1800 2200`) {
			t.Errorf("the data of snapshot are not the sample's:\n%s", s)
		}
	}
	text, err := os.ReadFile("report.md.tmpl")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if !strings.Contains(string(text), "](bench/"+n+".svg)") {
			t.Errorf("the report does not show %s.svg", n)
		}
	}
	if n := strings.Count(string(text), ".svg)"); n != len(names) {
		t.Errorf("the report shows %d plots, and there are %d", n, len(names))
	}
}

// TestReduce reads what fio prints, and checks that jobs.fio asks for the percentiles that are kept.
func TestReduce(t *testing.T) {
	data, err := os.ReadFile("testdata/fio.json")
	if err != nil {
		t.Fatal(err)
	}
	r, n, err := reduce(data)
	if err != nil || n != 14635+6208 || r.Rate != 10080 || len(r.Read) != len(quantiles) || len(r.Write) != len(quantiles) ||
		len(r.Flush) != len(quantiles) {
		t.Errorf("%v requests, %+v, %v", n, r, err)
	}
	if !slices.IsSorted(r.Read) || r.Read[12] == 0 {
		t.Errorf("latencies of reads at the percentiles: %v", r.Read)
	}
	if r.Flush[11] == 0 || r.Flush[12] != 0 { // of 5253 flushes
		t.Errorf("latencies of flushes: %v", r.Flush)
	}
	for _, bad := range []string{"", "{}", `{"jobs":[{}]}`, `{"jobs":[{"read":{"total_ios":1,"runtime":1}}]}`} {
		if _, _, err := reduce([]byte(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	jobs, err := os.ReadFile("../../../" + jobsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(jobs), "\npercentile_list=1:5:10:25:50:75:90:95:99:99.5:99.9:99.95:99.99\n") {
		t.Error("jobs.fio does not ask for the percentiles in quantiles")
	}
	for _, job := range []string{"fill", "read", "randread", "randwrite", "fsync", "overwrite", "scatter", "trickle", "database", "machine", "half"} {
		if !strings.Contains(string(jobs), "\n["+job+"]\n") {
			t.Errorf("jobs.fio has no %s", job)
		}
	}
}

// TestGoesOn breaks off a run in the middle of a line: the units that are there in full are not measured again.
func TestGoesOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nbd.jsonl")
	m := machine{Kernel: "Linux 7", Parameters: parameters{Rounds: 3}, Busy: 1}
	open := func(m machine, fresh bool) *log {
		t.Helper()
		l, err := openLog(path, m, fresh)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.close() })
		return l
	}
	l := open(m, false)
	if err := l.add([]result{{Unit: "raw", Round: 1, Test: "fill", Peer: "raw", Rate: 5}}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.file.WriteString(`{"unit":"vdisk","rou`); err != nil {
		t.Fatal(err)
	}
	m.Busy = 20 // says nothing of whether the two belong together
	l = open(m, false)
	if !l.done[unitKey("raw", 1)] || len(l.done) != 1 {
		t.Errorf("done: %v", l.done)
	}
	if r, err := readRunFile(path); err != nil || len(r.Results) != 1 || r.Machine.Busy != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	other := m
	other.Parameters.Rounds = 5
	if l := open(other, false); len(l.done) != 0 {
		t.Errorf("results of other parameters: %v", l.done)
	}
	if err := open(m, false).add([]result{{Unit: "raw", Round: 1}}); err != nil {
		t.Fatal(err)
	}
	if l := open(m, true); len(l.done) != 0 {
		t.Errorf("fresh: %v", l.done)
	}
}

// TestDuring holds that figures of a disk that was written meanwhile are of one that was.
func TestDuring(t *testing.T) {
	ctx, broken := t.Context(), errors.New("broken")
	until := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	nothing := func() error { return nil }
	if err := during(ctx, until, nothing); err != nil {
		t.Errorf("a writer that was stopped: %v", err)
	}
	if err := during(ctx, until, func() error { return broken }); !errors.Is(err, broken) {
		t.Errorf("what was done meanwhile failed: %v", err)
	}
	for _, end := range []error{nil, broken} {
		synctest.Test(t, func(t *testing.T) {
			err := during(t.Context(), func(context.Context) error { return end }, func() error { synctest.Wait(); return nil })
			if err == nil || end != nil && !errors.Is(err, end) {
				t.Errorf("a writer that ended with %v: %v", end, err)
			}
		})
	}
}

func TestHangup(t *testing.T) {
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, syscall.SIGHUP) // so that it is not ignored, as nohup(1) has it
	defer signal.Stop(heard)
	ctx, stop := interruptible()
	defer stop()
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-heard
	select {
	case <-ctx.Done():
	case <-time.After(time.Minute):
		t.Error("the program goes on")
	}
}
