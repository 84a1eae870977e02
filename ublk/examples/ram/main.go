// Command ram serves a disk in memory until it is interrupted.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/vdisk/vdisk/ublk"
)

// memory is the disk. A queue calls it for one request at a time, and block devices never have two requests for the
// same bytes under way that matter to each other, so it needs no lock.
type memory []byte

func (m memory) ServeUBLK(r *ublk.Request) error {
	switch r.Op {
	case ublk.OpRead:
		copy(r.Buf, m[r.Offset:])
	case ublk.OpWrite:
		copy(m[r.Offset:], r.Buf)
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		clear(m[r.Offset:][:r.Length])
	}
	return nil // a flush has nothing to do
}

// serve shows the disk, calls ready with its path, and returns when ctx ends or somebody has stopped the device.
func serve(ctx context.Context, o ublk.Options, ready func(path string)) error {
	o.Discard = true
	d, err := ublk.Create(ctx, o, make(memory, o.Size))
	if err != nil {
		return err // it says what is missing, and the way out
	}
	ready(d.Path())
	select {
	case <-ctx.Done():
		return d.Close(context.Background())
	case <-d.Done():
		return d.Err()
	}
}

func main() {
	var o ublk.Options
	flag.IntVar(&o.Queues, "queues", 1, "number of hardware queues")
	flag.IntVar(&o.Depth, "depth", 128, "requests under way in a queue")
	flag.Int64Var(&o.Size, "size", 64<<20, "size in `bytes`")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := serve(ctx, o, func(path string) { fmt.Println(path) }); err != nil {
		fmt.Fprintln(os.Stderr, "ram:", err)
		os.Exit(1)
	}
}
