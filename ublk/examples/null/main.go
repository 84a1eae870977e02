// Command null serves a block device that loses what is written to it and reads as whatever the buffers hold. What it
// costs is what the driver and package ublk cost: it is the target of the benchmarks.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/pprof"
	"syscall"

	"github.com/vdisk/vdisk/ublk"
)

// null answers everything at once.
type null struct{}

func (null) ServeUBLK(*ublk.Request) error { return nil }

func main() {
	var o ublk.Options
	flag.IntVar(&o.Queues, "queues", 1, "number of hardware queues")
	flag.IntVar(&o.Depth, "depth", 128, "requests under way in a queue")
	flag.Int64Var(&o.Size, "size", 250<<30, "size in `bytes`")
	profile := flag.String("cpuprofile", "", "`file` for a CPU profile of the whole run")
	flag.Parse()
	if err := run(o, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "null:", err)
		os.Exit(1)
	}
}

func run(o ublk.Options, profile string) error {
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	d, err := ublk.Create(ctx, o, null{})
	if err != nil {
		return err
	}
	fmt.Println(d.Path())
	select {
	case <-ctx.Done():
		return d.Close(context.Background())
	case <-d.Done(): // stopped from outside, or broken
		return d.Err()
	}
}
