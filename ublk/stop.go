package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// attempt is one try to end a device. It runs on a goroutine of its own, because the kernel cannot be called back from
// it. There is one at a time.
type attempt struct {
	kind   attemptKind
	cancel context.CancelFunc // ends an attemptQuiesce; the others cannot be called back
	done   chan struct{}
	err    error // valid once done is closed; nil: the device ends
}

type attemptKind uint8

const (
	attemptStop    attemptKind = iota // fails if the device is in use
	attemptClose                      // ends the device even if it is in use
	attemptQuiesce                    // ends serving, and leaves the disk
)

// Stop ends the device if it is not in use. Otherwise it returns ErrBusy, in an error that names the users.
//
// The kernel writes dirty data back through the live handler, then the queues end, and then the device is deleted. If
// ctx ends first, the stop goes on; call Stop or Close again to wait for it. Stopping a device that has ended is no
// error. The disk of a quiesced device stays, and Delete removes it.
//
// From Linux 7.0 on, the kernel makes the check and the stop in one step. Before that, Stop claims the block device and
// looks through the open files of all processes, so a process may still open the device just after the check.
func (d *Device) Stop(ctx context.Context) error { return d.end(ctx, attemptStop) }

// Close is Stop without the check for users: a mounted file system is synced, and then loses its disk. Close calls off
// a Quiesce that is not done yet.
func (d *Device) Close(ctx context.Context) error { return d.end(ctx, attemptClose) }

func (d *Device) end(ctx context.Context, kind attemptKind) error {
	for {
		a := d.begin(ctx, kind)
		select {
		case <-a.done:
			switch {
			case a.err == nil:
				return d.waitGone(ctx)
			case a.kind != kind && ctx.Err() == nil:
				continue // another caller's attempt was refused; now this one
			case a.kind != kind: // and no time is left for this one
				return d.stillEnding(ctx)
			case kind == attemptClose:
				d.fail(fmt.Errorf("ublk: stop device %d: %w", d.id, a.err))
				return d.waitGone(ctx)
			case kind == attemptQuiesce && errors.Is(a.err, context.Canceled) && ctx.Err() == nil:
				continue // the context of another caller
			}
			return a.err
		case <-d.done:
			return d.waitGone(ctx)
		case <-ctx.Done():
			return d.stillEnding(ctx)
		}
	}
}

func (d *Device) waitGone(ctx context.Context) error {
	select {
	case <-d.done:
	case <-ctx.Done():
		return d.stillEnding(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil && !errors.Is(d.err, ErrStopped) {
		return d.err
	}
	return errors.Join(d.delErr, d.flushErr)
}

func (d *Device) stillEnding(ctx context.Context) error {
	return fmt.Errorf("ublk: device %d is still %v: its requests are not all answered: %w", d.id, d.State(), ctx.Err())
}

// begin returns the attempt that is under way or has succeeded, or else begins one. attemptRoutine clears a failed one.
func (d *Device) begin(ctx context.Context, kind attemptKind) *attempt {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.attempt; a != nil {
		if kind == attemptClose {
			a.cancel()
		}
		return a
	}
	a := &attempt{kind: kind, cancel: func() {}, done: make(chan struct{})}
	if d.isOver() {
		d.drop = d.drop || kind == attemptClose
		return a // a.done is never closed, but d.done will be
	}
	next := StateStopping
	if kind == attemptQuiesce {
		next = StateQuiescing
		ctx, a.cancel = context.WithCancel(ctx)
	}
	switch {
	case d.state.ended():
		close(a.done)
		return a
	case !d.moveLocked(next):
		a.err = fmt.Errorf("ublk: device %d is %v: %w", d.id, d.state, ErrBusy)
		close(a.done)
		return a
	}
	d.attempt = a
	d.stopping.Add(1)
	go d.attemptRoutine(ctx, a)
	return a
}

// attemptRoutine makes one attempt. superviseRoutine waits for it.
func (d *Device) attemptRoutine(ctx context.Context, a *attempt) {
	defer d.stopping.Done()
	defer a.cancel()
	d.waitResize()
	var err error
	switch {
	case a.kind == attemptQuiesce:
		err = d.quiesce(ctx)
	case a.kind == attemptClose && d.features&FeatureUserRecovery != 0:
		d.leaveAndDelete()
	case a.kind == attemptClose:
		err = d.control.stop(d.target)
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
	d.drop = d.drop || err == nil && a.kind != attemptQuiesce
	if err != nil {
		d.attempt = nil
		d.moveLocked(StateLive)
	}
	close(a.done)
	d.mu.Unlock()
}

// leaveAndDelete ends a device with recovery, without STOP: the queues leave when the handler has no request, and what
// arrives after that fails when the device is deleted.
//
// The STOP of a device with recovery fails all requests from its beginning on, and does not end before the server has
// answered those that it has. A server that is killed meanwhile never ends: the thread in STOP waits for the server's
// end, and the driver sees that only when the last thread is gone. If the server is killed while it leaves in the way
// used here, the disk waits for the next server.
func (d *Device) leaveAndDelete() {
	err := d.writeBack() // first, because no queue would serve the writes after the queues have ended
	d.mu.Lock()
	d.flushErr = err
	d.mu.Unlock()
	d.tellQueues(leaveDrop)
}

// settleTime is how long a device may be open before Stop counts that as a use: udev and blkid open a device for a
// moment after it appears or changes.
const settleTime = 2 * time.Second

// stopIfUnused calls try until it no longer returns EBUSY, or the device turns out to have a lasting user.
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

func (d *Device) tryStop() error { return d.control.tryStop(d.target) }

// claimAndStop is TRY_STOP for kernels without it. The exclusive open fails if the device is mounted, part of another
// device or opened exclusively, and it prevents all of these until the stop. Other opens are found among the open files
// of processes.
func (d *Device) claimAndStop() error {
	fd, err := openRetry(blockPath(d.id), unix.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) && diskGone(d.id) {
		return d.control.stop(d.target)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if len(openers(d.id, fd)) > 0 {
		return unix.EBUSY
	}
	if d.features&FeatureUserRecovery != 0 {
		// A process that closed the disk while this claim holds it open was not the last to close it, so the kernel
		// wrote nothing back. STOP would fail those writes (leaveAndDelete).
		if err := d.writeBack(); err != nil {
			return err
		}
	}
	return d.control.stop(d.target)
}
