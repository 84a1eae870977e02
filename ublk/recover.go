package ublk

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// RecoverOptions are the options of a device that the driver does not keep.
type RecoverOptions struct {
	// Cookie is the one that the device was made with. A device with another cookie is refused; 0 accepts any.
	Cookie uint64
	// Report and NoAffinity are as in Options.
	Report     func(error)
	NoAffinity bool
}

// recoverTimeout bounds the wait for the driver to notice that the server is gone. Before Linux 6.15 that may take the
// block layer's timeout of 30 seconds, if the server held every tag of a queue when it died.
const recoverTimeout = 60 * time.Second

// diesWithin is how long a server that was killed may still have the char device open.
const diesWithin = 2 * time.Second

// Recover serves a device again that was made with Options.Recovery and whose server is gone. The driver has kept its
// size, queues, limits and features. h must serve the same content. When Recover returns, the device is live, and the
// requests that waited are being served.
//
// Recover refuses a device that a process serves (ErrBusy), that is not there (ErrNotFound), or that cannot be
// recovered, or not by this package (ErrNotRecoverable). If it fails for another reason, or its process dies, the
// device waits as before, and Recover can be tried again.
func Recover(ctx context.Context, id int, o RecoverOptions, h Handler) (*Device, error) {
	c, err := openControl()
	if err != nil {
		return nil, err
	}
	return recoverDevice(ctx, c, id, o, h)
}

func recoverDevice(ctx context.Context, c *control, id int, o RecoverOptions, h Handler) (*Device, error) {
	wait, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	offered, err := c.offered(ctx)
	if err != nil {
		return nil, err
	}
	info, err := c.waitOrphan(wait, id, o.Cookie)
	if err != nil {
		return nil, err
	}
	p, err := c.getParams(ctx, info.target())
	if err != nil {
		return nil, err
	}
	opts := optionsOf(info, p)
	opts.Report, opts.NoAffinity = o.Report, o.NoAffinity
	// Drivers with QUIESCE (6.16) reset the queues when a server ends.
	anew := offered != ^Feature(0) && offered&FeatureQuiesce != 0
	for try := 0; ; try++ {
		if anew {
			if err := startRetry(wait, c, info.target()); err != nil {
				return nil, err
			}
		}
		d := newDevice(c, info, offered, opts, StateRecovering)
		err := d.takeOver(ctx, h)
		if err == nil {
			return d, nil
		}
		d.abandon(err)
		switch {
		case errors.Is(err, errFetchedBefore) && !anew, errors.Is(err, errMapRefused) && try < 2:
			anew = true
		default:
			return nil, err
		}
	}
}

// errFetchedBefore: every queue refused its fetches, because each has had a server.
//
// Before Linux 6.15 the driver resets the queues in START_USER_RECOVERY, and that is possible only if every queue has
// had a server since the last START. If none has, the driver answers EINVAL. If only some have, it crashes. A recovery
// that dies halfway leaves such a state. So with these drivers Recover begins without START, and tries to fetch:
//
//   - If every queue refuses, each has had a server, which is gone. START is safe, and then they fetch.
//   - If every queue fetches, there was a START, and no server since.
//   - If only some fetch, the device cannot be recovered.
//
// The descriptors are mapped after the fetches, because the driver lets only one process map them until the next START.
var errFetchedBefore = errors.New("ublk: every queue of the device has had a server")

// waitOrphan waits until the server of a device is gone, and returns the driver's information about the device. It
// fails if the device cannot be recovered.
func (c *control) waitOrphan(ctx context.Context, id int, cookie uint64) (*devInfo, error) {
	for begin := time.Now(); ; {
		info, err := c.getInfo(ctx, id)
		if err != nil {
			return nil, err
		}
		switch {
		case Feature(info.flags)&FeatureUserRecovery == 0:
			return nil, fmt.Errorf("ublk: recover device %d: %w: it was made without recovery", id, ErrNotRecoverable)
		case Feature(info.flags)&unspoken != 0:
			return nil, fmt.Errorf("ublk: recover device %d: %w: it was made with %s, which this library does not serve; the program that made it has to",
				id, ErrNotRecoverable, strings.Join(FeatureSet{Bits: Feature(info.flags) & unspoken}.Names(), ", "))
		case cookie != 0 && info.serverFlags != cookie:
			return nil, fmt.Errorf("ublk: recover device %d: %w: it has another cookie (%#x), so it is not the one that was meant",
				id, ErrNotRecoverable, info.serverFlags)
		case KernelState(info.state) == KernelDead:
			return nil, fmt.Errorf("ublk: recover device %d: %w: it has no disk (any more); delete it", id, ErrNotRecoverable)
		}
		s := serverOf(id, int(info.serverPID))
		switch {
		case !s.found && KernelState(info.state) != KernelLive:
			return info, nil // if there is a server that cannot be seen, the driver will answer EBUSY
		case s.found && time.Since(begin) > diesWithin:
			return nil, fmt.Errorf("ublk: recover device %d: %w: %v serves it", id, ErrBusy, s)
		}
		if sleep(ctx, 10*time.Millisecond) != nil {
			return nil, fmt.Errorf("ublk: recover device %d: the driver has not noticed yet that its server is gone: %w",
				id, ctx.Err())
		}
	}
}

// startRetry makes the driver begin a recovery as soon as it has let go of the old server.
func startRetry(ctx context.Context, c *control, to target) error {
	for {
		err := c.startRecovery(ctx, to)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EBUSY):
			return deviceError("start to recover", to.id, err)
		case sleep(ctx, 10*time.Millisecond) != nil:
			return fmt.Errorf("ublk: recover device %d: %w: the driver holds on to the old server (%w)", to.id, ErrBusy, err)
		}
	}
}

// takeOver fetches every tag and ends the recovery.
func (d *Device) takeOver(ctx context.Context, h Handler) error {
	if err := d.openChar(ctx); err != nil {
		return err
	}
	if err := d.makeQueues(ctx, h); err != nil {
		return err
	}
	if err := d.startQueues(); err != nil {
		switch {
		case !errors.Is(err, errRefused):
		case d.refused == len(d.queues):
			err = errors.Join(errFetchedBefore, err)
		default:
			err = fmt.Errorf("ublk: recover device %d: %w: an earlier recovery died halfway, and this kernel's driver cannot "+
				"begin again (Linux 6.15 can); delete it: %w", d.id, ErrNotRecoverable, err)
		}
		return err
	}
	if err := d.control.endRecovery(ctx, d.target); err != nil {
		return deviceError("recover", d.id, err)
	}
	return d.goLive()
}

// abandon ends a device that was not recovered, and leaves its disk as it is.
func (d *Device) abandon(cause error) {
	if !d.hasThreads() {
		d.release()
		return
	}
	d.fail(cause)
	<-d.done
}

// optionsOf returns the options that a device was made with.
func optionsOf(info *devInfo, p *params) Options {
	o := Options{
		ID:                 new(int(info.devID)),
		Size:               int64(p.basic.devSectors) << sectorShift,
		Queues:             int(info.queues),
		Depth:              int(info.depth),
		MaxIOBytes:         int(info.maxIOBytes),
		LogicalBlock:       1 << p.basic.logicalShift,
		PhysicalBlock:      1 << p.basic.physicalShift,
		IOMin:              1 << p.basic.ioMinShift,
		IOOpt:              1 << p.basic.ioOptShift,
		ReadOnly:           p.basic.attrs&attrReadOnly != 0,
		VolatileCache:      p.basic.attrs&attrVolatileCache != 0,
		FUA:                p.basic.attrs&attrFUA != 0,
		Discard:            p.types&paramDiscard != 0,
		DiscardGranularity: int(p.discard.granularity),
		Cookie:             info.serverFlags,
		NoPartitionScan:    Feature(info.flags)&FeatureNoAutoPartScan != 0,
	}
	switch f := Feature(info.flags); {
	case f&FeatureRecoveryReissue != 0:
		o.Recovery = RecoverReissue
	case f&FeatureRecoveryFailIO != 0:
		o.Recovery = RecoverFailIO
	case f&FeatureUserRecovery != 0:
		o.Recovery = RecoverEIO
	}
	switch f := Feature(info.flags); {
	case f&FeatureBatchIO != 0:
		o.Copy = CopyBatch
	case f&FeatureUserCopy != 0:
		o.Copy = CopyUser
	default:
		o.Copy = CopyPlain
	}
	return o
}
