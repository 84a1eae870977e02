package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// stopAttempt is one try to stop a device, on a goroutine of its own because the kernel cannot be called back from it.
type stopAttempt struct {
	force bool
	done  chan struct{}
	err   error // valid once done is closed; nil: the driver has stopped the device
}

// Stop ends the device if nobody uses it, and otherwise refuses with ErrBusy and an error that names the users.
//
// The kernel writes back what is dirty through the live handler, then the queues end, then the device is deleted. When
// ctx ends first, the stop goes on; Stop or Close can be called again to wait for it. Stopping a device that is gone
// is no error.
//
// From Linux 7.0 on the kernel makes the check and the stop one step. Before, the block device is claimed and the open
// files of all processes are looked through; a process may still open the device just after.
func (d *Device) Stop(ctx context.Context) error { return d.end(ctx, false) }

// Close is Stop that does not ask who uses the device: a mounted file system is synced, and then loses its disk.
func (d *Device) Close(ctx context.Context) error { return d.end(ctx, true) }

func (d *Device) end(ctx context.Context, force bool) error {
	for {
		a := d.beginStop(force)
		select {
		case <-a.done:
			switch {
			case a.err == nil:
			case force && !a.force:
				continue // somebody's cautious attempt was refused; now in earnest
			case force:
				d.fail(fmt.Errorf("ublk: stop device %d: %w", d.id, a.err))
			default:
				return a.err
			}
			return d.waitGone(ctx)
		case <-d.done:
			return d.waitGone(ctx)
		case <-ctx.Done():
			return d.stillStopping(ctx)
		}
	}
}

func (d *Device) waitGone(ctx context.Context) error {
	select {
	case <-d.done:
	case <-ctx.Done():
		return d.stillStopping(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil && !errors.Is(d.err, ErrStopped) {
		return d.err
	}
	return d.delErr
}

func (d *Device) stillStopping(ctx context.Context) error {
	return fmt.Errorf("ublk: device %d is still stopping: its requests are not all answered: %w", d.id, ctx.Err())
}

// beginStop returns the attempt that is under way or has succeeded, or begins one; stopRoutine takes back a failed one.
func (d *Device) beginStop(force bool) *stopAttempt {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attempt != nil {
		return d.attempt
	}
	a := &stopAttempt{force: force, done: make(chan struct{})}
	if d.state == StateDead {
		close(a.done)
		return a
	}
	d.attempt = a
	d.state = StateStopping
	d.stopping.Add(1)
	go d.stopRoutine(a)
	return a
}

// stopRoutine makes one attempt. superviseRoutine waits for it.
func (d *Device) stopRoutine(a *stopAttempt) {
	defer d.stopping.Done()
	var err error
	switch {
	case a.force:
		err = d.control.stop(d.id)
	case d.kernel&FeatureSafeStop != 0:
		err = d.stopIfUnused(d.tryStop)
	default:
		err = d.stopIfUnused(d.claimAndStop)
	}
	if gone(err) {
		err = nil
	}
	d.mu.Lock()
	a.err = err
	if err != nil {
		d.attempt = nil
		if d.state == StateStopping {
			d.state = StateLive
		}
	}
	close(a.done)
	d.mu.Unlock()
}

// settleTime is how long a device may be open before Stop calls that a use: udev and blkid open a device for a moment
// after it appears or changes.
const settleTime = 2 * time.Second

// stopIfUnused calls try until it does not say EBUSY, or somebody turns out to hold the device for good.
func (d *Device) stopIfUnused(try func() error) error {
	for deadline := time.Now().Add(settleTime); ; time.Sleep(100 * time.Millisecond) {
		err := try()
		if !errors.Is(err, unix.EBUSY) {
			if err != nil && !gone(err) {
				err = deviceError("stop", d.id, err)
			}
			return err
		}
		us := users(d.id)
		if time.Now().After(deadline) || lasting(us) {
			return fmt.Errorf("ublk: stop %s: %w: %s; unmount or close it first",
				blockPath(d.id), ErrBusy, describeUsers(us))
		}
	}
}

func (d *Device) tryStop() error { return d.control.tryStop(d.id) }

// claimAndStop is TRY_STOP for kernels without it. The exclusive open fails when the device is mounted, part of another
// device or opened exclusively, and keeps that from happening until the stop; other opens show as files of a process.
func (d *Device) claimAndStop() error {
	fd, err := openRetry(blockPath(d.id), unix.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
		return d.control.stop(d.id)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if len(openers(d.id, fd)) > 0 {
		return unix.EBUSY
	}
	return d.control.stop(d.id)
}
