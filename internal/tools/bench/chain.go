package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// A chained is a volume, or an image, whose reads are measured in the test of depth.
type chained struct{ test, peer, export, image string }

// chain measures random reads below many snapshots, and at the end of a chain of clones or overlays: all rounds in turns,
// as making the chains takes most of the time. Each link was written in 64 places before the next was made.
func (b *bench) chain(ctx context.Context) error {
	mib := b.SizeMiB / 2
	last := func(base string) string { return fmt.Sprint(base, b.Clones) }
	if err := b.makeSnapshots(ctx, mib); err != nil {
		return err
	}
	if err := b.makeClones(ctx, mib); err != nil {
		return err
	}
	if err := b.makeOverlays(ctx, mib); err != nil {
		return err
	}
	all := []chained{
		{"chain-none", "vdisk", "flat", ""},
		{"chain-snapshots", "vdisk", "snapshots", ""},
		{"chain-clones", "vdisk", last("clone"), ""},
		{"chain-none", "qcow2", "", "flat"},
		{"chain-clones", "qcow2", "", last("overlay")},
	}
	for b.round = 1; b.round <= b.Rounds; b.round++ {
		for _, c := range all {
			if err := errors.Join(b.stop(), b.start(ctx, c.peer, c.image)); err != nil {
				return err
			}
			if _, err := b.job(ctx, "read", c.export, 4, mib); err != nil {
				return err
			}
			r, err := b.job(ctx, "randread", c.export, mainDepth, mib)
			if err != nil {
				return err
			}
			b.keep(c.test, c.peer, r)
		}
	}
	return nil
}

// makeSnapshots makes the volumes flat and snapshots; the second is written while its snapshots are taken.
func (b *bench) makeSnapshots(ctx context.Context, mib int) error {
	for _, v := range []string{"flat", "snapshots", "clone0"} {
		if err := b.do(ctx, b.host.vdisk, "-q", "create", v, "--size", fmt.Sprint(mib, "M")); err != nil {
			return err
		}
	}
	if err := b.start(ctx, "vdisk", ""); err != nil {
		return err
	}
	for _, v := range []string{"flat", "snapshots", "clone0"} {
		if _, err := b.job(ctx, "overwrite", v, 1, mib); err != nil {
			return err
		}
	}
	return during(ctx, func(ctx context.Context) error {
		_, err := b.job(ctx, "trickle", "snapshots", 1, mib)
		return err
	}, func() error {
		time.Sleep(time.Second) // until it writes
		for i := 1; i <= b.Snapshots; i++ {
			if err := b.do(ctx, b.host.vdisk, "-q", "snapshot", fmt.Sprint("snapshots@", i)); err != nil {
				return err
			}
		}
		return nil
	})
}

// during calls do while write runs, and then stops write. That write was stopped is no fault; that it has ended before is.
func during(ctx context.Context, write func(context.Context) error, do func() error) error {
	writing, stop := context.WithCancel(ctx)
	defer stop()
	var failed error // of write, once ended is closed
	ended := make(chan struct{})
	go func() { defer close(ended); failed = write(writing) }()
	err := do()
	select {
	case <-ended:
		return errors.Join(err, failed, errors.New("the writer ended before the last snapshot was taken"))
	default:
	}
	stop()
	<-ended
	return err
}

func (b *bench) makeClones(ctx context.Context, mib int) error {
	for i := range b.Clones {
		last := fmt.Sprint("clone", i)
		if err := errors.Join(
			b.touch(ctx, "raw", b.uri(last), mib),
			b.do(ctx, b.host.vdisk, "-q", "snapshot", last+"@s"),
			b.do(ctx, b.host.vdisk, "-q", "clone", last+"@s", fmt.Sprint("clone", i+1))); err != nil {
			return err
		}
	}
	return b.stop()
}

func (b *bench) makeOverlays(ctx context.Context, mib int) error {
	for _, name := range []string{"flat", "overlay0"} {
		if err := errors.Join(
			b.do(ctx, "qemu-img", "create", "-q", "-f", "qcow2", name, fmt.Sprint(mib, "M")),
			b.start(ctx, "qcow2", name)); err != nil {
			return err
		}
		_, err := b.job(ctx, "overwrite", "", 1, mib)
		if err := errors.Join(err, b.stop()); err != nil {
			return err
		}
	}
	for i := range b.Clones {
		name := fmt.Sprint("overlay", i+1)
		if err := errors.Join(b.overlay(ctx, fmt.Sprint("overlay", i), name), b.touch(ctx, "qcow2", name, mib)); err != nil {
			return err
		}
	}
	return nil
}

// touch writes 64 blocks at random. qemu-io is used for all, as it starts much faster than fio.
func (b *bench) touch(ctx context.Context, format, disk string, mib int) error {
	argv := []string{"qemu-io", "-f", format}
	for range 64 {
		argv = append(argv, "-c", fmt.Sprintf("write -q %dk 4k", rand.IntN(mib*256)*4))
	}
	return b.do(ctx, append(argv, disk)...)
}
