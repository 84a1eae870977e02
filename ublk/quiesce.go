package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Quiesce ends serving and leaves the disk: its users wait until somebody recovers it. It needs Options.Recovery.
//
// With RecoverReissue, which any kernel can, the queues hand out no more, and each rests when nothing is with the
// handler; when all do they end, however much the users have to do, and what has arrived meanwhile the driver gives
// to the next server. Until then nothing has changed: when ctx ends first, or Close is called, the queues hand out
// what they kept and the device goes on serving as if nothing had been. The other ways of recovery need Linux 6.16 (a
// *FeatureError before), whose driver holds the requests back; it cannot be called back, so that the device ends
// quiesced in any case, as soon as what is with the handler is answered.
func (d *Device) Quiesce(ctx context.Context) error {
	if d.features&FeatureUserRecovery == 0 {
		return fmt.Errorf("ublk: quiesce device %d: %w: it was made without recovery", d.id, ErrNotRecoverable)
	}
	if d.features&(FeatureRecoveryReissue|FeatureQuiesce) == 0 {
		return &FeatureError{Missing: FeatureQuiesce, Kernel: kernelRelease()}
	}
	if err := d.end(ctx, attemptQuiesce); err != nil {
		return err
	}
	if s := d.State(); s != StateQuiesced {
		return fmt.Errorf("ublk: quiesce device %d: it is %v: %w", d.id, s, ErrStopped)
	}
	return nil
}

// quiesce has the queues leave, or has them stay when that cannot be.
func (d *Device) quiesce(ctx context.Context) error {
	if d.features&FeatureRecoveryReissue == 0 {
		return d.quiesceDriver(ctx)
	}
	d.tellQueues(leaveSoon)
	for !d.resting() {
		if err := sleep(ctx, time.Millisecond); err != nil {
			d.tellQueues(leaveNot)
			return fmt.Errorf("ublk: quiesce device %d: its requests are not all answered: %w", d.id, err)
		}
	}
	d.tellQueues(leaveNow)
	return nil
}

// quiesceDriver has the driver hand out no more. What it answers is of no account once it has begun: it does not say
// whether a queue has nothing to give back at the moment or for ever.
func (d *Device) quiesceDriver(ctx context.Context) error {
	timeout := commandTimeout
	if end, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(end))
	}
	err := d.control.quiesce(ctx, d.target, timeout)
	if err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINTR) && ctx.Err() == nil {
		return deviceError("quiesce", d.id, err)
	}
	d.tellQueues(leaveNow)
	return nil
}

func (d *Device) tellQueues(l leave) {
	for _, t := range d.queues {
		t.leaveAs(l)
	}
}

func (d *Device) resting() bool {
	for _, t := range d.queues {
		if !t.resting() {
			return false
		}
	}
	return true
}
