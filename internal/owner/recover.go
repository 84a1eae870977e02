package owner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/ublk"
)

// recoverTimeout limits the recovery of one device. The old server's threads must end first.
const recoverTimeout = 60 * time.Second

// Recovery is the outcome of recovering one device.
type Recovery struct {
	Device Device
	Error  *Error // nil: the device is served again
}

// Recover serves waiting devices again: the one that what names by its path, volume or snapshot, or all of them if what
// is empty. Each device succeeds or fails by itself. Recover also waits for devices that another command is recovering
// or giving up, and includes them in the outcome.
func (o *Owner) Recover(ctx context.Context, what string) ([]Recovery, error) {
	if err := cmp.Or(o.ReadOnly(), o.lasting()); err != nil {
		return nil, err
	}
	waiting, others, err := o.claimWaiting(what)
	if err != nil {
		return nil, err
	}
	if len(waiting) > 0 {
		o.prepareOnce.Do(o.prepareForReclaim)
	}
	outcome := make([]Recovery, len(waiting))
	var wg sync.WaitGroup
	for i, d := range waiting {
		wg.Go(func() { outcome[i] = o.recoverDisk(ctx, d) })
	}
	wg.Wait()
	return append(outcome, o.outcomeOf(ctx, others)...), nil
}

// outcomeOf waits until no command has a claim on the disks, and returns the outcome for those that still exist.
func (o *Owner) outcomeOf(ctx context.Context, disks []*disk) (list []Recovery) {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, d := range disks {
		for d.busy && ctx.Err() == nil {
			o.waitLocked(ctx)
		}
		switch {
		case !slices.Contains(o.disks, d): // given up
		case d.block != nil:
			list = append(list, Recovery{Device: d.info()})
		default:
			list = append(list, Recovery{Device: d.info(), Error: toWire(cmp.Or(d.err, d.info().waitingError()))})
		}
	}
	return list
}

// claimWaiting claims the waiting disks that what names. It returns the disks that another command has claimed in
// others.
func (o *Owner) claimWaiting(what string) (list, others []*disk, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	candidates := o.disks
	if what != "" {
		d, err := o.find(what)
		if err != nil {
			return nil, nil, err
		}
		candidates = []*disk{d}
	}
	for _, d := range candidates {
		switch {
		case d.block != nil || !d.listed(): // served or being made
		case d.busy:
			others = append(others, d)
		default:
			d.busy = true
			list = append(list, d)
		}
	}
	return list, others, nil
}

// recoverDisk recovers one disk. The caller has claimed it; the claim has ended when recoverDisk returns.
func (o *Owner) recoverDisk(ctx context.Context, d *disk) Recovery {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	log := o.opts.Logger.With("what", d.ref().String(), "device", pathOf(d.id))
	info, err := o.tryRecover(ctx, d)
	o.note(ctx, journal.Entry{Kind: "recover", Names: []string{d.ref().String()}, Details: map[string]any{"device": pathOf(d.id)}}, err)
	if err == nil {
		o.tellNames(info.Ref.Volume)
		log.Info("recovered")
		return Recovery{Device: info}
	}
	log.Error("the device cannot be recovered", "err", err)
	if errors.Is(err, ublk.ErrNotFound) {
		err = errors.Join(err, o.forget(d))
	}
	o.release(d, err)
	o.mu.Lock()
	defer o.mu.Unlock()
	return Recovery{Device: d.info(), Error: toWire(err)}
}

func (o *Owner) tryRecover(ctx context.Context, d *disk) (Device, error) {
	if d.dev == nil {
		return Device{}, fmt.Errorf("%v is gone, and %s has nothing to show: %w: give it up with 'vdisk detach --force %[1]v'",
			d.ref(), pathOf(d.id), cow.ErrNotFound)
	}
	if d.lost {
		return Device{}, fmt.Errorf("writes to %v that its last server had acknowledged are lost (its shared memory is gone), and %s "+
			"would lack data that its users have written: %w: give it up with 'vdisk detach --force %[1]v', and check what is on it",
			d.ref(), pathOf(d.id), ublk.ErrNotRecoverable)
	}
	info, err := o.lookFor(ctx, d)
	if err != nil {
		return Device{}, err
	}
	if err := o.isOurs(d); err != nil {
		return Device{}, err
	}
	if err := o.notOnItself(); err != nil {
		return Device{}, err
	}
	if have := d.dev.Size(); have < info.Size {
		return Device{}, fmt.Errorf("%v has %d bytes and %s %d: %w", d.ref(), have, info.Path(), info.Size, cow.ErrInvalid)
	}
	report := o.reporter(d.ref().String())
	t := newTarget(d.dev, o.exports.meters.of(d.ref()), info.Queues*info.Depth, report)
	b, err := o.opts.driver.Recover(ctx, info.ID, ublk.RecoverOptions{Cookie: uint64(d.cookie), Report: report}, t)
	if err != nil {
		t.close()
		return Device{}, ublkError(fmt.Errorf("recovering %v, %s: %w", d.ref(), info.Path(), err))
	}
	served := o.serving(d, b, t)
	if err := dropMountCopies(info.ID); err != nil {
		o.opts.Logger.Warn("mounts of the device in this process's mount namespace hold it", "device", info.Path(), "err", err)
	}
	return served, nil
}

// isOurs returns an error if the disk was made when the store was on another file system.
func (o *Owner) isOurs(d *disk) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return d.mayBeAnothers(o.dir)
}

// mayBeAnothers returns an error if the disk was made when the store was on another file system, since the disk may
// belong to that store. The caller holds Owner.mu.
func (d *disk) mayBeAnothers(dir string) error {
	if d.elsewhere == 0 {
		return nil
	}
	return fmt.Errorf("%s was made of %v when %s was on another file system (device number %s): if that is a copy of the other, this is "+
		"not its device: %w: if it is the same one, mounted anew, run 'vdisk recover --moved %[2]v'; if it is a copy, "+
		"'vdisk detach --force %[2]v' forgets the device here, and leaves it to the other",
		pathOf(d.id), d.ref(), dir, devText(d.elsewhere), cow.ErrBusy)
}

func devText(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// Claim declares that waiting disks, named as for Recover, belong to this store, although they were made when the store
// was on another file system. The caller knows that it is the same file system, mounted again.
func (o *Owner) Claim(ctx context.Context, what string) error {
	if err := o.lasting(); err != nil {
		return err
	}
	waiting, _, err := o.claimWaiting(what)
	if err != nil {
		return err
	}
	for _, d := range waiting {
		o.mu.Lock()
		d.elsewhere = 0
		o.mu.Unlock()
		o.release(d, nil) // it may be tried again
	}
	if len(waiting) == 0 {
		return nil
	}
	return o.record()
}

// lookFor finds a disk's device in the kernel by its cookie, and updates the disk's id.
func (o *Owner) lookFor(ctx context.Context, d *disk) (ublk.DeviceInfo, error) {
	infos, err := o.opts.driver.Devices(ctx)
	if i := slices.IndexFunc(infos, func(i ublk.DeviceInfo) bool { return i.Cookie == uint64(d.cookie) }); i >= 0 {
		o.mu.Lock()
		d.id = infos[i].ID
		o.mu.Unlock()
		return infos[i], nil
	}
	if err != nil && !errors.Is(err, ublk.ErrNoDriver) {
		return ublk.DeviceInfo{}, ublkError(fmt.Errorf("looking for the device of %v: %w", d.ref(), err))
	}
	return ublk.DeviceInfo{}, ublkError(fmt.Errorf("the device of %v is gone: %w", d.ref(), ublk.ErrNotFound))
}

// Stats returns the counters of a block device.
func (o *Owner) Stats(_ context.Context, what string) (DeviceStats, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	d, err := o.find(what)
	if err != nil {
		return DeviceStats{}, err
	}
	if d.block == nil {
		return DeviceStats{}, d.info().waitingError()
	}
	return DeviceStats{Device: d.info(), Stats: d.block.Stats()}, nil
}
