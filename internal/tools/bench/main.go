// Command bench measures vdisk beside other servers of disks, and writes docs/bench.md: `make bench` and `make bench-guest`
// call it. It has three commands:
//
//	bench run      measure over NBD: vdisk, qemu-nbd on qcow2 and on a raw file, and nbdkit, in turns
//	bench guest    take the results of testdata/guest/bench/peers.sh from standard input
//	bench report   write the report and its plots again, from the results that are there
//
// The jobs are data: testdata/bench/jobs.fio. So is the text: report.md.tmpl, whose figures and conclusions are all
// computed. What was measured is kept in docs/bench/*.jsonl: the machine in the first line, a result in each other one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

const (
	docs     = "docs"
	nbdFile  = "docs/bench/nbd.jsonl"
	jobsFile = "testdata/bench/jobs.fio"
)

func main() {
	ctx, stop := interruptible()
	err := command(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// interruptible returns a context that ends with a signal, also with the one of a terminal that was closed: servers and
// disks are not left behind.
func interruptible() (context.Context, context.CancelFunc) {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup(1) ignores it
		signals = append(signals, syscall.SIGHUP)
	}
	return signal.NotifyContext(context.Background(), signals...)
}

func command(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("usage: bench run|guest|report [flags]")
	}
	switch args[0] {
	case "run":
		if err := measure(ctx, args[1:]); err != nil {
			return err
		}
		return report(ctx, docs)
	case "guest":
		if err := takeGuest(os.Stdin, guestFile); err != nil {
			return err
		}
		return report(ctx, docs)
	case "report":
		return report(ctx, docs)
	}
	return fmt.Errorf("there is no command %q", args[0])
}

// measure runs all units that a run which was broken off has not, and keeps the results when all are there.
func measure(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	var p parameters
	flags.IntVar(&p.Rounds, "rounds", 3, "measure everything `N` times")
	flags.IntVar(&p.Seconds, "seconds", 2, "give each timed job `N` seconds")
	flags.IntVar(&p.SizeMiB, "size", 512, "measure with `MIB` of data")
	flags.IntVar(&p.Snapshots, "snapshots", 1000, "take `N` snapshots for the reads below them")
	flags.IntVar(&p.Clones, "clones", 100, "make chains of `N` clones and overlays")
	limit := flags.Duration("limit", 28*time.Minute, "begin no further round that would not end within `TIME`")
	dir := flags.String("dir", "", "measure on the file system of the folder `DIR` (default: bin)")
	work := flags.String("work", "bin/bench.d", "keep the results of a run that is not complete in the folder `DIR`")
	fresh := flags.Bool("fresh", false, "do not go on with a run that was broken off")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if p.Rounds < 1 || p.Seconds < 1 || p.SizeMiB < 64 || p.Snapshots < 1 || p.Clones < 1 {
		return errors.New("at least 1 round, 1 second, 64 MiB of data, 1 snapshot and 1 clone are needed")
	}
	if err := os.MkdirAll(*work, 0o777); err != nil {
		return err
	}
	h, err := newHost(*dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	m, err := describe(ctx, h, p)
	if err != nil {
		return err
	}
	log, err := openLog(filepath.Join(*work, "nbd.jsonl"), m, *fresh)
	if err != nil {
		return err
	}
	b := &bench{host: h, parameters: p, log: log, begin: time.Now(), limit: *limit}
	if err := errors.Join(b.all(ctx), log.close()); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx) // what was killed by it says nothing
		}
		return fmt.Errorf("%w (the results so far are kept; the same command goes on with them)", err)
	}
	if err := os.MkdirAll(filepath.Dir(nbdFile), 0o777); err != nil {
		return err
	}
	data, err := os.ReadFile(log.path)
	if err != nil {
		return err
	}
	if err := os.WriteFile(nbdFile, data, 0o666); err != nil {
		return err
	}
	return os.Remove(log.path)
}
