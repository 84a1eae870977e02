// Command soak runs `vdisk serve` for hours with everything at once, kills it again and again, and compares all content
// with a shadow.
//
//	soak -vdisk PROGRAM -dir DIR -hours H
//
// It writes, reads, trims and zeroes volumes over NBD, with clients that die. Meanwhile it takes snapshots, clones,
// rolls back, resizes, renames, imports, exports, cleans and checks. The store is small and kept nearly full. Every
// minute or so the server is killed, and started again.
//
//	image.go      the shadow of one volume or snapshot: a sparse file, and the requests under way
//	world.go      all images by name, and how they are picked and locked
//	server.go     the server and the commands
//	client.go     NBD clients
//	names.go      commands that change names, sizes and whole contents
//	chores.go     commands that change nothing
//	doubt.go      what a command did that a kill had cut off
//	compare.go    the store against the shadow
//	life.go       one server, from its start to its end
//	sample.go     memory, descriptors, threads, goroutines, files: they must not grow
//	throttle.go   the share of the processor that all of this takes
//	state.go      the sums, and the shadow between two runs
//
// The folder keeps the sums and the shadow, so that a soak can be run in pieces. A piece that fails leaves everything
// as it is.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	c := defaults()
	flag.StringVar(&c.vdisk, "vdisk", "bin/vdisk", "the program")
	flag.StringVar(&c.dir, "dir", "", "the folder for the store, the shadow and the sums")
	hours := flag.Float64("hours", 1, "how long this piece takes")
	flag.DurationVar(&c.life, "life", c.life, "how long a server lives, on average")
	flag.Float64Var(&c.cores, "cores", c.cores, "processors to use, of the server and its clients together")
	flag.Int64Var(&c.maxSize, "max-size", c.maxSize, "MiB that the store may take")
	flag.Int64Var(&c.volumeSize, "volume-size", c.volumeSize, "MiB that a volume has at most")
	flag.Uint64Var(&c.seed, "seed", uint64(time.Now().UnixNano()), "seed of the random choices")
	flag.Parse()
	c.duration = time.Duration(*hours * float64(time.Hour))
	c.log = func(format string, args ...any) {
		fmt.Printf("%s "+format+"\n", append([]any{time.Now().Format("15:04:05")}, args...)...)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if c.dir == "" {
		fmt.Fprintln(os.Stderr, "soak: -dir is missing")
		os.Exit(2)
	}
	total, err := run(ctx, c)
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak: FAILED:", err)
		os.Exit(1)
	}
	fmt.Printf("proof: soak hours: %.2f\n", total.Hours)
	fmt.Printf("proof: kills, soak: %d\n", total.Kills)
}

// config says how to soak.
type config struct {
	vdisk, dir string
	duration   time.Duration // of this piece
	life       time.Duration // of a server, on average
	cores      float64
	maxSize    int64 // of the store, in MiB
	volumeSize int64 // of a volume at most, in MiB
	volumes    int   // at most
	snapshots  int   // at most, of all volumes
	clients    int   // at a time
	commands   int   // at a time
	seed       uint64
	log        func(format string, args ...any)
}

func defaults() config {
	return config{
		life: 75 * time.Second, cores: 0.5, maxSize: 512, volumeSize: 160, volumes: 12, snapshots: 24, clients: 6, commands: 3,
	}
}
