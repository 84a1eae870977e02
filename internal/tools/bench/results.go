package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
)

// quantiles of latencies that a result has, in percent: percentile_list in jobs.fio.
var quantiles = []float64{1, 5, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99}

// A result is what one job, or one look at the space, has measured.
type result struct {
	Unit  string    `json:"unit"` // what is measured in one go: a peer, or one of the other parts of a run
	Round int       `json:"round"`
	Test  string    `json:"test"`
	Peer  string    `json:"peer"`
	Rate  float64   `json:"rate,omitempty"`   // requests a second, with the last flush
	MiB   float64   `json:"mib,omitempty"`    // a second
	CPU   float64   `json:"cpu_us,omitempty"` // processor time of the server, a request
	Read  []float64 `json:"read_us,omitempty"`
	Write []float64 `json:"write_us,omitempty"`
	Flush []float64 `json:"flush_us,omitempty"` // latencies, at the quantiles; 0 where there are too few requests to say
	Space float64   `json:"space,omitempty"`    // bytes on the disk, of a byte that was written
}

// A run is what one run of the benchmark has measured, and on what machine.
type run struct {
	Machine machine
	Results []result
}

// readRun reads a file of results. A last line that was not written in full is left out.
func readRun(r io.Reader) (run, error) {
	var all run
	lines := bufio.NewReader(r)
	for n := 1; ; n++ {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			if n == 1 {
				return run{}, errors.New("there is no description of a machine")
			}
			return all, nil
		}
		if err != nil {
			return run{}, err
		}
		if n == 1 {
			err = json.Unmarshal(line, &all.Machine)
		} else {
			var r result
			err = json.Unmarshal(line, &r)
			all.Results = append(all.Results, r)
		}
		if err != nil {
			return run{}, fmt.Errorf("line %d: %w", n, err)
		}
	}
}

func readRunFile(path string) (run, error) {
	f, err := os.Open(path)
	if err != nil {
		return run{}, err
	}
	defer f.Close()
	r, err := readRun(f)
	if err != nil {
		return run{}, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// A log keeps the results of a run, so that a run that was broken off can go on.
type log struct {
	path string
	file *os.File
	done map[string]bool // units of rounds
}

func unitKey(unit string, round int) string { return fmt.Sprintf("%s/%d", unit, round) }

// openLog opens the log of a run of the same versions, with the same parameters, on the same machine; or makes a new one.
func openLog(path string, m machine, fresh bool) (*log, error) {
	l := &log{path: path, done: map[string]bool{}}
	old, err := readRunFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		fresh = true // it cannot be read, and nothing is lost but time
	}
	if err == nil && !fresh && old.Machine.same(m) {
		m = old.Machine
	} else {
		old = run{}
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	err = e.Encode(m)
	for _, r := range old.Results {
		l.done[unitKey(r.Unit, r.Round)] = true
		err = errors.Join(err, e.Encode(r))
	}
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(path, b.Bytes(), 0o666); err != nil {
		return nil, err
	}
	l.file, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	return l, err
}

// add writes all results of a unit at once: there are those of whole units only.
func (l *log) add(results []result) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	for _, r := range results {
		if err := e.Encode(r); err != nil {
			return err
		}
		l.done[unitKey(r.Unit, r.Round)] = true
	}
	_, err := l.file.Write(b.Bytes())
	return err
}

func (l *log) close() error { return l.file.Close() }

// A figure is the median of the rounds, with the least and the greatest of them. Without a round it is NaN.
type figure struct {
	median, least, most float64
	rounds              int
}

func (f figure) known() bool { return !math.IsNaN(f.median) }

// spread is a half of the range, in percent of the median.
func (f figure) spread() float64 {
	if f.median == 0 {
		return 0
	}
	return (f.most - f.least) / 2 / f.median * 100
}

func figureOf(values []float64) figure {
	n := len(values)
	if n == 0 {
		return figure{math.NaN(), math.NaN(), math.NaN(), 0}
	}
	v := slices.Clone(values)
	slices.Sort(v)
	return figure{(v[(n-1)/2] + v[n/2]) / 2, v[0], v[n-1], n}
}

// of collects what each round has of a test and a peer. Zero counts as not measured.
func (r run) of(test, peer string, what func(result) float64) figure {
	var values []float64
	for _, x := range r.Results {
		if x.Test == test && x.Peer == peer {
			if v := what(x); v != 0 {
				values = append(values, v)
			}
		}
	}
	return figureOf(values)
}

func (r run) rate(test, peer string) figure {
	return r.of(test, peer, func(x result) float64 { return x.Rate })
}

// latency is the median of a quantile of the rounds, in µs: of reads, writes or flushes. All rounds must know it: those that do not
// are the slow ones.
func (r run) latency(test, peer, kind string, quantile float64) figure {
	i := slices.Index(quantiles, quantile)
	f := r.of(test, peer, func(x result) float64 {
		if l := map[string][]float64{"reads": x.Read, "writes": x.Write, "flushes": x.Flush}[kind]; i < len(l) {
			return l[i]
		}
		return 0
	})
	if f.rounds < r.rate(test, peer).rounds {
		return figureOf(nil)
	}
	return f
}

// A comparison is vdisk beside a peer: how many times as fast it is.
type comparison struct {
	test, peer string
	ratio      float64
	clear      bool // reports whether every round of one was faster than every round of the other, of more than one each
}

func compare(test, peer string, ours, theirs figure) (comparison, bool) {
	if !ours.known() || !theirs.known() || theirs.median == 0 {
		return comparison{}, false
	}
	apart := ours.least > theirs.most || ours.most < theirs.least
	return comparison{test, peer, ours.median / theirs.median, apart && ours.rounds > 1 && theirs.rounds > 1}, true
}
