package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/bench"
	"github.com/vdisk/vdisk/internal/owner"
)

func (a *app) benchCommand() *cli.Command {
	return a.command(arity{0, 0}, &cli.Command{
		Name:      "bench",
		Category:  groupMaintenance,
		Usage:     "measure the engine with a short load on a scratch volume",
		UsageText: "vdisk bench [--size SIZE] [--time DURATION] [--compress none|s2|zstd[:N]] [--dir DIR]",
		Description: "The load runs on a new volume, " + bench.Volume + ", in the store. It is removed at the end, and also if the command is\n" +
			"interrupted; if the command is killed, the store's next owner removes it. If another process owns the store, that process\n" +
			"runs the load, beside its other work. With --dir the store is a temporary one in DIR, to measure a disk before there is\n" +
			"a store on it.\n" +
			"The data is half compressible. Reads are of data that was just written, so they come from memory if it is large enough.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "size", Aliases: []string{"s"}, Usage: "`SIZE` of the scratch volume; up to four times that goes to the disk (none: seven)", Value: "512M"},
			&cli.DurationFlag{Name: "time", Usage: "end a step after `DURATION`", Value: 2 * time.Second},
			&cli.StringFlag{Name: "compress", Usage: "none, s2, or zstd with a level from 1 (fast) to 19 (small), as zstd:9", Value: "s2"},
			&cli.PathFlag{Name: "dir", Usage: "measure in a temporary store in `DIR`"},
		},
	}, a.bench)
}

// stepJSON is one line of the table in the JSON output.
type stepJSON struct {
	Step       string  `json:"step"`
	Operations int64   `json:"operations"`
	Bytes      int64   `json:"bytes"`
	Seconds    float64 `json:"seconds"`
	IOPS       float64 `json:"iops"`
	Rate       float64 `json:"bytes_per_second"`
	P50        int64   `json:"p50_ns"`
	P99        int64   `json:"p99_ns"`
	CPU        int64   `json:"cpu_ns_per_operation"`
}

// benchJSON is the result in the JSON output.
type benchJSON struct {
	Store    string     `json:"store"`
	Size     int64      `json:"size"`
	Compress string     `json:"compress"`
	Steps    []stepJSON `json:"steps"`
}

func stepOf(r bench.Result) stepJSON {
	j := stepJSON{
		Step: r.Name, Operations: r.Operations, Bytes: r.Bytes, Seconds: r.Elapsed.Seconds(),
		P50: r.P50.Nanoseconds(), P99: r.P99.Nanoseconds(),
	}
	if r.Elapsed > 0 && r.Operations > 0 {
		j.IOPS, j.Rate = float64(r.Operations)/j.Seconds, float64(r.Bytes)/j.Seconds
		j.CPU = r.CPU.Nanoseconds() / r.Operations
	}
	return j
}

func (a *app) bench(c *cli.Context) error {
	o, err := a.benchOptions(c)
	if err != nil {
		return err
	}
	if c.IsSet("dir") {
		dir, err := os.MkdirTemp(c.Path("dir"), "vdisk-bench.")
		if err != nil {
			return err
		}
		a.dir = dir
		err = a.duringNew(c, func(s owner.Store) error { return a.measure(c, s, o) })
		return errors.Join(err, os.RemoveAll(dir))
	}
	return a.during(c, func(s owner.Store) error { return a.measure(c, s, o) })
}

func (a *app) benchOptions(c *cli.Context) (o bench.Options, err error) {
	if o.Size, err = a.sizeBetween("--size", c.String("size"), bench.MinSize, cow.MaxVolume); err != nil {
		return o, err
	}
	if o.Time = c.Duration("time"); o.Time <= 0 {
		return o, usageError{c, fmt.Errorf("--time %v is no time", o.Time)}
	}
	o.Volume.Codec, o.Volume.Level, err = compression(c)
	return o, err
}

func (a *app) measure(c *cli.Context, s owner.Store, o bench.Options) error {
	j := benchJSON{Store: a.dir, Size: o.Size, Compress: c.String("compress"), Steps: []stepJSON{}}
	if !a.json {
		fmt.Fprintf(a.stdout, "%-33s %9s %9s %10s %10s %10s\n", "", "IOPS", "MB/s", "P50", "P99", "CPU/IO")
	}
	err := s.Bench(c.Context, o, func(r bench.Result) {
		step := stepOf(r)
		j.Steps = append(j.Steps, step)
		if !a.json {
			a.step(step)
		}
	})
	if err != nil {
		return err
	}
	return a.print(j, func() error {
		_, err := fmt.Fprint(a.stdout, "\n"+
			"The engine by itself, one request at a time, half-compressible data, in the process that owns the store; CPU is all of that\n"+
			"process's. NBD, ublk and file systems come on top, and more requests at a time help. The disk shows in the fill and the\n"+
			"flushes; other writes, and reads, of what was just overwritten at random, are memory and CPU. Machines differ, and so do\n"+
			"runs: compare medians of several on one machine.\n")
		return err
	})
}

func (a *app) step(j stepJSON) {
	rate := "-"
	if j.Bytes > 0 {
		rate = fmt.Sprintf("%.1f", j.Rate/1e6)
	}
	micros := func(ns int64) string { return fmt.Sprintf("%.1f µs", float64(ns)/1000) }
	fmt.Fprintf(a.stdout, "%-33s %9.0f %9s %10s %10s %10s\n", j.Step, j.IOPS, rate, micros(j.P50), micros(j.P99), micros(j.CPU))
}
