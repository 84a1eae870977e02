package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// readGuest reads the lines of testdata/guest/bench/peers.sh: of results, "R test target round IOPS p50(ns) p99(ns)", of the
// machine, "# machine: NAME value", and remarks, which are passed on.
func readGuest(in io.Reader, say io.Writer) (machine, []result, error) {
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
			continue
		case len(f) > 3 && f[0] == "#" && f[1] == "machine:":
			m.set(f[2], strings.Join(f[3:], " "))
		case len(f) > 3 && f[0] == "#" && f[1] == "MISSING":
			m.Missing = append(m.Missing, strings.Join(f[2:], " "))
		}
		fmt.Fprintln(say, line)
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
