package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// takeGuest keeps the results of peers.sh as a run.
func takeGuest(in io.Reader, path string) error {
	m, results, err := readGuest(in)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return err
	}
	l, err := openLog(path, m, true)
	if err != nil {
		return err
	}
	return errors.Join(l.add(results), l.close())
}

// queuesTable has what two jobs on two queues are of one on one.
func queuesTable(r run) string {
	test := func(rw string, n int) string { return fmt.Sprintf("5-rand%s-4k-%d-jobs-and-queues", rw, n) }
	peers := r.peers([]string{test("read", 1)})
	if len(peers) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Two jobs on two queues, of one job on one queue. null_blk works in its user's own thread, and is the most that the machine permits:\n\n")
	fmt.Fprintf(&b, "| | %s |\n|---|%s\n", strings.Join(peers, " | "), strings.Repeat("---:|", len(peers)))
	for _, rw := range []string{"read", "write"} {
		row := "| random " + rw + " 4 KiB"
		for _, p := range peers {
			row += " | " + ratio(r.rate(test(rw, 2), p), r.rate(test(rw, 1), p))
		}
		fmt.Fprintf(&b, "%s |\n", row)
	}
	return b.String()
}

// readGuest reads the lines of testdata/guest/bench/peers.sh: of results, "R test target round IOPS p50(ns) p99(ns)", of the
// machine, "# machine: NAME value", and of what is missing, "# MISSING target: reason".
func readGuest(in io.Reader) (machine, []result, error) {
	var m machine
	var results []result
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := lines.Text()
		f := strings.Fields(line)
		switch {
		case len(f) == 7 && f[0] == "R":
			var x [4]float64
			for i := range x {
				var err error
				if x[i], err = strconv.ParseFloat(f[3+i], 64); err != nil {
					return m, nil, fmt.Errorf("%q: %w", line, err)
				}
			}
			latency := make([]float64, len(quantiles))
			for i, q := range quantiles {
				latency[i] = map[float64]float64{50: round3(x[2] / 1000), 99: round3(x[3] / 1000)}[q]
			}
			if f[2] == "vdisk.4k" { // the others store data the same way, whether it was written by 4 KiB or by 1 MiB
				f[1], f[2] = f[1]+"-overwritten", "vdisk"
			}
			r := result{Unit: f[2], Test: f[1], Peer: f[2], Round: int(x[0]), Rate: round3(x[1])}
			if strings.Contains(r.Test, "read") {
				r.Read = latency
			} else {
				r.Write = latency
			}
			results = append(results, r)
		case len(f) > 3 && f[0] == "#" && f[1] == "machine:":
			m.set(f[2], strings.Join(f[3:], " "))
		case len(f) > 3 && f[0] == "#" && f[1] == "MISSING":
			m.Missing = append(m.Missing, strings.Join(f[2:], " "))
		}
	}
	if err := lines.Err(); err != nil {
		return m, nil, err
	}
	if len(results) == 0 {
		return m, nil, errors.New("the guest has measured nothing")
	}
	return m, results, nil
}

// set takes what the guest says about itself.
func (m *machine) set(name, value string) {
	n, _ := strconv.Atoi(value)
	switch name {
	case "date":
		m.Date = value
	case "kernel":
		m.Kernel = value
	case "system":
		m.System = value
	case "processor":
		m.Processor = value
	case "processors":
		m.Processors = n
	case "version":
		m.Versions = append(m.Versions, value)
	case "rounds":
		m.Parameters.Rounds = n
	case "seconds":
		m.Parameters.Seconds = n
	case "size":
		m.Parameters.SizeMiB = n
	}
}
