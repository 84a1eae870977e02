package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"
)

// peers over NBD, vdisk last.
var peers = []string{"qcow2", "raw", "nbdkit", "vdisk"}

// depths of the queue in the tests by depth. The tests of one depth have theirs in jobs.fio, or mainDepth.
var depths = []int{1, 4, 16, 32, 64}

const mainDepth = 32

// fills of a limited store, in percent.
var fills = []int{50, 70, 85}

const fullLimitMiB = 512 // the limit of that store

// A bench is one run over NBD.
type bench struct {
	*host
	parameters
	log     *log
	begin   time.Time
	limit   time.Duration
	slowest time.Duration // round of this process
	results []result      // of the unit that is being measured
	unit    string
	round   int
}

// all measures the rounds that are not in the log. A round has each peer once, in an order that changes from round to round.
func (b *bench) all(ctx context.Context) error {
	for round := 1; round <= b.Rounds; round++ {
		begin := time.Now()
		if round > 1 && time.Since(b.begin)+b.slowest > b.limit {
			fmt.Fprintf(os.Stderr, "bench: %v would be over after another round; there are %d\n", b.limit, round-1)
			return nil
		}
		units := append(slices.Clone(peers), "full")
		if round%2 == 0 {
			slices.Reverse(units)
		}
		if round == 1 {
			units = append(units, "chain")
		}
		for _, unit := range units {
			if err := b.measureUnit(ctx, unit, round); err != nil {
				return err
			}
		}
		if d := time.Since(begin); round == 1 || d > b.slowest {
			b.slowest = d
		}
	}
	return nil
}

func (b *bench) measureUnit(ctx context.Context, unit string, round int) error {
	if b.log.done[unitKey(unit, round)] {
		return nil
	}
	fmt.Fprintf(os.Stderr, "%s  round %d, %s\n", time.Now().Format(time.TimeOnly), round, unit)
	b.unit, b.round, b.results = unit, round, nil
	var err error
	switch unit {
	case "full":
		err = b.full(ctx)
	case "chain":
		err = b.chain(ctx)
	default:
		err = b.peer(ctx, unit)
	}
	if err := errors.Join(err, b.stop(), b.clear()); err != nil {
		return fmt.Errorf("round %d, %s: %w", round, unit, err)
	}
	return b.log.add(b.results)
}

// keep adds a result to the unit's.
func (b *bench) keep(test, peer string, r result) {
	r.Unit, r.Round, r.Test, r.Peer = b.unit, b.round, test, peer
	fmt.Fprintf(os.Stderr, "          %-22s %-8s", test, peer)
	if r.Space > 0 {
		fmt.Fprintf(os.Stderr, " %9.3f bytes a byte\n", r.Space)
	} else {
		fmt.Fprintf(os.Stderr, " %9.0f requests/s %8.1f µs of processor each\n", r.Rate, r.CPU)
	}
	b.results = append(b.results, r)
}

// job runs a job on an export at a depth, with an amount of data.
func (b *bench) job(ctx context.Context, name, export string, depth, mib int) (result, error) {
	return b.fio(ctx, name, export, "SIZE="+strconv.Itoa(mib)+"m", "RUNTIME="+strconv.Itoa(b.Seconds), "DEPTH="+strconv.Itoa(depth),
		"SCATTER="+strconv.Itoa(mib/16)+"m")
}

// A step of a peer's unit: what is done first, and then a test; or a job that is not measured, if test is empty.
type step struct {
	first  []func(context.Context) error
	test   string
	job    string
	depth  int
	export string // default: the peer's disk
}

func (b *bench) peer(ctx context.Context, peer string) error {
	if err := b.create(ctx, peer); err != nil {
		return err
	}
	if err := b.start(ctx, peer, "image"); err != nil {
		return err
	}
	for _, s := range append(b.steps(peer), b.snapshotSteps(peer)...) {
		for _, f := range s.first {
			if err := f(ctx); err != nil {
				return err
			}
		}
		if s.job == "" {
			continue
		}
		if err := b.sync(); err != nil {
			return err
		}
		r, err := b.job(ctx, s.job, cmp.Or(s.export, exportOf(peer)), max(s.depth, 1), b.SizeMiB)
		if err != nil {
			return err
		}
		if s.test != "" {
			b.keep(s.test, peer, r)
		}
	}
	return nil
}

type do = []func(context.Context) error

// steps are the tests of a peer, in order. Each begins with what the one before has left.
func (b *bench) steps(peer string) []step {
	cold := func(context.Context) error { return errors.Join(b.sync(), b.drop()) }
	all := []step{
		{test: "fill", job: "fill"},
		{first: do{b.spaceAs("space-filled", peer), cold}, test: "read-cold", job: "read"},
		{first: do{cold}, test: "randread-cold", job: "randread", depth: mainDepth},
		{job: "read"}, // a server that keeps data in memory has all of it now
	}
	for _, job := range []string{"randread", "randwrite"} {
		for _, d := range depths {
			all = append(all, step{test: fmt.Sprint(job, "-", d), job: job, depth: d})
		}
	}
	for _, job := range []string{"fsync", "database", "machine", "half"} {
		all = append(all, step{test: job, job: job})
	}
	all = append(all,
		step{test: "overwrite", job: "overwrite"},
		step{first: do{b.spaceAs("space-overwritten", peer), cold}, test: "read-overwritten", job: "read"})
	if peer == "vdisk" {
		gc := func(ctx context.Context) error { return b.do(ctx, b.host.vdisk, "-q", "gc", "--cold") }
		all = append(all, step{first: do{gc, b.spaceAs("space-packed", peer), cold}, test: "read-packed", job: "read"})
	}
	return all
}

// snapshotSteps are the tests before and after a snapshot, and of a disk that begins as one: an overlay of qcow2, a clone of
// vdisk.
func (b *bench) snapshotSteps(peer string) []step {
	if peer != "qcow2" && peer != "vdisk" {
		return nil
	}
	snapshot := func(name string) func(context.Context) error {
		return func(ctx context.Context) error { return b.snapshot(ctx, peer, name) }
	}
	var before float64
	look := func(ctx context.Context) (err error) { before, err = b.spaceAtRest(ctx, peer); return err }
	grown := func(ctx context.Context) error {
		now, err := b.spaceAtRest(ctx, peer)
		b.keep("space-after-snapshot", peer, result{Space: round3((now - before) / float64(b.SizeMiB<<20/16))})
		return err
	}
	child := func(ctx context.Context) error {
		if peer == "vdisk" {
			return b.do(ctx, b.host.vdisk, "-q", "clone", "v@s2", "child")
		}
		return errors.Join(b.stop(), b.overlay(ctx, "image", "child"), b.start(ctx, peer, "child"))
	}
	export := map[string]string{"vdisk": "child"}[peer]
	return []step{
		{test: "before-write", job: "randwrite", depth: mainDepth},
		{test: "before-read", job: "randread", depth: mainDepth},
		{first: do{snapshot("s1")}, test: "after-write", job: "randwrite", depth: mainDepth},
		{test: "after-read", job: "randread", depth: mainDepth},
		{first: do{snapshot("s2"), look}, job: "scatter"},
		{first: do{grown, child}, test: "child-write", job: "randwrite", depth: mainDepth, export: export},
		{test: "child-read", job: "randread", depth: mainDepth, export: export},
	}
}

// spaceAtRest is what a peer's disks take without a server, which may keep files larger than they have to be.
func (b *bench) spaceAtRest(ctx context.Context, peer string) (float64, error) {
	if err := b.stop(); err != nil {
		return 0, err
	}
	n, err := b.space()
	return n, errors.Join(err, b.start(ctx, peer, "image"))
}

func (b *bench) spaceAs(test, peer string) func(context.Context) error {
	return func(ctx context.Context) error {
		n, err := b.spaceAtRest(ctx, peer)
		b.keep(test, peer, result{Space: round3(n / float64(b.SizeMiB<<20))})
		return err
	}
}

func exportOf(peer string) string {
	if peer == "vdisk" {
		return "v"
	}
	return ""
}

// create makes a disk of four times the data.
func (b *bench) create(ctx context.Context, peer string) error {
	size := strconv.Itoa(4*b.SizeMiB) + "M"
	switch peer {
	case "qcow2":
		return b.do(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "image", size)
	case "vdisk":
		return b.do(ctx, b.host.vdisk, "-q", "create", "v", "--size", size)
	}
	return b.do(ctx, "truncate", "-s", size, "image")
}

// start serves a disk. That of vdisk is always all of the store.
func (b *bench) start(ctx context.Context, peer, image string) error {
	switch peer {
	case "vdisk":
		return b.serve(ctx, b.host.vdisk, "-q", "serve", "--socket", b.path("s.sock"))
	case "nbdkit":
		return b.serve(ctx, "nbdkit", "-f", "-U", b.path("s.sock"), "file", image)
	}
	return b.serve(ctx, "qemu-nbd", "-t", "-e", "8", "-k", b.path("s.sock"), "--cache=none", "--aio=io_uring", "--discard=unmap",
		"-f", peer, image)
}

// snapshot takes one. qemu-img can do so only while nobody has the image open.
func (b *bench) snapshot(ctx context.Context, peer, name string) error {
	if peer == "vdisk" {
		return b.do(ctx, b.host.vdisk, "-q", "snapshot", "v@"+name)
	}
	return errors.Join(b.stop(), b.do(ctx, "qemu-img", "snapshot", "-c", name, "image"), b.start(ctx, peer, "image"))
}

// overlay makes an image of what will differ from base, with the subclusters that make small writes to it cheap.
func (b *bench) overlay(ctx context.Context, base, name string) error {
	return b.do(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, "-o", "extended_l2=on,cluster_size=128k", name)
}

// full writes at random to a volume that takes a part of a limited store: every block once, once more, and then for a time.
func (b *bench) full(ctx context.Context) error {
	for _, percent := range fills {
		const taken = 2124 // bytes that a block takes in the log, if a half of it is random
		mib := fullLimitMiB * percent / 100 * 4096 / taken
		if err := b.do(ctx, b.host.vdisk, "-q", "create", "v", "--size", fmt.Sprint(mib, "M")); err != nil {
			return err
		}
		err := b.serve(ctx, b.host.vdisk, "-q", "--max-size", fmt.Sprint(fullLimitMiB, "M"), "serve", "--socket", b.path("s.sock"), "v")
		if err != nil {
			return err
		}
		for _, s := range []step{{test: "full-first", job: "overwrite"}, {job: "overwrite"}, {test: "full-steady", job: "randwrite", depth: mainDepth}} {
			r, err := b.job(ctx, s.job, "v", s.depth, mib)
			if err != nil {
				return err
			}
			if s.test != "" {
				b.keep(fmt.Sprint(s.test, "-", percent), "vdisk", r)
			}
		}
		if err := errors.Join(b.stop(), b.clear()); err != nil {
			return err
		}
	}
	return nil
}
