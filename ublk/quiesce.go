package ublk

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Quiesce ends serving and leaves the disk, whose users wait until a server recovers it. It needs Options.Recovery.
//
// With RecoverReissue, every kernel can do it. The queues hand out no more requests, and each queue rests when the
// handler has none. When all queues rest, they end, however much the users have to do. The driver gives the requests
// that have arrived meanwhile to the next server. Until then nothing has changed: if ctx ends first, or Close is
// called, the queues hand out the requests that they kept, and the device goes on serving as before.
//
// The other ways of recovery need Linux 6.16, whose driver holds the requests back; before that, Quiesce returns a
// *FeatureError. The driver cannot be called back. So the device ends quiesced in any case, as soon as the handler has
// answered its requests.
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

// quiesce makes the queues leave, or makes them stay if they cannot leave in time.
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

// quiesceDriver makes the driver hand out no more requests. Once that has begun, the driver's answer means nothing: it
// does not tell a queue that has nothing to give back at the moment from one that never will.
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
